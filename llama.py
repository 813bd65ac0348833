"""A Llama on token ids: configuration, KV cache, forward pass, weights, sampling.

What is special here serves one promise of `kangaroo.py`, that speculative decoding gives the bits of vanilla decoding:

- **Positions are explicit.** A KV cache has no length. The caller says at which positions it writes; a rejected token's
  rows are simply overwritten by the next ones. So the layers can be run in pieces, and rolled back by doing nothing.
- **One shape.** Every decode step computes the same number of rows against a view of the cache whose length depends on
  the position alone (`one_shape`). The same kernels then add up in the same order, whether 1 row is live or 6.
- **One order.** A node of a tree lies at another row of the cache than vanilla decoding's token would, but its row adds up
  keys and values in the order of positions, as vanilla does (`attend_in_order`).
- **One noise.** The random numbers that choose the token at position t depend on (seed, t) alone (`Sampler`).

Left out on purpose: text (`tokenizer.py`), batched decoding, quantisation, other architectures. Names are Hugging Face's.
Follows transformers' modeling_llama.py for the arithmetic and gpt-fast for the cache without a length. Read `kangaroo.py`
next.
"""
import ctypes
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, TensorSpec, safe_open, serialize


class UserError(Exception):
    """Something the user can put right; the message names the file, field or flag and what would be right."""


def to_device(data, device):
    """A list or a CPU tensor as a tensor on `device`. Pinned memory lets the host go on; else it may wait for the whole queue."""
    data = data if torch.is_tensor(data) else torch.tensor(data)
    return (data.pin_memory() if device.type == "cuda" else data).to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration

def read_json(path):
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a JSON {type(data).__name__}, an object is needed")
    return data


