"""Attention over a KV cache: which kernel runs where. Imports nothing of ours.

    attend   no cache, or a CPU    F.scaled_dot_product_attention as it is
             a GPU                 attend_by_group; over a long view attend_by_chunk
             a step of > 8 rows    attend_in_order, on all devices

A row of a step is a token. Three numbers belong to it, and only in a tree are they not the same:

- its *slot*: the row of the cache where its key and value lie;
- its *position* in the text, which RoPE turns it by;
- its *columns*: the slots of its path, by position. They are what it sees, in this order.

An example. The last committed token stands at position 5. The draft is a tree: two tokens may come
next, b or c, and d follows c. In a chain the slots would be the positions.

    node         slot    position    columns 0 … 7          what lies behind its own position,
    a (root)      5         5        0 1 2 3 4 5 . .        the dots, is masked: any slot will do
    ├── b         6         6        0 1 2 3 4 5 6 .
    └── c         7         6        0 1 2 3 4 5 7 .
        └── d     8         7        0 1 2 3 4 5 7 8
"""
import math
from functools import lru_cache

import torch
import torch.nn.functional as F

MAX_ROWS = 64            # of a decode step; a pass of more is one of prefill
CHUNK, LONG = 256, 1024  # keys of a chunk; views from 1,024 positions on go by chunks


@lru_cache(maxsize=None)  # noqa: UP033 — kept for ever: a CUDA graph may hold its address
def constants(length, dtype, device):
    """The numbers 0 … length − 1, a zero and a −inf, on the device."""
    zero, infinity = (torch.full((), x, dtype=dtype, device=device) for x in (0, -math.inf))
    return torch.arange(length, device=device), zero, infinity


def make_mask(positions, length, like, group, in_order):
    """(T, length): 0 where the row at positions[t] sees a position, else −inf.

    On a GPU it is (group T, length) over a long view, unless attention is `in_order`: see
    attend_by_chunk.
    """
    numbers, zero, infinity = constants(length, like.dtype, like.device)
    mask = torch.where(numbers > positions[:, None], infinity, zero)
    if like.is_cuda and length >= LONG and not in_order:
        mask = mask.repeat(group, 1)
        mask[:, -CHUNK].clamp_(min=-30000)
    return mask


def merge_chunks(y, logsumexp):
    """What a row makes of each chunk, y (N, …, D), by the chunk's share in it: (…, D) float32."""
    return (logsumexp.softmax(0)[..., None] * y).sum(0)


def attend(q, k, v, mask, columns=None, shared=0, merge=merge_chunks):
    """softmax(q kᵀ / √D) v for q (B, T, H, D) over the rows of k, v (B, S, K, D) that each sees.

    mask: of `make_mask`; None: causal. columns (T, S): the slot of each position on a row's path,
    the first `shared` of which are the positions themselves; None: all are. merge: `merge_chunks`,
    or it compiled.
    """
    if columns is not None:
        return attend_in_order(q, k, v, mask, columns, shared)
    if q.is_cuda and mask is not None:
        return attend_by_group(q, k, v, mask, merge)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask,
        is_causal=mask is None, enable_gqa=q.shape[2] != k.shape[2])
    return y.transpose(1, 2)  # (B, T, H, D)


def attend_by_group(q, k, v, mask, merge=merge_chunks):
    """Attention by kernels that know no groups: all heads of a group read the same keys.

    q (B, T, H, D); k, v (B, S, K, D), where H = G K; mask (T, S), or as `make_mask` has it; returns
    (B, T, H, D). Neither keys nor values are copied for a step: a stride of 0 says that heads share
    them. Where there are several groups of several heads, which no stride says, groups are a batch.
    """
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    if B == 1 and T <= MAX_ROWS and S >= LONG and D % 8 == 0:
        return attend_by_chunk(q, k, v, mask, merge)
    N = 1 if K in (1, H) else K
    q, k, v = (x.unflatten(2, (N, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (q, k, v))
    k, v = (x.expand(-1, H // N, -1, -1) for x in (k, v))  # (B N, H / N, S, D)
    y = F.scaled_dot_product_attention(q, k, v, mask[:T])
    return y.unflatten(0, (B, N)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def attend_by_chunk(q, k, v, mask, merge):
    """Attention to chunks of the keys, merged: q (1, T, H, D), k, v (1, S, K, D), mask (R, S).

    A kernel that goes through the keys one after another keeps as many multiprocessors of a GPU
    busy as there are heads. With the chunks as a batch it is as many times more as there are
    chunks. The heads of a group are rows of one head: R = T H / K. Each chunk has a softmax of its
    own; their shares in the whole are exp of its logsumexp, in float32. (Plain products would round
    bfloat16 scores; the kernel keeps them in float32.) A softmax over nothing is NaN. So in the
    last chunk, which may lie wholly behind a row, the row sees the first key, with a share that
    rounds to 0. (This step has written that key.)
    """
    (_, T, H, D), K, R = q.shape, k.shape[2], len(mask)
    q = q.view(T, K, -1, D).permute(1, 2, 0, 3).reshape(K, R, D)
    k, v = (x[0].unflatten(0, (-1, CHUNK)).transpose(1, 2) for x in (k, v))  # (N, K, CHUNK, D)
    q, mask = q.expand(len(k), -1, -1, -1), mask.unflatten(1, (-1, CHUNK)).transpose(0, 1)
    mask = mask[:, None].expand(-1, K, -1, -1)  # (N, K, R, CHUNK)
    if q.is_cuda:  # the kernels behind F.scaled_dot_product_attention, which keeps the logsumexp
        attention = torch.ops.aten._scaled_dot_product_efficient_attention
        y, logsumexp, *_ = attention(q, k, v, mask, compute_log_sumexp=True)
    else:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y, logsumexp = attention(q, k, v, attn_mask=mask)
    y = merge(y, logsumexp[..., :R]).view(K, -1, T, D)  # the kernel pads the rows
    y = y.permute(2, 0, 1, 3).to(q.dtype, memory_format=torch.contiguous_format)
    return y.reshape(1, T, H, D)


def attend_in_order(q, k, v, mask, columns, shared):
    """Attention in which each row adds up in order of position, wherever its keys lie.

    q (1, T, H, D) are T nodes, k and v (1, S, K, D) the slots in view; returns (1, T, H, D).

    Floating-point sums depend on the order of their terms. The scores are one product with the
    slots as they lie, then put in order by row: in the example above, d's for position 6 is the one
    of slot 7. The values of the first `shared` positions lie in order for all rows and are one
    product; those of the others are gathered by row. Vanilla decoding in steps of as many rows does
    this too, with slots that are positions.
    """
    (_, T, H, D), (_, S, K, _) = q.shape, k.shape
    # (K, T, G, D): the G heads of a group share keys and values.
    q = (q * D ** -0.5).view(T, K, H // K, D).transpose(0, 1)
    scores = (q.reshape(K, -1, D) @ k[0].permute(1, 2, 0)).view(K, T, -1, S)
    scores = scores.gather(3, columns[None, :, None].expand_as(scores)) + mask[:, None]
    p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    y = p[..., shared:] @ v[0][columns[:, shared:]].permute(2, 0, 1, 3)  # (K, T, G, D)
    if shared:
        y = y + (p[..., :shared].reshape(K, -1, shared) @ v[0, :shared].transpose(0, 1)).view_as(y)
    return y.transpose(0, 1).reshape(1, T, H, D)
