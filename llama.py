"""A Llama on token ids: configuration, KV cache, forward pass, sampling, and a naive reference.

What is special here serves one promise of `kangaroo.py`: speculative decoding gives the bits of
vanilla decoding.

- **Positions are explicit.** A KV cache does not know how many of its rows are filled. The caller
  says at which positions it writes; a rejected token's rows are simply overwritten by the next
  ones. So the layers can be run in pieces, and rolled back by doing nothing.
- **One shape.** Every decode step computes the same number of rows against a view of the cache
  whose length depends on the position alone (`one_shape`). The same kernels then add up in the same
  order, whether 1 row is live or 6, provided that a kernel treats its rows alike:
  `support/self_check.py` looks.
- **One order.** A node of a tree lies at another row of the cache than vanilla decoding's token
  would, but its row adds up keys and values in the order of positions, as vanilla does
  (`support/attention.py`).
- **One noise.** The random numbers that choose the token at position t depend on (seed, t) alone
  (`Sampler`).

Left out on purpose: files (`support/checkpoint.py`), text (`support/tokenizer.py`), faster layouts
(`support/packing.py`), batches, quantisation, other architectures. Names are Hugging Face's. The
arithmetic follows transformers' modeling_llama.py. Next: `train_adapter.py`.
"""
import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import NamedTuple

from support.attention import attend, make_mask, merge_chunks
from support.device import to_device
from support.limits import CHAIN_WIDTH, check_sampling

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama. Names and defaults are Hugging Face's, but for rope_* and eos_*."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_scaling: tuple = ()  # the values that rope_type needs: see inverse_frequencies
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple = ()
    sliding_window: int | None = None  # set if it, and not the model, limits the context


# --------------------------------------------------------------------------------------------------
# KV cache and the one shape

