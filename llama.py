"""A Llama on token ids: configuration, KV cache, forward pass, sampling, and two references.

What is special here serves one promise of `kangaroo.py`: speculative decoding gives the bits of
vanilla decoding.

- **Positions are explicit.** A KV cache does not know how many of its rows are filled. The caller
  says at which positions it writes; a rejected token's rows are simply overwritten by the next
  ones. So the layers can be run in pieces, and rolled back by doing nothing.
- **One shape.** Every decode step computes the same number of rows against a view of the cache
  whose length depends on the position alone (`one_shape`). The same kernels then add up in the same
  order, whether 1 row is live or 6, provided that a kernel treats its rows alike: `rows_are_alike`
  checks it.
- **One order.** A node of a tree lies at another row of the cache than vanilla decoding's token
  would, but its row adds up keys and values in the order of positions, as vanilla does
  (`attend_in_order`).
- **One noise.** The random numbers that choose the token at position t depend on (seed, t) alone
  (`Sampler`).

Left out on purpose: files (`support/checkpoint.py`), text (`support/tokenizer.py`), batched
decoding, quantisation, other architectures. Names are Hugging Face's. Follows transformers'
modeling_llama.py for the arithmetic and gpt-fast for a cache that is addressed by position. Next:
`train_adapter.py`.
"""
import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import NamedTuple

from support.errors import UserError

import torch
import torch.nn as nn
import torch.nn.functional as F


def pinned(data, device):
    """A list or a CPU tensor as a CPU tensor that is copied to `device` without waiting.

    A copy from memory that is not pinned may wait for all that a GPU has queued.
    """
    data = data if torch.is_tensor(data) else torch.tensor(data)
    return data.pin_memory() if device.type == "cuda" else data


def to_device(data, device):
    """A list or a CPU tensor as a tensor on `device`."""
    return pinned(data, device).to(device, non_blocking=True)


@dataclass(frozen=True)
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
    BLOCK = {"cpu": 64, "cuda": 256}  # a view grows by so many positions

    def __init__(self, rows, length, layers=None):
        self.rows = rows      # (2, layers, 1, positions, kv_heads, head_dim), keys and values
        self.length = length  # how many positions are in view
        self.layers = layers or list(rows.unbind(1))  # the same, a layer each
        self.slots = self.columns = None  # set by one_shape: slots for trees, columns if width > 8

    @classmethod
    def zeros(cls, config, n_layers, length, like):
        """Room for `length` positions, in whole blocks, with the dtype and device of `like`."""
        length = cls.in_view(length, like.device)
        shape = 2, n_layers, 1, length, config.num_key_value_heads, config.head_dim
        return cls(like.new_zeros(shape), length)

    @classmethod
    def in_view(cls, end, device):
        """How many positions the blocks have that cover positions 0 … end − 1."""
        block = cls.BLOCK[device.type]
        return -(-end // block) * block

    def view(self, end):
        """The blocks that cover positions 0 … end − 1, sharing memory.

        Attention costs what is in view, not what there is room for.
        """
        return KVCache(self.rows, self.in_view(end, self.rows.device), self.layers)

    def keep(self, start, path):
        """After a step whose node i stands at row start + i: move the rows of the nodes `path` to
        start + 1, start + 2, … In a chain they are there already."""
        if path != list(range(1, len(path) + 1)):
            moved = to_device([start + node for node in path], self.rows.device)
            self.rows[:, :, :, start + 1:start + 1 + len(path)] = self.rows[:, :, :, moved]


CHAIN_WIDTH = 8  # steps of at most so many rows hold a chain, and use PyTorch's fused attention
MAX_WIDTH = 64   # a step of more rows might not fit in a block of the cache


def one_shape(x, start, cache, width, parents=None):
    """A decode step's (x, positions, cache) for `run_layers`: `width` rows, a view of the cache.

    x (1, T ≤ width, d) are the live rows, from position `start` on. A product of 1 row and one of 5
    rows may run different kernels, add up in different orders and round differently. So every step
    has `width` rows and a view set by `start`; the dead rows are zeros. What they write lies beyond
    the live rows, where no live row sees it and the next step overwrites it.

    With `parents` the rows are the last T nodes of a tree: node 0 is its root, at position `start`;
    parents[i − 1] < i is the parent of node i. Node i lies at row start + i of the cache, its slot,
    and stands at position start + its depth. The view of the cache then says for each row which
    slot holds which position on the row's path (`columns`).
    """
    # The first row's node: x may hold only the newest nodes of the tree.
    first = 0 if parents is None else 1 + len(parents) - x.shape[1]
    slots = torch.arange(first, first + width, device=x.device) + start
    x, view = F.pad(x, (0, 0, 0, width - x.shape[1])), cache.view(start + width)
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


def room_for_draft(start, width, device):
    """How many tokens a draft behind position `start` may have, 0 … width − 1.

    Each row must see the view that it would have alone. A step at `start` sees the blocks that hold
    start + width positions, so a draft ends before one of its rows would need another block.
    """
    return min(width - 1, -(start + width) % KVCache.BLOCK[device.type])


# --------------------------------------------------------------------------------------------------
# The model

class Linear(nn.Module):
    """y = x Wᵀ, no bias.

    `parts` names the projections stacked in W and their rows: one product instead of three.
    """

    def __init__(self, in_features, **parts):
        super().__init__()
        self.parts, self.packed = parts, None
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), in_features))

    def forward(self, x):
        if self.packed is None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")

    def pack(self, rows):
        """Replace the weight by oneDNN's blocked copy, made for products of `rows` rows.

        After this there is no training.
        """
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)
        self.weight = None


