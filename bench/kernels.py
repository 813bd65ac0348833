"""Microseconds of the kernels that a decode step is made of, each replayed in a CUDA graph.

    python bench/kernels.py --out kernels.json
    python bench/kernels.py --tiny --device cpu     # toy sizes, to test this file

Of two shapes, with random numbers: all products, with and without adding onto the residual; norms,
RoPE, SiLU, as they are and compiled; attention in several ways over several lengths. Last, what a
profiler sees in a layer. Weights and caches are several, used in turn, so that none is found in the
GPU's own cache: as in a decode step. A row is written when it is measured. The floor is a kernel
that does next to nothing.
"""
import json
import statistics
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.common import copy_bandwidth, parser_for, stopwatch, synchronize
from llama import (
    KVCache,
    Layer,
    LlamaConfig,
    RMSNorm,
    Rows,
    rotate_and_write,
    silu_and_multiply,
)
from support import attention
from support.checkpoint import build
from support.decoder import pick_device_and_dtype
from support.files import write_atomically
from support.graphs import CudaRecorder, direct_recorder
from support.packing import FastRMSNorm, pack, rotate_in_place
from support.program import run_program

import torch
import torch.nn as nn
import torch.nn.functional as F


class Shape(NamedTuple):
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = {"7B": Shape(4096, 11008, 32, 32, 128, 32000), "135M": Shape(576, 1536, 9, 3, 64, 49152)}
TINY = {"MHA": Shape(64, 96, 4, 4, 16, 100), "GQA": Shape(96, 96, 6, 2, 16, 100)}
ROWS, VIEWS = (1, 8, 16), (256, 768, 1024, 4352)