class KVCache:
    """Keys and values of every layer: row p belongs to position p, whoever wrote it.

    It does not know which rows are filled: positions say what is written and, through the mask,
    what is seen. It starts as zeros because a masked row still enters a product as 0 × row, and
    0 × NaN is NaN. Position comes before the heads, so that neither the strides nor the bits of a
    view depend on how much memory lies behind it.
    """
    BLOCK = {"cpu": 64, "cuda": 256}  # positions by which a view grows

    def __init__(self, rows, length, width, layers=None):
        self.rows = rows      # (2, layers, 1, positions, kv_heads, head_dim), keys and values
        self.length = length  # how many positions are in view
        self.width = width    # how many rows every decode step has: see one_shape
        self.layers = layers or list(rows.unbind(1))  # the same memory, a layer each
        self.slots = self.columns = None  # set by one_shape: slots for trees, columns if width > 8

    @classmethod
    def zeros(cls, config, length, width, like):
        """Room for `length` positions, in whole blocks, with the dtype and device of `like`."""
        length = cls.in_view(length, like.device)
        shape = (2, config.num_hidden_layers, 1, length, config.num_key_value_heads,
                 config.head_dim)
        return cls(like.new_zeros(shape), length, width)

    @classmethod
    def in_view(cls, end, device):
        """How many positions the blocks have that cover positions 0 … end − 1."""
        block = cls.BLOCK[device.type]
        return -(-end // block) * block

    def view(self, end):
        """The blocks that cover positions 0 … end − 1, sharing memory. Attention costs what is in
        view, not what there is room for."""
        return KVCache(self.rows, self.in_view(end, self.rows.device), self.width, self.layers)

    def room(self, start):
        """How many tokens a draft behind position `start` may have, 0 … width − 1.

        Each row must see the view that it would have alone. A step at `start` sees the blocks that
        hold start + width positions, so a draft ends before one of its rows would need another
        block. At width 8 with blocks of 64 it may have 6 tokens behind position 50, because a step
        at 57 sees 65 positions, which is a second block; behind position 56 none.
        """
        block = self.BLOCK[self.rows.device.type]
        return min(self.width - 1, -(start + self.width) % block)

    def keep(self, start, path):
        """After a step whose node i stands at row start + i: move the rows of the nodes `path` to
        start + 1, start + 2, … In a chain they are there already.

        With start = 5 and path = [2, 3], rows 7 and 8 are copied to rows 6 and 7.
        """
        if path != list(range(1, len(path) + 1)):
            moved = to_device([start + node for node in path], self.rows.device)
            self.rows[:, :, :, start + 1:start + 1 + len(path)] = self.rows[:, :, :, moved]


def one_shape(x, start, cache, parents=None):
    """A decode step's (x, positions, view of the cache) for `run_layers`: `cache.width` rows.

    x (1, T ≤ width, d) are the live rows, from position `start` on. A product of 1 row and one of 5
    rows may run different kernels, add up in different orders and round differently. So every step
    has `width` rows and a view set by `start`; the dead rows are zeros. What they write lies beyond
    the live rows, where no live row sees it and the next step overwrites it.

    At width 8, with blocks of 64, the last committed token at position 10 and 3 drafted ones are 8
    rows at positions 10 … 17, of which 4 live, over a view of 64 positions; the token alone is too.

    With `parents` the rows are the last T nodes of a tree: node 0 is its root, at position `start`;
    parents[i − 1] < i is the parent of node i. Node i lies at row start + i of the cache, its slot,
    and stands at position start + its depth. The view of the cache then says for each row which
    slot holds which position on the row's path: `columns`, with an example in support/attention.py.
    """
    width, T = cache.width, x.shape[1]
    first = 0 if parents is None else 1 + len(parents) - T  # x may hold only the newest nodes
    slots = torch.arange(first, first + width, device=x.device) + start
    x, view = F.pad(x, (0, 0, 0, width - T)), cache.view(start + width)
    if width > CHAIN_WIDTH:
        view.columns = torch.arange(view.length, device=x.device).repeat(width, 1)
    if parents is None or parents == list(range(len(parents))):  # a chain: slots are positions
        return x, slots, view
    assert width > CHAIN_WIDTH, f"a tree needs a width above {CHAIN_WIDTH}"
    paths = [[0]]
    for node, parent in enumerate(parents, 1):
        paths.append([*paths[parent], node])
    # What follows a node's own depth is masked, so any slots will do there.
    live = [path + list(range(len(path), width)) for path in paths[first:]]
    view.columns[:len(live), start:start + width] = to_device(live, x.device) + start
    depth = [len(path) - 1 for path in paths[first:]] + [0] * (width - len(live))
    view.slots = slots
    return x, to_device(depth, x.device) + start, view


# --------------------------------------------------------------------------------------------------
# The model

class Linear(nn.Module):
    """y = x Wᵀ. `parts` names the projections stacked in W, and their rows: one product, not three.
    """

    def __init__(self, in_features, **parts):
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), in_features))

    def forward(self, x):
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """x (…, size) by its root mean square, times weight (size,)."""

    def __init__(self, size, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@lru_cache(maxsize=None)  # noqa: UP033 — kept for ever: a CUDA graph may hold its address
def inverse_frequencies(config, device):
    """RoPE's angle per position, (head_dim / 2,) float32; see transformers' modeling_rope_utils."""
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_type == "linear":
        factor, = config.rope_scaling
        inv_freq = inv_freq / factor
    elif config.rope_type == "llama3":
        # Slow down the long wavelengths, keep the short ones, blend in between.
        factor, low_freq_factor, high_freq_factor, original_context = config.rope_scaling
        turns = original_context * inv_freq / (2 * math.pi)
        keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / factor
    return inv_freq.to(device)


def angles(config, positions, dtype):
    """RoPE's cos and sin at positions (T,), the first half of sin negated: (2, T, 1, head_dim)."""
    angle = positions[:, None].float() * inverse_frequencies(config, positions.device)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).to(dtype)


