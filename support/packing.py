"""Faster modules in the place of plain ones: weights in oneDNN's layout, fewer kernels on a GPU.

    load -> use_fast_norms(module) -> pack(module, rows)

They compute what `llama.py` defines, with other rounding; who drafts and who does not has the same
ones. Nothing of the algorithm.
"""
from llama import Attention, Layer, Linear, RMSNorm

import torch
import torch.nn as nn
import torch.nn.functional as F

# Whether F.rms_norm is one kernel on a GPU. In older releases it is eight.
FUSED_NORM = hasattr(torch.ops.aten, "_fused_rms_norm_backward")


def swap(module, kind, make):
    """Put make(m) in the place of every module m in `module` whose class is `kind`.

    Nothing here keeps one that was replaced: its weights are free before the next one is made.
    """
    for parent in [m for m in module.modules() if type(m) is not kind]:
        for name in [name for name, child in parent.named_children() if type(child) is kind]:
            setattr(parent, name, make(getattr(parent, name)))
    return module


class FastRMSNorm(RMSNorm):
    """RMSNorm in few kernels: the variance of (x, −x) is the mean square of x.

    F.layer_norm is one kernel where F.rms_norm was ten on a CPU, and at decode size the cost is the
    number of kernels, not their work. In PyTorch 2.13 F.rms_norm is one too, as fast in float32,
    and slower in 16 bits: 12.5 µs for 8 rows of 192 numbers in bfloat16 where this takes 10.
    """

    def __init__(self, norm):
        super().__init__(len(norm.weight), norm.eps)
        self.weight = norm.weight

    def forward(self, x):
        weight = self.weight
        n = len(weight)
        both = F.layer_norm(torch.cat((x, -x), dim=-1), (2 * n,), eps=self.eps)
        return both[..., :n] * weight


def use_fast_norms(module):
    """Swap the norms of `module`, except on a GPU whose F.rms_norm is one kernel; returns it."""
    on_gpu = next(module.parameters()).is_cuda
    return module if on_gpu and FUSED_NORM else swap(module, RMSNorm, FastRMSNorm)


class PackedLinear(nn.Module):
    """A Linear whose weight is oneDNN's blocked copy, made for products of `rows` rows.

    `weight` and `state_dict()` give the plain matrix, as a copy. There is no training.
    """

    def __init__(self, linear, rows):
        super().__init__()
        self.parts, self.rows = linear.parts, rows
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    @property
    def weight(self):
        return self.packed.to_dense()

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight

    def __deepcopy__(self, memo):
        return PackedLinear(self, self.rows)


class AddingLayer(Layer):
    """A Layer of a GPU: its last products add onto the residual, without a kernel for the sum.

    In place, for else the residual is copied first. So there is no training.
    """

    def __init__(self, layer):
        super(Layer, self).__init__()
        for name, part in layer.named_children():
            self.add_module(name, part)

    def forward(self, x, rows, cache, layer):
        attention, mlp = self.self_attn, self.mlp
        y = attention.mix(self.input_layernorm(x), rows, cache, layer)
        add_product(x, y, attention.o_proj)
        y = mlp.silu_and_multiply(mlp.gate_up_proj(self.post_attention_layernorm(x)))
        return add_product(x, y, mlp.down_proj)


def add_product(x, y, linear):
    """x + linear(y), written to x; of both the last dimension is a row's."""
    x.view(-1, x.shape[-1]).addmm_(y.view(-1, y.shape[-1]), linear.weight.t())
    return x


def rotate_in_place(qkv, heads, cos, sin, slots, layer):
    """llama.rotate_and_write in four kernels, not six: of what is contiguous `roll` makes no copy,
    and where q and k are overwritten, k and v lie side by side."""
    both = (heads + qkv.shape[2]) // 2
    rolled, qk = qkv.roll(qkv.shape[-1] // 2, -1)[:, :, :both], qkv[:, :, :both]
    torch.addcmul(qk * cos, rolled, sin, out=qk)
    kv = qkv[:, :, heads:].unflatten(2, (2, -1))  # (B, T, 2, kv_heads, head_dim)
    layer.index_copy_(2, slots, kv.permute(2, 0, 1, 3, 4))
    return qkv[:, :, :heads]


def pack(module, rows):
    """On a CPU, keep weights in oneDNN's blocked layout for products of `rows` rows.

    Reading them is then about 1.7 times as fast. Changes nothing where the operator or the dtype is
    not supported. A tied LM head becomes a copy of the embedding.

    On a GPU, fewer kernels a layer: see AddingLayer and rotate_in_place.
    """
    ops, weight = torch.ops.mkldnn, next(module.parameters())
    if weight.is_cuda:
        for attention in module.modules():
            if isinstance(attention, Attention):
                attention.rotate_and_write = rotate_in_place
        return swap(module, Layer, AddingLayer)
    try:
        if weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and (
                weight.dtype == torch.float32
                or weight.dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported()
                or weight.dtype == torch.float16 and ops._is_mkldnn_fp16_supported()):
            swap(module, Linear, lambda linear: PackedLinear(linear, rows))
    except (AttributeError, RuntimeError, NotImplementedError):
        pass  # an operator of this PyTorch is missing: plain products are right, only slower
    return module