# What the code below does, in config.json's words. Any other value would give wrong tokens silently, so it is refused.
IMPLEMENTED = {
    "model_type": ("llama", "mistral"), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
    "sliding_window": (None,), "quantization_config": (None,), "partial_rotary_factor": (None, 1.0),
}
ROPE_FIELDS = {"default": (), "linear": ("factor",), "llama3": (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama. Field names and defaults are those of Hugging Face's config.json."""
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
    rope_scaling: tuple = ()  # the values of ROPE_FIELDS[rope_type]
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple = ()

    @classmethod
    def load(cls, folder):
        """Read folder/config.json (and the end-of-sequence ids of generation_config.json); UserError if not a Llama."""
        path = Path(folder) / "config.json"
        data = {"model_type": "(missing)"} | read_json(path)

        def number(name, default=None, kind=int, source=data):
            value = source.get(name)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < math.inf:
                raise UserError(f"{path}: {name} = {value!r}, must be a positive {kind.__name__}")
            return kind(value)

        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        for name, values in IMPLEMENTED.items():
            value = data.get(name, rope.get(name, values[0]) if isinstance(rope, dict) else values[0])
            if value not in values:
                raise UserError(f"{path}: {name} = {value!r} is not implemented, only {' or '.join(map(repr, values))}")
        rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if not isinstance(rope, dict) or not isinstance(rope_type, str) or rope_type not in ROPE_FIELDS:
            raise UserError(f"{path}: rope_scaling of type {rope_type!r} is not implemented, only {', '.join(ROPE_FIELDS)}")
        heads, hidden_size = number("num_attention_heads"), number("hidden_size")
        config = cls(
            hidden_size, number("intermediate_size"), number("num_hidden_layers"), heads,
            number("num_key_value_heads", heads), number("head_dim", hidden_size // heads), number("vocab_size"),
            number("max_position_embeddings", 2048), number("rms_norm_eps", 1e-6, float),
            number("rope_theta", 10000.0, float, rope if "rope_theta" in rope else data), rope_type,
            tuple(number(name, kind=float, source=rope) for name in ROPE_FIELDS[rope_type]),
            data.get("tie_word_embeddings") or False, data.get("bos_token_id"))
        if rope_type == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise UserError(f"{path}: low_freq_factor = {rope['low_freq_factor']} must be below "
                            f"high_freq_factor = {rope['high_freq_factor']}")
        if not isinstance(config.tie_word_embeddings, bool):
            raise UserError(f"{path}: tie_word_embeddings = {config.tie_word_embeddings!r}, must be true or false")
        if config.bos_token_id is not None and config.bos_token_id not in range(config.vocab_size):
            raise UserError(f"{path}: bos_token_id = {config.bos_token_id!r}, must be below vocab_size = {config.vocab_size}")
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(f"{path}: num_attention_heads = {heads} is no multiple of "
                            f"num_key_value_heads = {config.num_key_value_heads}")
        if config.head_dim % 2:
            raise UserError(f"{path}: head_dim = {config.head_dim} must be even")
        generation, eos = Path(folder) / "generation_config.json", set()
        for file, source in ((path, data), (generation, read_json(generation) if generation.exists() else {})):
            ids = source.get("eos_token_id")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if not all(isinstance(i, int) for i in ids):
                raise UserError(f"{file}: eos_token_id = {ids!r}, must be an integer or a list of integers")
            eos |= set(ids)
        object.__setattr__(config, "eos_token_ids", tuple(sorted(eos)))
        return config

    def as_json(self):
        """The config.json, as a dict, that `load` reads this from."""
        data = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False} | asdict(self)
        rope_type, values, eos = data.pop("rope_type"), data.pop("rope_scaling"), data.pop("eos_token_ids")
        if rope_type != "default":
            data["rope_scaling"] = {"rope_type": rope_type} | dict(zip(ROPE_FIELDS[rope_type], values))
        return data | {"eos_token_id": list(eos)}


# ---------------------------------------------------------------------------------------------------------------------
# KV cache and the one shape

class KVCache:
    """Keys and values, for each layer (1, positions, kv_heads, head_dim): row p belongs to position p, whoever wrote it.

    It has no length: positions say what is written and, through the mask, what is seen. It starts as zeros because a
    masked row still enters a product as 0 × row, and 0 × NaN is NaN. Position comes before the heads, so that neither the
    strides nor the bits of a view depend on how much memory lies behind it.
    """
    BLOCK = 64  # a view grows by this many positions

    def __init__(self, rows, length, by_layer=None):
        self.rows, self.length = rows, length  # rows (2, layers, 1, positions, kv_heads, head_dim); length: of the view
        self.k, self.v = by_layer or (list(rows[0]), list(rows[1]))
        self.slots = self.columns = None  # of a view for a tree: see one_shape

    @classmethod
    def zeros(cls, config, n_layers, length, like):
        """Room for `length` positions, rounded up to whole blocks, with the dtype and device of the tensor `like`."""
        length = -(-length // cls.BLOCK) * cls.BLOCK
        return cls(like.new_zeros(2, n_layers, 1, length, config.num_key_value_heads, config.head_dim), length)

    def view(self, end):
        """The blocks that cover positions 0 … end − 1, sharing memory. Attention costs what is in view, not the room."""
        return KVCache(self.rows, -(-end // self.BLOCK) * self.BLOCK, (self.k, self.v))

    def keep(self, start, path):
        """After a step whose node i stands at row start + i: move the rows of the nodes `path` to start + 1, start + 2, …"""
        if path != list(range(1, len(path) + 1)):  # a chain's are there already
            kept = self.rows[:, :, :, to_device([start + node for node in path], self.rows.device)]  # one copy for all layers
            self.rows[:, :, :, start + 1:start + 1 + len(path)] = kept

    def update(self, layer, slots, k, v):
        """Write k, v (1, T, kv_heads, head_dim) at the rows slots (T,); return the rows in view (1, S, kv_heads, head_dim)."""
        self.k[layer].index_copy_(1, slots, k)
        self.v[layer].index_copy_(1, slots, v)
        return self.k[layer][:, :self.length], self.v[layer][:, :self.length]


CHAIN_WIDTH = 8  # steps of at most so many rows hold a chain only, and use PyTorch's fused attention


def one_shape(x, start, cache, width, parents=None):
    """The arguments (x, positions, cache) of a decode step of exactly `width` rows, of which x (1, T ≤ width, d) are live.

    A product of 1 row and one of 5 rows may run different kernels, add up in different orders and round differently. So
    every step has `width` rows and a view set by `start`; the dead rows are zeros. What they write to the cache lies
    beyond the live rows, where no live row sees it and the next step overwrites it.

    With `parents` the rows are the last T nodes of a tree: node 0 is its root, at position `start`; parents[i − 1] < i is
    the parent of node i. Node i lies at row start + i of the cache, its slot, and stands at position start + its depth.
    The view of the cache then says for each row which slot holds which position on the row's path (`columns`).
    """
    first = 0 if parents is None else 1 + len(parents) - x.shape[1]
    slots, x = torch.arange(start + first, start + first + width, device=x.device), F.pad(x, (0, 0, 0, width - x.shape[1]))
    chain, view = parents is None or parents == list(range(len(parents))), cache.view(start + width)
    if width > CHAIN_WIDTH:
        view.columns = torch.arange(view.length, device=x.device).repeat(width, 1)
    if chain:  # slots and positions are the same
        return x, slots, view
    assert width > CHAIN_WIDTH, f"a tree needs a width above {CHAIN_WIDTH}"
    paths = [[0]]
    for node, parent in enumerate(parents, 1):
        paths.append([*paths[parent], node])
    live = [path + list(range(len(path), width)) for path in paths[first:]]  # what follows a node's depth is masked
    view.columns[:len(live), start:start + width] = to_device(live, x.device) + start
    depth = [len(path) - 1 for path in paths[first:]] + [0] * (width - len(live))
    view.slots = slots
    return x, to_device(depth, x.device) + start, view


def room_for_draft(start, width):
    """How many tokens may follow position `start` in one step so that each row has the view it would have alone."""
    return min(width - 1, -(start + width) % KVCache.BLOCK)


# ---------------------------------------------------------------------------------------------------------------------
# The model

class Linear(nn.Module):
    """y = x Wᵀ, no bias. `parts` names the projections stacked in W and their rows: one product instead of two or three."""

    def __init__(self, in_features, **parts):
        super().__init__()
        self.parts, self.packed = parts, None
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), in_features))

    def forward(self, x):
        if self.packed is None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")

    def pack(self, rows):
        """Replace the weight by oneDNN's blocked copy of it, made for products of `rows` rows; no training after this."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)
        self.weight = None


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))

    def forward(self, x):
        d = x.shape[-1]
        if x.is_cuda:
            return F.rms_norm(x, (d,), self.weight, self.eps)
        # The variance of (x, −x) is the mean square of x. On a CPU layer_norm is one kernel where F.rms_norm is ten, and at
        # decode size kernels cost what their number is: a twentieth of a whole step.
        return F.layer_norm(torch.cat((x, -x), dim=-1), (2 * d,), eps=self.eps)[..., :d] * self.weight


@lru_cache(maxsize=None)  # noqa: UP033 — never dropped: a CUDA graph may know where it lies
def inverse_frequencies(config, device):
    """RoPE's angle per position, (head_dim / 2,) float32, as in transformers' modeling_rope_utils.py."""
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if config.rope_type == "linear":
        inv_freq = inv_freq / config.rope_scaling[0]
    elif config.rope_type == "llama3":  # slow down the long wavelengths, keep the short ones, blend in between
        factor, low, high, original = config.rope_scaling
        turns = original * inv_freq / (2 * math.pi)  # rotations within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / factor
    return inv_freq.to(device)


class Rows(NamedTuple):
    """What all layers of a pass share about its T rows."""
    slots: torch.Tensor      # (T,) where keys and values are written
    cos: torch.Tensor        # (T, 1, head_dim)
    sin: torch.Tensor        # (T, 1, head_dim), the first half negated
    mask: torch.Tensor       # (T, S): 0 where a row sees the position, −inf where not; None: causal among the T rows
    columns: torch.Tensor    # (T, S): the slot that holds the position; None: slot and position are the same

    @classmethod
    def at(cls, config, positions, x, cache):
        angle = positions[:, None].float() * inverse_frequencies(config, positions.device)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        slots, mask, columns = positions, None, None
        if cache is not None:
            slots, columns = positions if cache.slots is None else cache.slots, cache.columns
            unseen = torch.arange(cache.length, device=positions.device) > positions[:, None]
            mask = torch.zeros_like(unseen, dtype=x.dtype).masked_fill_(unseen, -math.inf)
        return cls(slots, torch.cat((cos, cos), -1).to(x.dtype), torch.cat((-sin, sin), -1).to(x.dtype), mask, columns)


def rotate(x, cos, sin):
    """RoPE on x (B, T, heads, head_dim): pairs (i, i + head_dim / 2) turn by the row's angle."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q, k, v, rows):
    """softmax(q kᵀ / √D) v: each row of q (B, T, H, D) over the rows that it sees of k, v (B, S, K, D) -> (B, T, H, D)."""
    if q.is_cuda and rows.mask is not None:
        return attend_by_group(q, k, v, rows)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), rows.mask,
                                       is_causal=rows.mask is None, enable_gqa=q.shape[2] != k.shape[2])  # (B, H, T, D)
    return y.transpose(1, 2)