@lru_cache(maxsize=None)  # noqa: UP033 — as above
def angles_up_to(config, length, dtype, device):
    """The angles of positions 0 … length − 1, among which a step looks up its own."""
    return angles(config, torch.arange(length, device=device), dtype)


class Rows(NamedTuple):
    """What all layers of a pass share about its T rows."""
    slots: torch.Tensor    # (T,) where keys and values are written
    cos: torch.Tensor      # (T, 1, head_dim)
    sin: torch.Tensor      # (T, 1, head_dim), the first half negated
    mask: torch.Tensor     # which of the S positions in view a row sees; None: causal
    columns: torch.Tensor  # (T, S): the slot that holds a position; None: slots are positions
    shared: int            # the first `shared` columns are the positions themselves in all rows

    @classmethod
    def at(cls, config, positions, x, cache):
        if cache is None:
            return cls(positions, *angles(config, positions, x.dtype), None, None, 0)
        room = 1 << (cache.rows.shape[3] - 1).bit_length()  # a power of two: few tables are made
        cos, sin = angles_up_to(config, room, x.dtype, x.device).index_select(1, positions)
        slots, columns = positions if cache.slots is None else cache.slots, cache.columns
        group = config.num_attention_heads // config.num_key_value_heads
        mask = make_mask(positions, cache.length, x, group, in_order=columns is not None)
        # Only a step's own slots may be out of order, and they lie within the last BLOCK + T.
        shared = cache.length - cache.BLOCK[x.device.type] - x.shape[1]
        return cls(slots, cos, sin, mask, columns, max(0, shared))


def rotate(x, cos, sin):
    """RoPE on x (B, T, heads, head_dim): pairs (i, i + head_dim / 2) turn by the row's angle."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_all(qkv, heads, cos, sin):
    """The parts q, k, v of qkv (B, T, heads + 2 kv_heads, head_dim), q and k with RoPE."""
    both = (heads + qkv.shape[2]) // 2
    qk = rotate(qkv[:, :, :both], cos, sin)
    return qk[:, :, :heads], qk[:, :, heads:], qkv[:, :, both:]


def rotate_and_write(qkv, heads, cos, sin, slots, layer):
    """RoPE on q and k of qkv, as in `rotate_all`; returns q, and writes k and v to the rows slots
    (T,) of a layer's cache (2, B, S, kv_heads, head_dim).

    In one write: of two to one memory torch.compile in PyTorch 2.6 makes copies of the whole cache.
    """
    q, *kv = rotate_all(qkv, heads, cos, sin)
    layer.index_copy_(2, slots, torch.stack(kv))
    return q


def silu_and_multiply(gate_up):
    """gate_up (…, 2 n), gate and up side by side -> (…, n)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class Attention(nn.Module):
    """Causal grouped-query self-attention with RoPE, of the target's layers and of the adapter."""
    # Hooks: support/graphs.py has them compiled.
    rotate_and_write, merge = staticmethod(rotate_and_write), staticmethod(merge_chunks)

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, q_proj=q, k_proj=kv, v_proj=kv)
        self.o_proj = Linear(q, o_proj=config.hidden_size)

    def forward(self, x, rows, cache=None, layer=0):
        return self.o_proj(self.mix(x, rows, cache, layer))

    def mix(self, x, rows, cache, layer):
        """The heads' outputs side by side (B, T, heads · head_dim)."""
        qkv = self.qkv_proj(x).unflatten(2, (-1, self.head_dim))  # (B, T, H + 2 K, D)
        if cache is None:
            q, k, v = rotate_all(qkv, self.heads, rows.cos, rows.sin)
        else:
            both = cache.layers[layer]
            q = self.rotate_and_write(qkv, self.heads, rows.cos, rows.sin, rows.slots, both)
            k, v = both[:, :, :cache.length]  # (1, S, K, D)
        return attend(q, k, v, rows.mask, rows.columns, rows.shared, self.merge).flatten(2)