# Whether F.rms_norm is one kernel on a GPU. In older releases it is eight.
FUSED_NORM = hasattr(torch.ops.aten, "_fused_rms_norm_backward")


def rms_norm(x, weight, eps):
    """x (…, d) by its root mean square, times weight (d,)."""
    if x.is_cuda and FUSED_NORM:
        return F.rms_norm(x, weight.shape, weight, eps)
    # The variance of (x, −x) is the mean square of x. layer_norm is one kernel where F.rms_norm is
    # ten on a CPU, and at decode size the cost is the number of kernels, not their work.
    both = F.layer_norm(torch.cat((x, -x), dim=-1), (2 * len(weight),), eps=eps)
    return both[..., :len(weight)] * weight


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


@lru_cache(maxsize=None)  # noqa: UP033 — kept for ever: a CUDA graph may hold its address
def inverse_frequencies(config, device):
    """RoPE's angle per position, (head_dim / 2,) float32; see transformers' modeling_rope_utils."""
    inv_freq = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    inv_freq = 1.0 / config.rope_theta ** inv_freq
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


class Rows(NamedTuple):
    """What all layers of a pass share about its T rows."""
    slots: torch.Tensor    # (T,) where keys and values are written
    cos: torch.Tensor      # (T, 1, head_dim)
    sin: torch.Tensor      # (T, 1, head_dim), the first half negated
    mask: torch.Tensor     # (T, S): 0 where a row sees a position, else −inf; None: causal.
    #                        On a GPU (G T, S), once for each head of a group: attend_by_group
    columns: torch.Tensor  # (T, S): the slot that holds a position; None: slots are positions

    @classmethod
    def at(cls, config, positions, x, cache):
        angle = positions[:, None].float() * inverse_frequencies(config, positions.device)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        slots, mask, columns = positions, None, None
        if cache is not None:
            slots, columns = positions if cache.slots is None else cache.slots, cache.columns
            unseen = torch.arange(cache.length, device=positions.device) > positions[:, None]
            mask = torch.zeros_like(unseen, dtype=x.dtype).masked_fill_(unseen, -math.inf)
            if x.is_cuda and columns is None:
                mask = mask.repeat(config.num_attention_heads // config.num_key_value_heads, 1)
                mask[:, -CHUNK:][:, 0].clamp_(min=-30000)  # see attend_by_chunk
        cos, sin = torch.cat((cos, cos), -1).to(x.dtype), torch.cat((-sin, sin), -1).to(x.dtype)
        return cls(slots, cos, sin, mask, columns)


def rotate(x, cos, sin):
    """RoPE on x (B, T, heads, head_dim): pairs (i, i + head_dim / 2) turn by the row's angle."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_all(qkv, heads, cos, sin):
    """The parts q, k, v of qkv (B, T, heads + 2 kv_heads, head_dim), q and k with RoPE."""
    both = (heads + qkv.shape[2]) // 2
    qk = rotate(qkv[:, :, :both], cos, sin)
    return qk[:, :, :heads], qk[:, :, heads:], qkv[:, :, both:]


def rotate_and_write(qkv, heads, cos, sin, slots, layer):
    """The same, but k and v go to the rows slots (T,) of a layer's cache (2, B, S, kv_heads,
    head_dim); returns q.

    In one write: of two to one memory torch.compile in PyTorch 2.6 makes copies of the whole cache.
    """
    q, *kv = rotate_all(qkv, heads, cos, sin)
    layer.index_copy_(2, slots, torch.stack(kv))
    return q


def attend(q, k, v, rows):
    """softmax(q kᵀ / √D) v for q (B, T, H, D) over the rows of k, v (B, S, K, D) that each sees."""
    if q.is_cuda and rows.mask is not None:
        return attend_by_group(q, k, v, rows)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rows.mask,
        is_causal=rows.mask is None, enable_gqa=q.shape[2] != k.shape[2])
    return y.transpose(1, 2)  # (B, T, H, D)


def attend_by_group(q, k, v, rows):
    """The same for kernels that know no groups: the heads of a group become rows of one head."""
    (B, T, H, D), K = q.shape, k.shape[2]
    q = q.view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)  # (B, K, G T, D)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if B == 1 and T <= MAX_WIDTH and k.shape[2] >= LONG and D % 8 == 0:
        y = attend_by_chunk(q, k, v, rows.mask)
    else:
        y = F.scaled_dot_product_attention(q, k, v, rows.mask)
    return y.unflatten(2, (H // K, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


CHUNK, LONG = 256, 1024  # keys of a chunk; views of so many positions and more go by chunks


def attend_by_chunk(q, k, v, mask):
    """The same for q (1, K, R, D) over k, v (1, K, S, D): attention to chunks of the keys, merged.

    A kernel that goes through the keys one after another keeps as many multiprocessors of a GPU
    busy as there are heads. With the chunks as a batch it is as many times more as there are
    chunks. Each has a softmax of its own; their shares in the whole are exp of its logsumexp, in
    float32. (Plain products would round bfloat16 scores; the kernel keeps them in float32.) A
    softmax over nothing is NaN. So in the last chunk, which may lie wholly behind a row, the row
    sees the first key, with a share that rounds to 0. (This step has written that key.)
    """
    K, R = q.shape[1:3]
    k, v = (x[0].unflatten(1, (-1, CHUNK)).transpose(0, 1) for x in (k, v))  # (N, K, CHUNK, D)
    q, mask = q.expand(len(k), -1, -1, -1), mask.unflatten(1, (-1, CHUNK)).transpose(0, 1)
    mask = mask[:, None].expand(-1, K, -1, -1)  # (N, K, R, CHUNK)
    if q.is_cuda:  # the kernels behind F.scaled_dot_product_attention, which keeps the logsumexp
        attention = torch.ops.aten._scaled_dot_product_efficient_attention
        y, logsumexp, *_ = attention(q, k, v, mask, compute_log_sumexp=True)
    else:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y, logsumexp = attention(q, k, v, attn_mask=mask)
    share = logsumexp[..., :R].softmax(0)  # the kernel pads the rows
    return (share[..., None] * y).sum(0, keepdim=True).to(q.dtype)


def silu_and_multiply(gate_up):
    """gate_up (…, 2 n), gate and up side by side -> (…, n)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def attend_in_order(q, k, v, rows):
    """Attention in which each row adds up in order of position, wherever its keys lie.

    q (1, T, H, D) are T nodes, k and v (1, S, K, D) the slots in view; returns (1, T, H, D).

    Floating-point sums depend on the order of their terms. The scores are one product with the
    slots as they lie, then put in order by row. Only the step's own slots can be out of order, and
    they lie within the last BLOCK + T of the view: these values are gathered by row, all before are
    one product. Vanilla decoding at a width above 8 does the same, with slots that are positions.
    """
    (_, T, H, D), (_, S, K, _) = q.shape, k.shape
    shared = max(0, S - KVCache.BLOCK[k.device.type] - T)
    # (K, T, G, D): the G heads of a group share keys and values.
    q = (q * D ** -0.5).view(T, K, H // K, D).transpose(0, 1)
    scores = (q.reshape(K, -1, D) @ k[0].permute(1, 2, 0)).view(K, T, -1, S)
    scores = scores.gather(3, rows.columns[None, :, None].expand_as(scores)) + rows.mask[:, None]
    p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    y = p[..., shared:] @ v[0][rows.columns[:, shared:]].permute(2, 0, 1, 3)  # (K, T, G, D)
    if shared:
        y = y + (p[..., :shared].reshape(K, -1, shared) @ v[0, :shared].transpose(0, 1)).view_as(y)
    return y.transpose(0, 1).reshape(1, T, H, D)


class Attention(nn.Module):
    """Causal grouped-query self-attention with RoPE, of the target's layers and of the adapter."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, q_proj=q, k_proj=kv, v_proj=kv)
        self.o_proj = Linear(q, o_proj=config.hidden_size)

    def forward(self, x, rows, cache=None, layer=0):
        qkv = self.qkv_proj(x).unflatten(2, (-1, self.head_dim))  # (B, T, H + 2 K, D)
        if cache is None:
            q, k, v = rotate_all(qkv, self.heads, rows.cos, rows.sin)
        else:
            both = cache.layers[layer]
            q = rotate_and_write(qkv, self.heads, rows.cos, rows.sin, rows.slots, both)
            k, v = both[:, :, :cache.length]  # (1, S, K, D)
        y = attend(q, k, v, rows) if rows.columns is None else attend_in_order(q, k, v, rows)
        return self.o_proj(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(hidden, gate_proj=inner, up_proj=inner)
        self.down_proj = Linear(inner, down_proj=hidden)

    def forward(self, x):
        return self.down_proj(silu_and_multiply(self.gate_up_proj(x)))


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
        self.fingerprint = self.former_fingerprint = None  # see support/checkpoint.py
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, lm_head=config.vocab_size)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self, length, config=None):
        """A KV cache of zeros for `length` positions, for these layers or an adapter's `config`."""
        config = config or self.config
        return KVCache.zeros(config, config.num_hidden_layers, length, self.norm.weight)

    def embed(self, ids):
        """Token ids, a list or a tensor (T,), -> (1, T, hidden_size)."""
        if not torch.is_tensor(ids):
            ids = to_device(torch.tensor(ids, dtype=torch.long), self.embed_tokens.weight.device)
        return self.embed_tokens(ids)[None]

    def run_layers(self, x, positions, cache, first, last):
        """Layers first … last − 1 on x (B, T, hidden_size) at positions (T,).

        Without a cache the rows see one another only.
        """
        rows = Rows.at(self.config, positions, x, cache)
        for i in range(first, last):
            x = self.layers[i](x, rows, cache, i)
        return x

    def step(self, x, start, cache, width, first, last, parents=None):
        """Layers first … last − 1 on a decode step, as `one_shape` has it.

        x: states (1, T, hidden_size), or ids, a list or (T,). Returns (1, width, hidden_size).
        """
        if not torch.is_tensor(x) or x.dim() == 1:
            x = self.embed(x)
        return self.run_layers(*one_shape(x, start, cache, width, parents), first, last)

    def logits(self, x):
        """States after the last layer (…, hidden_size) -> (…, vocab_size), in the model's dtype."""
        return self.lm_head(self.norm(x))

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, vocab_size), without a cache."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.run_layers(self.embed_tokens(ids), positions, None, 0, len(self.layers))
        return self.logits(x)