def attend_by_group(q, k, v, rows):
    """The same for kernels that know no groups: the G heads of a group become rows of one head, and keys are read once."""
    (B, T, H, D), K = q.shape, k.shape[2]
    q = q.view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)  # (B, K, G T, D)
    mask = rows.mask if H == K else rows.mask.repeat(H // K, 1)
    y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask)
    return y.unflatten(2, (H // K, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def silu_and_multiply(gate_up):
    """gate_up (…, 2 n), gate and up side by side -> (…, n)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def attend_in_order(q, k, v, rows):
    """Attention of T nodes q (1, T, H, D) on the slots in view k, v (1, S, K, D); each row adds up in order of position.

    Floating-point sums depend on the order of their terms. The scores are one product with the slots as they lie, then put
    in order by row. The values before the last BLOCK + T slots are where they belong for every row: one product. The last
    ones are gathered by row. Vanilla decoding at this width does the same with columns that change nothing.
    """
    (_, T, H, D), (_, S, K, _) = q.shape, k.shape
    shared = max(0, S - KVCache.BLOCK - T)
    q = (q * D ** -0.5).view(T, K, H // K, D).transpose(0, 1)  # (K, T, G, D): the G heads of a group share keys and values
    scores = (q.reshape(K, -1, D) @ k[0].permute(1, 2, 0)).view(K, T, -1, S)
    scores = scores.gather(3, rows.columns[None, :, None].expand_as(scores)) + rows.mask[:, None]
    p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    y = p[..., shared:] @ v[0][rows.columns[:, shared:]].permute(2, 0, 1, 3)  # (K, T, G, D)
    if shared:
        y = y + (p[..., :shared].reshape(K, -1, shared) @ v[0, :shared].transpose(0, 1)).view_as(y)
    return y.transpose(0, 1).reshape(1, T, H, D)


class Attention(nn.Module):
    """Causal grouped-query self-attention with RoPE; the target's layers and Kangaroo's adapter both use it."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, q_proj=q, k_proj=kv, v_proj=kv)
        self.o_proj = Linear(q, o_proj=config.hidden_size)

    def forward(self, x, rows, cache=None, layer=0):
        B, T, _ = x.shape
        H, K, D = self.heads, self.kv_heads, self.head_dim
        qkv = self.qkv_proj(x).view(B, T, H + 2 * K, D)
        qk, v = rotate(qkv[:, :, :H + K], rows.cos, rows.sin), qkv[:, :, H + K:]
        q, k = qk[:, :, :H], qk[:, :, H:]
        if cache is not None:
            k, v = cache.update(layer, rows.slots, k, v)  # (1, S, K, D)
        y = attend(q, k, v, rows) if rows.columns is None else attend_in_order(q, k, v, rows)
        return self.o_proj(y.reshape(B, T, H * D))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, gate_proj=config.intermediate_size, up_proj=config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, down_proj=config.hidden_size)

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
        self.config, self.fingerprint = config, None  # load_llama sets the fingerprint
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, lm_head=config.vocab_size)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self, length, config=None):
        """A KV cache of zeros for `length` positions, for this model's layers or for those of an adapter's config."""
        config = config or self.config
        return KVCache.zeros(config, config.num_hidden_layers, length, self.norm.weight)

    def embed(self, ids):
        """Token ids, a list or a tensor (T,), -> (1, T, hidden_size). A list is copied to the device without waiting."""
        if not torch.is_tensor(ids):
            ids = to_device(torch.tensor(ids, dtype=torch.long), self.embed_tokens.weight.device)
        return self.embed_tokens(ids)[None]

    def run_layers(self, x, positions, cache, first, last):
        """Layers first … last − 1 on x (B, T, hidden_size) at positions (T,); no cache: the rows see one another only."""
        rows = Rows.at(self.config, positions, x, cache)
        for i in range(first, last):
            x = self.layers[i](x, rows, cache, i)
        return x

    def logits(self, x):
        """The state after the last layer (…, hidden_size) -> (…, vocab_size), in the model's dtype."""
        return self.lm_head(self.norm(x))

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, vocab_size), without a cache."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.logits(self.run_layers(self.embed_tokens(ids), positions, None, 0, len(self.layers)))