class MLP(nn.Module):
    silu_and_multiply = staticmethod(silu_and_multiply)  # a hook, as above

    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(hidden, gate_proj=inner, up_proj=inner)
        self.down_proj = Linear(inner, down_proj=hidden)

    def forward(self, x):
        return self.down_proj(self.silu_and_multiply(self.gate_up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rows, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), rows, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Modules hold weights only: never a cache, a mask or a position."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.fingerprint = None  # which model this is: see support/checkpoint.py
        weight = torch.empty(config.vocab_size, config.hidden_size)  # given, it is not drawn
        self.embed_tokens = nn.Embedding(*weight.shape, _weight=weight)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, lm_head=config.vocab_size)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self, length, width, config=None):
        """A KV cache of zeros for `length` positions and steps of `width` rows, for these layers or
        those of an adapter's `config`."""
        return KVCache.zeros(config or self.config, length, width, self.norm.weight)

    def embed(self, ids):
        """Token ids, a list or a tensor (T,), -> (1, T, hidden_size)."""
        if not torch.is_tensor(ids):
            ids = to_device(torch.tensor(ids, dtype=torch.long), self.embed_tokens.weight.device)
        return self.embed_tokens(ids)[None]

    def run_layers(self, x, positions, cache, first, last):
        """Layers first … last − 1 on x (B, T, hidden_size) at positions (T,). Without a cache the
        rows see one another only."""
        rows = Rows.at(self.config, positions, x, cache)
        x = x.clone()  # on a GPU the layers add to it in place: support/packing.py
        for i in range(first, last):
            x = self.layers[i](x, rows, cache, i)
        return x

    def step(self, x, start, cache, first, last, parents=None):
        """Layers first … last − 1 on a decode step, as `one_shape` has it.

        x: states (1, T, hidden_size), or ids, a list or (T,). Returns (1, width, hidden_size).
        """
        if not torch.is_tensor(x) or x.dim() == 1:
            x = self.embed(x)
        return self.run_layers(*one_shape(x, start, cache, parents), first, last)

    def logits(self, x):
        """States after the last layer (…, hidden_size) -> (…, vocab_size), in the model's dtype."""
        return self.lm_head(self.norm(x))

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, vocab_size), without a cache."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.run_layers(self.embed_tokens(ids), positions, None, 0, len(self.layers))
        return self.logits(x)


# --------------------------------------------------------------------------------------------------
# Sampling

@lru_cache(maxsize=32)  # drafter and verifier ask for the same
def gumbel_noise(seed, position, vocab_size, device):
    """Gumbel noise (vocab_size,) float32 of one position, finite at both ends.

    It comes from the CPU, so that it is the same on every device.
    """
    key = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=4).digest()  # 32 bits
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    # Multiples of 2⁻⁵³, below 1, and above 0 once clamped. In float32 some would round to 1.
    u = torch.rand(vocab_size, generator=generator, dtype=torch.float64).clamp_(min=2 ** -54)
    # −log(1 − u) has full precision where it is small, where the winners are.
    return to_device(-(-torch.log1p(-u)).log().float(), device)