def products(shape, random, big):
    """(words, calls to measure, bytes that each reads at least)"""
    hidden, inner, heads, kv_heads, D, vocab = shape
    for name, n_in, n_out in (
            ("qkv", hidden, (heads + 2 * kv_heads) * D), ("o", heads * D, hidden),
            ("gate_up", hidden, 2 * inner), ("down", inner, hidden), ("head", hidden, vocab)):
        weights = [random(n_out, n_in) for _ in range(max(2, min(40, big // (n_in * n_out))))]
        size = weights[0].nbytes
        for T in ROWS:
            x, onto = random(T, n_in), random(T, n_out)
            yield f"{name} {n_out} × {n_in}, {T} rows", [
                partial(F.linear, x, w) for w in weights], size
            if name in ("o", "down"):
                yield f"{name}, {T} rows, onto the residual", [
                    partial(onto.addmm_, x, w.t()) for w in weights], size


def pointwise(shape, random, compiled):
    hidden, inner, heads, kv_heads, D, _ = shape
    for T in ROWS[:2]:
        x, gate_up, norm = random(1, T, hidden), random(1, T, 2 * inner), RMSNorm(hidden, 1e-5)
        norm.weight = nn.Parameter(random(hidden), requires_grad=False)
        qkv, cos, slots = random(1, T, heads + 2 * kv_heads, D), random(T, 1, D), torch.arange(
            T, device=x.device)
        layer = random(2, 1, 256, kv_heads, D)
        turn = qkv, heads, cos, cos, slots, layer
        for words, call in {
                "rms_norm": partial(norm, x), "norm as on a CPU": partial(FastRMSNorm(norm), x),
                "residual add": partial(torch.add, x, x),
                "RoPE and write": partial(rotate_and_write, *turn),
                "RoPE and write, in place": partial(rotate_in_place, *turn),
                "RoPE and write, compiled": partial(compiled(rotate_and_write), *turn),
                "SiLU times up": partial(silu_and_multiply, gate_up),
                "SiLU times up, compiled": partial(compiled(silu_and_multiply), gate_up)}.items():
            yield f"{words}, {T} rows", [call] * 20, 0


def attentions(shape, random, views):
    """By the kernel that is used, whole and in chunks; and by flash attention, which reads only the
    keys that are used, but splits them as it likes."""
    _, _, heads, kv_heads, D, _ = shape
    for S in views:
        caches = [random(2, 1, S, kv_heads, D) for _ in range(8)]
        for T in ROWS[:2]:
            q, size, device = random(1, T, heads, D), caches[0].nbytes, caches[0].device
            positions = torch.arange(S - 200, S - 200 + T, device=device)
            for words, long in ("whole", 10 ** 9), ("by chunk", 0):
                with mock.patch.object(attention, "LONG", long):
                    mask = attention.make_mask(positions, S, q, heads // kv_heads, False)
                    if not q.is_cuda and long == 0:  # as make_mask has it on a GPU
                        mask = mask.repeat(heads // kv_heads, 1).clamp_(min=-30000)
                    yield f"attention {words}, {T} rows, {S} positions", [
                        partial(attention.attend_by_group, q, *both, mask) for both in caches], size
            ends, keys, used = (torch.tensor(x, dtype=torch.int32).to(device)
                                for x in ([0, T], [0, S], [S - 200 + T]))
            flash = torch.ops.aten._flash_attention_forward
            yield f"attention by flash, {T} rows, {S} positions", [
                partial(flash, q[0], *both[:, 0], ends, keys, T, S, 0.0, True, False,
                        seqused_k=used) for both in caches], size


def micros(calls, record, device, repeats):
    """Microseconds of one of these calls, recorded together; the median."""
    replay, _ = record(lambda: [call() for call in calls] and (), [])

    def timed():
        replay()
        synchronize(device)

    timed()
    return statistics.median(stopwatch(timed)[1] for _ in range(repeats)) / len(calls) * 1e6


def kernels_of_a_layer(shape, device, dtype):
    """[(name, microseconds)] of a layer's kernels at 8 rows and 512 positions, in their order."""
    hidden, inner, heads, kv_heads, D, _ = shape
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=D,
                         vocab_size=1)
    module = pack(nn.ModuleList([build(Layer, config, device, dtype)]), 8)
    for p in module.parameters():
        p.normal_(0, 0.02)
    x = torch.randn(1, 8, hidden, device=device, dtype=dtype)
    cache = KVCache.zeros(config, 512, 8, x)
    rows = Rows.at(config, torch.arange(300, 308, device=device), x, cache)
    kind = device.type.upper()
    activity = getattr(torch.profiler.ProfilerActivity, kind)
    for _ in range(2):  # the first sets up what is set up once
        with torch.profiler.profile(activities=[activity]) as profile:
            module[0](x.clone(), rows, cache, 0)
            synchronize(device)
    events = [e for e in profile.events() if e.device_type.name == kind]
    return [(e.name[:80], e.time_range.elapsed_us())
            for e in sorted(events, key=lambda e: e.time_range.start)]


@torch.inference_mode()
def main(argv=None):
    parser = parser_for(__doc__, out=None, device=None)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to test this file")
    args = parser.parse_args(argv)
    device, dtype = pick_device_and_dtype(args.device, None)
    cuda, big = device.type == "cuda", 10 ** 3 if args.tiny else 10 ** 8
    record = CudaRecorder(device) if cuda else direct_recorder
    found = {"bandwidth": copy_bandwidth(device, 2 ** 20 if args.tiny else 2 ** 31), "rows": []}

    def compiled(function):
        return torch.compile(function, dynamic=True) if cuda else function

    def random(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    def cases():
        x = random(8)
        yield "floor", [lambda: x.add_(1)] * 200, 0
        for name, shape in (TINY if args.tiny else SHAPES).items():
            for words, *more in chain(
                    products(shape, random, big), pointwise(shape, random, compiled),
                    attentions(shape, random, VIEWS[::2] if args.tiny else VIEWS)):
                yield f"{name} {words}", *more

    def write():
        if args.out:
            write_atomically(args.out, json.dumps(found, indent=1).encode())

    print(f"copy bandwidth {found['bandwidth'] / 1e9:.0f} GB/s")
    for words, calls, size in cases():
        try:
            spent = micros(calls, record, device, 1 if args.tiny else 10)
        except (RuntimeError, TypeError, NotImplementedError) as e:  # this PyTorch has it not so
            print(f"{words:60}{type(e).__name__}: {str(e).splitlines()[0][:60]}", flush=True)
            continue
        share = size / found["bandwidth"] / spent * 1e6
        of_all = f"{share:9.2f} of the bandwidth" if size else ""
        print(f"{words:60}{spent:9.2f} µs{of_all}", flush=True)
        found["rows"].append({"what": words, "us": spent, "share": share})
        write()
    for name, shape in (TINY if args.tiny else SHAPES).items():
        found[f"layer of {name}"] = kernels_of_a_layer(shape, device, dtype)
        for kernel, spent in found[f"layer of {name}"]:
            print(f"{name}, a layer: {spent:9.2f} µs  {kernel}", flush=True)
        write()


if __name__ == "__main__":
    sys.exit(run_program("kernels.py", main))