# ---------------------------------------------------------------------------------------------------------------------
# Weights

def named_weights(module):
    """{Hugging Face's name: the parameter, or the rows of the stacked parameter, that it fills}."""
    weights = {}
    for name, weight in module.named_parameters():
        path = name.split(".")[:-1]
        owner = module.get_submodule(".".join(path))
        parts = owner.parts if isinstance(owner, Linear) else {path[-1]: len(weight)}
        for part, rows in zip(parts, weight.split(list(parts.values()))):
            weights[".".join([*path[:-1], part, "weight"])] = rows
    return weights


def load_weights(module, tensors, source):
    """Fill `module` from {name: (shape, function that reads the tensor)}, one at a time; UserError unless all fit."""
    expected = named_weights(module)
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    misshapen = [f"{name} {list(shape)} instead of {list(expected[name].shape)}" for name, (shape, _) in tensors.items()
                 if name in expected and tuple(shape) != tuple(expected[name].shape)]
    faults = [f"{len(names)} {what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" for what, names in
              (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)) if names]
    if faults:
        raise UserError(f"{source}: weights do not fit the config: {'; '.join(faults)}")
    with torch.no_grad():
        for name, (_, read) in tensors.items():
            tensor = read()
            if not tensor.is_floating_point():
                raise UserError(f"{source}: {name} is {tensor.dtype}, quantised weights are not implemented")
            expected[name].copy_(tensor)