def build(cls, config, device, dtype):
    """A module without weights: shapes first, then memory on `device` that is not initialised."""
    with torch.device("meta"):
        module = cls(config).to(dtype)
    module = module.to_empty(device=device).requires_grad_(False)
    if isinstance(module, Llama):
        module.tie()  # moving off the meta device gave each name memory of its own
    return module


def pack(module, rows):
    """On a CPU, keep weights in oneDNN's blocked layout for products of `rows` rows.

    Reading them is then about 1.7 times as fast. Changes nothing where the operator or the dtype is
    not supported. A tied LM head becomes a copy of the embedding.
    """
    ops, weight = torch.ops.mkldnn, next(module.parameters())
    try:
        fast = weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and (
            weight.dtype == torch.float32
            or weight.dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported()
            or weight.dtype == torch.float16 and ops._is_mkldnn_fp16_supported())
        for linear in [m for m in module.modules() if isinstance(m, Linear)] if fast else []:
            linear.pack(rows)
    except (AttributeError, RuntimeError, NotImplementedError):
        pass  # an operator of this PyTorch is missing: plain products are right, only slower
    return module


# --------------------------------------------------------------------------------------------------
# Sampling

class Sampler:
    """Chooses tokens from logits. temperature 0 is greedy; top_k 0 and top_p 1 keep every token.

    The token at position t is argmax(log p + Gumbel noise of t): a sample from p (Gumbel-max), made
    from noise that is a function of (seed, t) alone. A drafter that uses the same noise tends to
    choose the same token, and a verifier need only compare. Noise comes from the CPU, so that it is
    the same on every device. Ties go to the lowest id.
    """

    def __init__(self, temperature=0.0, top_k=0, top_p=1.0, seed=0):
        for flag, value, fits, want in (
                ("temperature", temperature, temperature == 0 or 1e-6 <= temperature < math.inf,
                 "0 (greedy) or from 1e-6 on"),
                ("top-k", top_k, top_k >= 0, "at least 0 (0: off)"),
                ("top-p", top_p, 0 < top_p <= 1, "in (0, 1]")):
            if not fits:
                raise UserError(f"--{flag} {value}: must be {want}")
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed
        self.noise = lru_cache(maxsize=64)(self.make_noise)  # drafter and verifier ask for the same

    def make_noise(self, position, vocab_size, device):
        """Gumbel noise (vocab_size,) float32 of one position, finite at both ends."""
        # The generator takes 32 bits of a seed.
        key = hashlib.blake2b(f"{self.seed} {position}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        # Multiples of 2⁻⁵³, below 1, and above 0 once clamped. In float32 some would round to 1.
        u = torch.rand(vocab_size, generator=generator, dtype=torch.float64).clamp_(min=2 ** -54)
        # −log(1 − u) has full precision where it is small, where the winners are.
        return to_device(-(-torch.log1p(-u)).log().float(), device)

    def scores(self, logits):
        """logits (V,) -> float32 (V,): log p + a constant, −inf for what is excluded.

        top_k keeps exactly k tokens; top_p the fewest likeliest ones whose total reaches it, at
        least one.
        """
        scores = logits.float() / self.temperature
        if 0 < self.top_k < len(scores):
            least = scores.topk(self.top_k).values[-1]
            scores = scores.masked_fill(~largest(scores, least, self.top_k), -math.inf)
        if self.top_p < 1:
            probs = scores.softmax(-1)
            # Non-negative floats sort like their bits, and PyTorch sorts integers faster on a CPU.
            ascending = probs.view(torch.int32).sort().values.view(torch.float32)
            mass, limit = ascending, 1 - self.top_p
            if probs.is_cuda:  # it adds up in any order, on which sums of integers do not depend
                mass, limit = (ascending.double() * 2 ** 52).long(), int(limit * 2 ** 52)
            cut = (mass.cumsum(-1) <= limit).sum().clamp(max=len(probs) - 1)
            least = ascending.gather(0, cut[None])
            scores = scores.masked_fill(~largest(probs, least, len(probs) - cut), -math.inf)
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

    def candidates(self, logits, position, depth, k):
        """The k tokens that come nearest to being chosen, the chosen one first: ids (T, k).

        −1 stands for those that top-k and top-p exclude.
        """
        if k == 1:
            return self.choose(logits, position, depth)[:, None]
        best = self.perturbed(logits, position, depth).topk(k)
        return best.indices.masked_fill(best.values == -math.inf, -1)


def largest(values, least, n):
    """Which of values (V,) are the n largest, the least of which is given; of equals the first."""
    equal = values == least
    more = values > least
    return more | equal & (equal.cumsum(-1) <= n - more.sum())


# --------------------------------------------------------------------------------------------------
# Two references: the oracle and the assumption

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


@torch.inference_mode()
def rows_are_alike(model, width, start=None):
    """Does this device treat the rows of a step alike, so that one shape means one result?

    `width` tokens run as one step and one by one; logits and cache must be equal bit for bit. At a
    width for trees, once more as two branches whose nodes alternate. Two layers and the LM head
    suffice, because all layers have the same shapes and so run the same kernels. Costs at most 1.5
    × width + 2 steps of two layers; on a GPU, where attention may run another kernel over a long
    view than over a short one, twice that.
    """
    device = model.norm.weight.device
    if start is None:
        block = KVCache.BLOCK[device.type]
        first = (1 - width) % block  # from here on there is room for a whole draft
        starts = (first, first + 8 * block) if device.type == "cuda" else (first,)
        return all(rows_are_alike(model, width, start) for start in starts)
    depth = min(2, len(model.layers))
    generator = torch.Generator().manual_seed(0)
    assert room_for_draft(start, width, device) == width - 1
    seen = torch.randn(2, depth, 1, start + 2 * width, model.config.num_key_value_heads,
                       model.config.head_dim, generator=generator)
    x = model.embed(torch.randint(model.config.vocab_size, (width,), generator=generator).tolist())

    def step(x, start, cache, parents=None):
        return model.logits(model.step(x, start, cache, width, 0, depth, parents))[0]

    chain, branches = list(range(width - 1)), [max(0, node - 1) for node in range(width - 1)]
    for parents in (chain, branches) if width > CHAIN_WIDTH else (chain,):
        path = [width - 1]
        while path[0]:
            path.insert(0, parents[path[0] - 1])
        end, found = start + len(path), []
        for together in (True, False):
            cache = model.new_cache(start + 2 * width)  # one at a time: with graphs it is recorded
            cache.rows[:, :depth, :, :seen.shape[3]] = seen.to(device)
            if together:
                logits = step(x, start, cache, parents)[path]
                cache.keep(start, path[1:])
            else:
                logits = torch.stack([step(x[:, node:node + 1], start + i, cache)[0]
                                      for i, node in enumerate(path)])
            found.append((logits, cache.rows[:, :depth, :, :end].clone()))
            del cache
        if not all(map(torch.equal, *found)):
            return False
    return True


def find_nonfinite(model, ids):
    """Where NaN or infinity first appears in a pass over ids, in words."""
    x, positions = model.embed(ids), torch.arange(len(ids), device=model.norm.weight.device)
    # With a cache, because attention without a mask turns NaN scores into zeros on a CPU.
    cache = KVCache.zeros(model.config, len(model.layers), len(ids), x)
    where = ["the embedding"] + [f"layer {i}" for i in range(len(model.layers))]
    for i, name in enumerate(where):
        x = model.run_layers(x, positions, cache, i - 1, i) if i else x
        if not x.isfinite().all():
            return name
    return "the final norm or the LM head"