class Sampler:
    """Chooses tokens from logits. temperature 0 is greedy; top_k 0 and top_p 1 keep every token.

    The token at position t is argmax(log p + Gumbel noise of t): a sample from p (Gumbel-max), made
    from noise that is a function of (seed, t) alone. A drafter that uses the same noise tends to
    choose the same token, and a verifier need only compare. Ties go to the lowest id.
    """

    def __init__(self, temperature=0.0, top_k=0, top_p=1.0, seed=0):
        check_sampling(temperature, top_k, top_p)
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed

    def noise(self, position, vocab_size, device):
        return gumbel_noise(self.seed, position, vocab_size, device)

    def scores(self, logits):
        """logits (…, V) -> float32 (…, V): log p + a constant, −inf for what is excluded.

        top_k keeps exactly k tokens; top_p the fewest likeliest ones whose total reaches it, at
        least one.
        """
        scores, V = logits.float() / self.temperature, logits.shape[-1]
        if 0 < self.top_k < V:
            least = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(~largest(scores, least, self.top_k), -math.inf)
        if self.top_p < 1:
            probs = scores.softmax(-1)
            # Non-negative floats sort like their bits, and PyTorch sorts integers faster on a CPU.
            ascending = probs.view(torch.int32).sort().values.view(torch.float32)
            mass, limit = ascending, 1 - self.top_p
            if probs.is_cuda:  # it adds up in any order, on which sums of integers do not depend
                mass, limit = (ascending.double() * 2 ** 52).long(), int(limit * 2 ** 52)
            cut = (mass.cumsum(-1) <= limit).sum(-1, keepdim=True).clamp(max=V - 1)
            least = ascending.gather(-1, cut)
            scores = scores.masked_fill(~largest(probs, least, V - cut), -math.inf)
        return scores

    def perturbed(self, logits, position, depth=None):
        """What the choice is the argmax of, from the logits (T, V) of rows.

        Their next tokens stand at position + depth[i] (None: + i). Rows go one by one: a reduction
        over several rows may add up in another order than over one.
        """
        if self.temperature == 0:
            return logits
        return torch.stack([self.scores(row) + self.noise(position + i, len(row), row.device)
                            for i, row in zip(depth or count(), logits)])

    def choose(self, logits, position, depth=None):
        """The token of each row: ids (T,), on the device."""
        # max takes the first of equals, and is faster than argmax on a CPU.
        return self.perturbed(logits, position, depth).max(-1).indices

    def judge(self, logits, position, depth=None):
        """The token of each row, and whether all its logits are finite: (2, T), on the device."""
        finite = logits.abs().amax(-1) < math.inf  # NaN is not, and amax passes it on
        return torch.stack((self.choose(logits, position, depth), finite))

    def draw(self, logits, position, depth=None, k=1):
        """What a drafter proposes from the logits (T, V) of rows: of each up to k pairs of a token
        and how sure the drafter is, the likeliest first. Host syncs: one."""
        return self.fetch(self.candidates(logits, position, depth, k))

    def candidates(self, logits, position, depth=None, k=1):
        """What `draw` gives, on the device: (T, k, 2) float64, which holds an id exactly.

        The ids are those that come nearest to being chosen, the chosen one first, or −1 for what
        top-k and top-p exclude. The numbers are the k highest probabilities at this temperature.
        """
        scaled = logits.float() / self.temperature if self.temperature else logits
        probabilities = scaled.softmax(-1, dtype=torch.float32)
        if k == 1:
            tokens = self.choose(logits, position, depth)[:, None]
            sure = probabilities.max(-1, keepdim=True).values
        else:
            k = min(k, logits.shape[1])
            best = self.perturbed(logits, position, depth).topk(k)
            tokens = best.indices.masked_fill(best.values == -math.inf, -1)
            sure = probabilities.topk(k).values
        return torch.stack((tokens.double(), sure.double()), -1)

    def fetch(self, candidates):
        """What `candidates` gives, as lists of pairs on the host."""
        return [[(int(token), p) for token, p in row if token >= 0]
                for row in candidates.tolist()]


def largest(values, least, n):
    """Which of values (…, V) are the n largest, the least of them given; of equals the first."""
    equal, more = values == least, values > least
    return more | equal & (equal.cumsum(-1) <= n - more.sum(-1, keepdim=True))


# --------------------------------------------------------------------------------------------------
# The oracle

@torch.inference_mode()
def generate_naive(model, prompt, max_new_tokens, sampler, eos=()):
    """Decoding without a cache: the definition of the right tokens, up to rounding."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids], device=model.embed_tokens.weight.device))[0, -1:]
        ids.append(sampler.choose(logits, len(ids)).item())
        if ids[-1] in eos:
            break
    return ids[len(prompt):]