def read_tensor(path, name):
    with safe_open(path, framework="pt") as file:  # closed again, so that the pages read are not ours for longer
        return file.get_tensor(name)


def safetensors_entries(path):
    """{name: (shape, function that reads the tensor)} of a safetensors file; nothing is read yet."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: (file.get_slice(name).get_shape(), partial(read_tensor, path, name)) for name in file.keys()}
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: missing, truncated or not a safetensors file ({e})") from None


def write_safetensors(path, tensors):
    """Write {name: tensor}; at any moment `path` holds the old file or the new one. Needs no NumPy, as safetensors.torch does."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    specs = {name: TensorSpec(dtype=str(t.dtype).removeprefix("torch."), shape=t.shape, data_ptr=t.data_ptr(), data_len=t.nbytes)
             for name, t in tensors.items()}
    write_atomically(path, serialize(specs, {"format": "pt"}))


def write_atomically(path, data):
    """Write bytes so that at any moment `path` holds all of the old ones or all of the new ones."""
    path = Path(path)
    try:
        with open(path.with_name(path.name + ".tmp"), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None


def fingerprint(tensors):
    """16 hex digits that tell one trained Llama from another: a digest of its norms' weights, the same for a bfloat16 copy."""
    digest = hashlib.sha256()
    for name in sorted(name for name in tensors if name.endswith("norm.weight")):
        tensor = tensors[name][1]().bfloat16().contiguous()
        digest.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
    return digest.hexdigest()[:16]


def build(cls, config, device, dtype):
    """A module without weights: shapes on the meta device, then memory on `device` that is not initialised."""
    with torch.device("meta"):
        module = cls(config).to(dtype)
    return module.to_empty(device=device).requires_grad_(False)


def load_llama(folder, device="cpu", dtype=torch.float32):
    """A Llama from a Hugging Face folder (config.json; model.safetensors, or shards with model.safetensors.index.json).

    Weights are cast to `dtype` one tensor at a time. UserError lists missing, unexpected and misshapen keys.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, --model wants one with config.json and *.safetensors")
    model = build(Llama, LlamaConfig.load(folder), device, dtype)
    model.tie()  # moving off the meta device gave each name memory of its own
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: has no weight_map")
        shards = sorted({str(shard) for shard in weight_map.values()})
    tensors = {}
    for shard in shards:
        tensors |= {k.removeprefix("model."): v for k, v in safetensors_entries(folder / shard).items()
                    if not k.endswith("rotary_emb.inv_freq")}  # old checkpoints store this constant
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # some files store the tied matrix twice
    load_weights(model, tensors, folder)
    model.fingerprint = fingerprint(tensors)
    return model.eval()


def pack(module, rows):
    """On a CPU, keep weights in oneDNN's blocked layout for products of `rows` rows: about 1.7 times as fast to read.

    Changes nothing where the operator or the dtype is not supported. A tied LM head becomes a copy of the embedding.
    """
    ops = torch.ops.mkldnn
    weight = next(module.parameters())
    fast = {torch.float32: lambda: True, torch.bfloat16: lambda: ops._is_mkldnn_bf16_supported(),
            torch.float16: lambda: ops._is_mkldnn_fp16_supported()}.get(weight.dtype, lambda: False)
    try:
        if weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and fast():
            for linear in [m for m in module.modules() if isinstance(m, Linear)]:
                linear.pack(rows)
    except (AttributeError, RuntimeError, NotImplementedError):
        pass  # an operator of this PyTorch is missing: plain products are right, only slower
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

class Sampler:
    """Chooses tokens from logits. temperature 0 is greedy; top_k 0 and top_p 1 keep every token.

    The token at position t is argmax(log p + Gumbel noise of t): a sample from p (Gumbel-max), made from noise that is a
    function of (seed, t) alone. A drafter that uses the same noise tends to choose the same token, and a verifier need
    only compare. Noise comes from the CPU, so that it is the same on every device. Ties go to the lowest id.
    """

    def __init__(self, temperature=0.0, top_k=0, top_p=1.0, seed=0):
        for flag, value, fits, want in (
                ("temperature", temperature, temperature == 0 or 1e-6 <= temperature < math.inf, "0 (greedy) or from 1e-6 on"),
                ("top-k", top_k, top_k >= 0, "at least 0 (0: off)"), ("top-p", top_p, 0 < top_p <= 1, "in (0, 1]")):
            if not fits:
                raise UserError(f"--{flag} {value}: must be {want}")
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed
        self.noise = lru_cache(maxsize=64)(self.noise)  # drafter and verifier meet at the same positions

    def noise(self, position, vocab_size, device):
        """Gumbel noise (vocab_size,) float32 of one position."""
        key = hashlib.blake2b(f"{self.seed} {position}".encode(), digest_size=4)  # the generator takes 32 bits of a seed
        generator = torch.Generator().manual_seed(int.from_bytes(key.digest(), "little"))
        u = torch.rand(vocab_size, generator=generator, dtype=torch.float64).float()
        # −log(1 − u) keeps float32's full precision where it is small, which is where the winners are.
        return to_device(-(-torch.log1p(-u)).log(), device)

    def scores(self, logits):
        """logits (V,) -> float32 (V,): divided by the temperature, −inf for what top-k and top-p exclude."""
        scores = logits.float() / self.temperature
        if 0 < self.top_k < len(scores):
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[-1], -math.inf)
        if self.top_p < 1:
            probs = scores.softmax(-1)
            # Non-negative floats sort like their bit patterns, and PyTorch sorts integers ten times as fast on a CPU.
            ascending = probs.view(torch.int32).sort().values.view(torch.float32)
            total, limit = ascending, 1 - self.top_p
            if probs.is_cuda:  # a GPU adds up a running sum in varying order, to which only integers are indifferent
                total, limit = (ascending.double() * 2 ** 52).long(), int(limit * 2 ** 52)
            cut = (total.cumsum(-1) <= limit).sum().clamp(max=len(probs) - 1)
            scores = scores.masked_fill(probs < ascending.gather(0, cut[None]), -math.inf)
        return scores

    def perturbed(self, logits, position, depth=None):
        """logits (T, V) of rows whose next tokens stand at position + depth[i] (None: + i) -> what the choice is the argmax of.

        Rows go one by one: a reduction over several rows may add up in another order than over one.
        """
        if self.temperature == 0:
            return logits
        return torch.stack([self.scores(row) + self.noise(position + i, len(row), row.device)
                            for i, row in zip(depth or count(), logits)])

    def choose(self, logits, position, depth=None):
        """The token of each row: ids (T,), on the device."""
        return self.perturbed(logits, position, depth).max(-1).indices  # of equals the first; on a CPU faster than argmax

    def candidates(self, logits, position, depth, k):
        """The k tokens of each row that come nearest to being chosen, the chosen one first: ids (T, k), −1 for excluded ones."""
        if k == 1:
            return self.choose(logits, position, depth)[:, None]
        best = self.perturbed(logits, position, depth).topk(k)
        return best.indices.masked_fill(best.values == -math.inf, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Two references: the oracle and the assumption

@torch.inference_mode()
def generate_naive(model, prompt, max_new_tokens, sampler, eos=()):
    """Decoding without a cache, to test against: the definition of the right tokens, up to floating-point rounding."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids], device=model.embed_tokens.weight.device))[0, -1:]
        ids.append(sampler.choose(logits, len(ids)).item())
        if ids[-1] in eos:
            break
    return ids[len(prompt):]


@torch.inference_mode()
def rows_are_alike(model, width, start=None):
    """Does this device treat the rows of a step alike, so that one shape means one result? Checked, not believed.

    `width` tokens run as one step and one by one; logits and cache must be equal bit for bit. At a width for trees, once
    more as two branches whose nodes alternate. Two layers and the LM head suffice, because all layers have the same shapes
    and so run the same kernels. Takes at most 3/2 width + 2 steps of these. On a GPU, where attention may run another kernel
    over a long view than over a short one, twice that.
    """
    if start is None:
        starts = (KVCache.BLOCK // 2, 32 * KVCache.BLOCK + KVCache.BLOCK // 2)
        return all(rows_are_alike(model, width, start) for start in starts[:2 if model.norm.weight.is_cuda else 1])
    depth = min(2, len(model.layers))
    generator = torch.Generator().manual_seed(0)
    before = KVCache.zeros(model.config, depth, start + 2 * width, model.norm.weight)
    before.rows.copy_(torch.randn(before.rows.shape, generator=generator))
    x = model.embed(torch.randint(model.config.vocab_size, (width,), generator=generator).tolist())

    def step(x, start, cache, parents=None):
        return model.logits(model.run_layers(*one_shape(x, start, cache, width, parents), 0, depth))[0]

    chain, branches = list(range(width - 1)), [max(0, node - 1) for node in range(width - 1)]
    for parents in (chain, branches) if width > CHAIN_WIDTH else (chain,):
        path = [width - 1]
        while path[0]:
            path.insert(0, parents[path[0] - 1])
        cache, alone = (KVCache(before.rows.clone(), before.length) for _ in range(2))
        together = step(x, start, cache, parents)[path]
        one_by_one = torch.stack([step(x[:, node:node + 1], start + i, alone)[0] for i, node in enumerate(path)])
        cache.keep(start, path[1:])
        end = start + len(path)
        if not (torch.equal(together, one_by_one) and torch.equal(cache.rows[:, :, :, :end], alone.rows[:, :, :, :end])):
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
