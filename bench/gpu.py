"""The day with a GPU: one command measures what docs/performance.md asks, and writes its tables.

    python bench/gpu.py --everything --model smollm2 --adapter models/smollm2-135m \\
        --questions question.jsonl --data sharegpt.json --out docs/results/gpu.json
    python bench/gpu.py --parts shape-7B --out gpu.json        # one of the parts alone
    python bench/gpu.py --tiny --device cpu …                  # toy sizes, to test this file

The parts, the most valuable first (`PARTS`), each a process of its own of at most 9 minutes. Each
row of a result is written when it is measured, the most valuable first; the same command goes on
with what is missing:

shape-*   Llama shapes with random weights, no download: vanilla at width 1 and at the one shape,
          a draft step, a verification, speedups under controlled acceptance, memory
choices-* these steps with other settings: does what is fast by guess pay?
equal-*   a dtype: 40 questions of --questions, 256 tokens each, chain and tree, greedy and sampled:
          are the answers vanilla's, and those without graphs?
tests     the property tests on CUDA, by pytest
stories, model   what shapes have, for the shipped model, and for --model
train     an adapter for --model from all of --data; what is left after 9 minutes, the next run does
answers   the questions with that adapter

Controlled acceptance: real Kangaroo rounds, whose drafter does all of its work, but then proposes
the known continuation, with probability α after each token that was right; α is that of a
compression rate 1 + α + α² + … + α^γ as the paper reports. Two speedups: of drafts that end with
their first wrong token, as a perfect second early exit would, and, at the last rate, of drafts of γ
tokens. Prefill and recording are not timed; the vanilla beside it is the faster of width 1 and the
one shape.
"""
import copy
import gc
import json
import random
import re
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import fill
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.common import (
    copy_bandwidth,
    dtype_name,
    ids_of,
    parser_for,
    pick,
    processor,
    results_of,
    software,
    stopwatch,
    synchronize,
    weights_of,
)
from drafters.adapters import ADAPTERS, describe
from drafters.chain import ChainDrafter
from kangaroo import STEPS, WIDTH, generate
from llama import Llama, LlamaConfig, Sampler
from support import attention
from support.checkpoint import build
from support.decoder import DEFAULT_MODEL, Decoder, Settings, load, pick_device_and_dtype
from support.device import pinned
from support.errors import UserError
from support.files import write_atomically
from support.graphs import (
    CudaRecorder,
    GraphedChain,
    GraphedLlama,
    GraphedSampler,
    direct_recorder,
    fuse_pointwise,
)
from support.limits import TREE_WIDTH
from support.packing import pack, use_fast_norms
from support.program import refuse_below_one, run_program
from support.self_check import rows_are_alike
from support.terminal import say

import torch


def config_of(hidden, inner, layers, heads, kv_heads, head_dim, vocab_size=32000, context=8192,
              tied=False):
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        vocab_size=vocab_size, max_position_embeddings=context, tie_word_embeddings=tied)


SHAPES = {  # name: (config, exit layer, the adapter's architecture)
    "135M": (config_of(576, 1536, 30, 9, 3, 64, 49152, tied=True), 2, "layer"),  # SmolLM2's
    "1B": (config_of(2048, 5632, 22, 32, 4, 64), 2, "attention"),
    "7B": (config_of(4096, 11008, 32, 32, 32, 128), 2, "attention"),
    "13B": (config_of(5120, 13824, 40, 40, 40, 128), 3, "attention")}
TINY_SHAPE = config_of(64, 96, 4, 4, 2, 16, 300, 512), 2, "layer"
# The paper's compression rates for a 7B: translation, questions, retrieval, MT-Bench.
RATES = 1.41, 1.87, 2.05, 2.22
SMALL_RATES = 1.38, 1.78, 1.64  # SmolLM2's, measured: translation, MT-Bench, all
SAMPLERS = {"greedy": Sampler(), "sampled": Sampler(0.8, 0, 0.95, 1)}
MINUTES, PAGE = 9, ROOT / "docs" / "performance.md"


# --------------------------------------------------------------------------------------------------
# Models that were never trained

def free_memory(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def random_module(cls, config, device, dtype):
    """Random weights made on the device: norms are ones, matrices keep the size of what passes."""
    module = build(cls, config, device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for p in module.parameters():
        if p.dim() > 1:
            p.normal_(0, p.shape[-1] ** -0.5, generator=generator)
        else:
            p.fill_(1)
    return use_fast_norms(module).eval()


def random_decoder(name, config, exit_layer, architecture, device, dtype):
    """A Decoder without text, for a shape alone."""
    model = random_module(Llama, config, device, dtype)
    adapter = random_module(ADAPTERS[architecture], replace(config, num_hidden_layers=1), device,
                            dtype)
    decoder = Decoder(Path(name), model, None, "none", None)
    decoder.adapter = describe(adapter, "random", {}, exit_layer)
    return decoder


def prepare(decoder, compile=False):
    """What `load` does with a decoder's modules on a GPU. (A CPU's weights it would copy.)"""
    modules = decoder.model, decoder.adapter
    for module in modules if decoder.device.type == "cuda" else ():
        pack(module, WIDTH)
    if compile:
        fuse_pointwise(*modules)
    return decoder


# --------------------------------------------------------------------------------------------------
# Controlled acceptance

def acceptance(rate, steps):
    """α with 1 + α + α² + … + α^steps = rate."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        below = sum(middle ** w for w in range(steps + 1)) < rate
        low, high = (middle, high) if below else (low, middle)
    return low


class Controlled:
    """A drafter that does all of Kangaroo's work, then proposes what follows in `text`.

    Or, once it is to be wrong, another token.
    """

    def control(self, text, rate, stops, steps):
        self.text, self.alpha = text, acceptance(rate, steps)
        self.stops, self.chance = stops, 0.0
        return self

    def draft(self, ids, n_max, cache):
        self.first = len(ids)  # the position of the draft's first token
        return super().draft(ids, n_max, cache)

    def propose(self, token, position, cache):
        drafted, known = position + 1 - self.first, self.text[position + 1]
        if drafted == 0:  # spread more evenly than random numbers would be
            self.chance = (self.chance + 0.5 * (5 ** 0.5 - 1)) % 1
        right = self.chance < self.alpha ** (drafted + 1)
        self.chosen = known if right else (known + 1) % self.model.config.vocab_size
        super().propose(token, position, cache)
        return self.chosen, 0.0 if self.stops and not right else 1.0


class ControlledChain(Controlled, ChainDrafter):
    """Without graphs."""


class ControlledGraphedChain(Controlled, GraphedChain):
    """With graphs: what runs ahead is not what was drafted, either."""

    def replay_to_exit(self, position, cache):
        if self.ahead == position:
            self.model.token.copy_(pinned([self.chosen], self.model.device), non_blocking=True)
        super().replay_to_exit(position, cache)


# --------------------------------------------------------------------------------------------------
# Measuring one model

class Bench:
    """A decoder with graphs and, to see what these are worth, one without."""

    def __init__(self, decoder, repeats):
        self.device, self.repeats = decoder.device, repeats
        self.plain, self.graphed = decoder, copy.copy(decoder)
        cuda = self.device.type == "cuda"
        self.graphed.use_graphs(CudaRecorder(self.device) if cuda else direct_recorder)

    def controlled(self, text, rate, stops, steps=STEPS, graphs=True):
        decoder = self.graphed if graphs else self.plain
        kind = ControlledGraphedChain if graphs else ControlledChain
        drafter = kind(decoder.model, decoder.adapter, decoder.adapter.exit_layer)
        return drafter.control(text, rate, stops, steps)

    def decode(self, drafter, prompt, n, width=WIDTH, steps=STEPS, eos=()):
        """(seconds per token after the first round, which prefills; all tokens; rate)"""
        model, sampler = drafter.model, Sampler()
        if isinstance(model, GraphedLlama):
            sampler = GraphedSampler(sampler, model, width)
        rounds = generate(model, drafter, prompt, n, steps, sampler, eos, width)
        done = [next(rounds).tokens]
        rest, seconds = stopwatch(list, rounds)  # each round ends with a host sync
        done += [r.tokens for r in rest]
        tokens = sum(done, [])
        return seconds / max(1, len(tokens) - len(done[0])), tokens, len(tokens) / len(done)

    @torch.inference_mode()
    def parts(self, prompt, repeats):
        """Seconds of one draft step and of one verification, medians, right behind the prompt."""
        decoder, model = self.graphed, self.graphed.model
        sampler = GraphedSampler(Sampler(), model, WIDTH)
        drafter = decoder.drafter(settings=Settings(steps=STEPS, threshold=-1.0))
        start, drafts, verifications = len(prompt) - 1, {1: [], STEPS: []}, []
        cache = model.new_cache(len(prompt) + 2 * WIDTH, WIDTH)
        drafter.prefill(prompt[:-1], cache, sampler)

        def run_draft(n):
            draft = drafter.draft(prompt, n, cache)
            synchronize(self.device)
            return draft

        def verify(draft):
            h = model.step(draft.hidden, start, cache, drafter.depth, len(model.layers))
            logits = model.logits(h)[0, :len(draft.tokens) + 1]
            sampler.judge(logits, start + 1).tolist()

        for _ in range(repeats + 1):
            for n, seconds in drafts.items():
                drafter.seen = start
                synchronize(self.device)
                draft, spent = stopwatch(run_draft, n)
                seconds.append(spent)
            verifications.append(stopwatch(verify, draft)[1])
        one, many, verification = (statistics.median(seconds[1:])  # the first ones record
                                   for seconds in (*drafts.values(), verifications))
        return (many - one) / (STEPS - 1), verification

    def prompt(self, context):
        source, size = random.Random(context), self.plain.model.config.vocab_size
        return [source.randrange(size) for _ in range(context)]

    def context(self, row, shipped, rates, n, bandwidth):
        """Adds to `row` the figures of its length of the context, times in milliseconds, the most
        valuable first; yields when there are new ones."""
        prompt, same = self.prompt(row["context"]), []
        self.graphed.model.capacity = len(prompt) + n + 2 * WIDTH
        text = prompt + self.decode(self.graphed.drafter("none"), prompt, n)[1]

        def timed(drafter, width=WIDTH):
            """(median seconds per token, rate) with drafter(), which is made anew for each run."""
            runs = [self.decode(drafter(), prompt, n, width) for _ in range(1 + self.repeats)]
            same.extend(width == 1 or tokens == text[len(prompt):] for _, tokens, _ in runs)
            return statistics.median(run[0] for run in runs[1:]), runs[0][2]  # the first records

        (one, _), (shape, _) = (timed(lambda: self.graphed.drafter("none"), width)
                                for width in (1, WIDTH))
        row |= {"width_1": one * 1e3, "one_shape": shape * 1e3, "ratio": shape / one,
                "share": self.bytes_read(len(prompt) + n / 2) / bandwidth / one}
        yield row
        draft, verify = self.parts(prompt, 5 * self.repeats)
        row |= {"draft": draft * 1e3, "cost": draft / shape, "verification": verify * 1e3,
                "speedups": {"stops": [], "goes on": []}}
        yield row
        for rate, stops in [(rate, True) for rate in rates[::-1]] + [(rates[-1], False)]:
            seconds, found = timed(partial(self.controlled, text, rate, stops))
            row["speedups"]["stops" if stops else "goes on"].insert(
                0, [found, min(one, shape) / seconds])
            yield row
        if shipped:
            row["graphs"] = timed(lambda: self.plain.drafter("none"))[0] / shape
        row["identical"] = all(same)
        yield row

    def bytes_read(self, positions):
        """Of weights and of the cache's rows, for one token behind a context."""
        model = self.plain.model
        read = sum(p.nbytes for p in weights_of(model))
        if not model.config.tie_word_embeddings:  # of the embedding, a row a token is read
            read -= model.embed_tokens.weight.nbytes
        rows = self.graphed.model.memory[model.config].rows
        return read + rows.nbytes / rows.shape[3] * positions

    def memory(self):
        """GiB of weights, caches and all else that the device has given out."""
        weights = sum(p.nbytes for p in weights_of(self.plain.model))
        weights += sum(p.nbytes for p in self.plain.adapter.parameters())
        cache = sum(memory.rows.nbytes for memory in self.graphed.model.memory.values())
        found = {"weights": weights / 2 ** 30, "cache": cache / 2 ** 30,
                 "recordings": len(self.graphed.model.graphs.recordings)}
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            found["other"] = (total - free - weights - cache) / 2 ** 30
        return found


# --------------------------------------------------------------------------------------------------
# The parts: each takes (what it has found before, arguments, device, dtype), adds to that, and
# yields what is new; the results file keeps what it has found

def tests(found, args, device, dtype):
    """How many property tests passed, were skipped or failed on CUDA, and the names of the last."""
    chosen = ["tests/test_house.py", "-k", "circle"] if args.tiny else ["-k", "cuda", "-n", "8"]
    result = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE",
                             *chosen], cwd=ROOT, capture_output=True, text=True)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", result.stdout)
    found |= {"passed": 0} | {name: int(n) for n, name in counts} | {
        "red": re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.M),
        "exit_status": result.returncode}
    yield found


def figures(found, decoder, args, device, shipped, rates=RATES):
    bench, model = Bench(decoder, 1 if args.tiny else args.repeats), decoder.model
    bandwidth = copy_bandwidth(device, 2 ** 20 if args.tiny else 2 ** 31)
    free_memory(device)
    found |= {"layers": len(model.layers), "exit_layer": decoder.adapter.exit_layer,
              "weights": sum(p.numel() for p in weights_of(model)), "bandwidth": bandwidth,
              "alike": rows_are_alike(model, WIDTH)}
    done = {row["context"]: row for row in found.get("contexts", []) if "identical" in row}
    contexts, n = ((16, 40), 10) if args.tiny else (args.contexts, 128)
    longest, found["contexts"] = model.config.max_position_embeddings - n, []
    for context in sorted({min(context, longest) for context in contexts}):
        found["contexts"].append(done.get(context, {"context": context}))
        if context not in done:
            for row in bench.context(found["contexts"][-1], shipped, rates, n, bandwidth):
                found["memory"] = bench.memory()
                yield row


def shape(name, found, args, device, dtype):
    decoder = random_decoder(name, *(TINY_SHAPE if args.tiny else SHAPES[name]), device, dtype)
    yield from figures(found, prepare(decoder, args.compile), args, device, False,
                       SMALL_RATES if name == "135M" else RATES)


# What else there might be: the settings of support/attention.py, the width, modules as llama.py has
# them, and compiled ones. In this order, for what was prepared stays so.
CHOICES = {"plain modules": {"plain": True}, "as it is": {},
           "chunks from 512 on": {"LONG": 512}, "no chunks": {"LONG": 10 ** 9},
           "width 16": {"width": TREE_WIDTH}, "compiled": {"compile": True},
           "compiled, chunks from 512 on": {"compile": True, "LONG": 512}}


def choices(name, found, args, device, dtype):
    """Milliseconds of a step at width 1 and at the one shape, a draft step and a verification."""
    decoder = random_decoder(name, *(TINY_SHAPE if args.tiny else SHAPES[name]), device, dtype)
    contexts, n = ((16,), 5) if args.tiny else (args.contexts, 64)
    done = {(row["choice"], row["context"]) for row in found.setdefault("choices", [])}
    for choice, settings in CHOICES.items():
        missing = [context for context in contexts if (choice, context) not in done]
        if missing and "plain" not in settings:
            prepare(decoder, "compile" in settings and not args.tiny)
        with mock.patch.object(attention, "LONG", settings.get("LONG", attention.LONG)):
            bench, width = Bench(decoder, 1), settings.get("width", WIDTH)
            bench.graphed.width = width
            bench.graphed.model.widths = 1, width
            for context in missing:
                bench.graphed.model.capacity = max(contexts) + n + 2 * width
                row, prompt = {"choice": choice, "context": context}, bench.prompt(context)
                for key, rows in ("width_1", 1), ("one_shape", width):
                    row[key] = 1e3 * min(bench.decode(bench.graphed.drafter("none"), prompt, n,
                                                      rows)[0] for _ in range(3))
                if width == WIDTH:
                    row["draft"], row["verification"] = (
                        1e3 * seconds for seconds in bench.parts(prompt, 5))
                if not settings:
                    row["no_graphs"] = 1e3 * bench.decode(bench.plain.drafter("none"), prompt, n)[0]
                found["choices"].append(row)
                yield row
        del bench
        free_memory(device)


def stories(found, args, device, dtype):
    decoder = load(DEFAULT_MODEL, device=device, dtype=dtype_name(dtype), graphs=False,
                   width=WIDTH, compile=args.compile)
    yield from figures(found, decoder, args, device, shipped=True)


def model(found, args, device, dtype):
    decoder = load(args.model, device=device, dtype=dtype_name(dtype), graphs=False,
                   width=WIDTH, compile=args.compile, adapter=args.adapter)
    yield from figures(found, decoder, args, device, shipped=True)


def equal(name, found, args, device, dtype, adapter=None):
    """Of the answers to --questions, how many are vanilla's, and how many those without graphs."""
    asked, done = pick(args.questions), found.setdefault("asked", {})
    asked = asked[::max(1, len(asked) // args.answers)][:args.answers]  # spread over the file
    for drafter, width in (("kangaroo", WIDTH), ("tree", TREE_WIDTH)):
        bench = Bench(load(args.model, device=device, dtype=name, width=width, graphs=False,
                           compile=args.compile, adapter=adapter or args.adapter), 1)
        prompts = [ids_of(bench.plain, question, 1024) for question in asked]
        for sampling, sampler in SAMPLERS.items():
            if f"{drafter}, {sampling}" not in done:
                bench.graphed.warm_up(prompts, args.new_tokens, [(drafter, None), ("none", None)],
                                      sampler)
                done[f"{drafter}, {sampling}"] = answers(bench, prompts, args, drafter, sampler)
                yield done
        del bench
        free_memory(device)


def answers(bench, prompts, args, drafter, sampler):
    def decoded(decoder, drafter, ids):
        rounds = list(decoder.rounds(ids, drafter, args.new_tokens, sampler))
        return [token for r in rounds for token in r.tokens], len(rounds)

    runs, eager = [], prompts[:max(1, len(prompts) // 5)]  # graphs pay: without them it takes long
    for ids in prompts:
        runs.append([stopwatch(decoded, bench.graphed, name, ids) for name in (drafter, "none")])
    same = [ours[0][0] == vanilla[0][0] for ours, vanilla in runs]
    return {"answers": len(same), "identical": sum(same), "without_graphs": len(eager),
            "identical_without_graphs": sum(
                decoded(bench.plain, drafter, ids)[0] == run[0][0][0]
                for ids, run in zip(eager, runs)),
            "compression_rate": sum(len(ours[0][0]) for ours, _ in runs) / sum(
                ours[0][1] for ours, _ in runs),
            "speedup": statistics.median(vanilla[1] / ours[1] for ours, vanilla in runs)}


def train(found, args, device, dtype):
    """The adapter's facts; if time runs out, the next run goes on."""
    out = args.trained
    resume = ["--resume"] * (out / "checkpoint.pt").exists()
    sizes = ["--updates", "2", "--batches", "1", "--batch-tokens", "256", "--max-length", "64",
             "--window", "16", "--warmup", "1", "--eval-prompts", "1"] if args.tiny else [
        "--updates", str(args.updates), "--batches", "4", "--batch-tokens", "16384",
        "--max-length", "1024", "--window", "1024", "--passes", "2", "--warmup", "100"]
    process = subprocess.Popen([
        sys.executable, str(ROOT / "train_adapter.py"), "--model", str(args.model), "--data",
        *map(str, args.data), "--out", str(out), "--exit-layer", "2", "--architecture", "layer",
        "--device", str(device), "--dtype", dtype_name(dtype), *sizes, *resume])
    try:
        status = process.wait(60 * (args.minutes - 0.5))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it has saved, and says so
        process.wait()
        raise UserError(f"{out}: not trained to the end; the same command goes on") from None
    found |= {"exit_status": status} | (
        json.loads((out / "config.json").read_text())["training"] if status == 0 else {})
    yield found


PARTS = {"shape-7B": partial(shape, "7B"), "choices-7B": partial(choices, "7B"),
         "shape-135M": partial(shape, "135M"), "choices-135M": partial(choices, "135M"),
         **{f"equal-{name}": partial(equal, name) for name in ("bfloat16", "float16", "float32")},
         "tests": tests, "shape-1B": partial(shape, "1B"), "shape-13B": partial(shape, "13B"),
         "stories": stories, "model": model, "train": train,
         "answers": lambda found, args, device, dtype: equal(dtype_name(dtype), found, args, device,
                                                             dtype, args.trained)}
NEEDS = {"equal": ("model", "questions"), "model": ("model",), "train": ("model", "data"),
         "answers": ("model", "questions", "data")}


# --------------------------------------------------------------------------------------------------
# The page's tables

BEGIN, END = "<!-- written by bench/gpu.py -->\n", "<!-- end of what bench/gpu.py writes -->\n"
KIND = {True: "reached", False: "**missed**"}


def goals(parts):
    """[(goal, what was to be, what was found or None, whether that fits)]"""
    def first(name):
        """Of a part's first context what there is."""
        return next(iter(parts.get(name, {}).get("contexts", [])), {})

    def speedup(name):
        """At the highest rate."""
        return next((f[1] for f in first(name).get("speedups", {}).get("stops", [])[-1:]), None)

    whole = {name: part for name, part in parts.items() if not part.get("partial")}
    equal = [part for name, part in whole.items() if name.startswith("equal")]
    equal = [f for part in equal for f in part["asked"].values()] if len(equal) == 3 else []
    other = [part["memory"]["other"] for part in parts.values()
             if "other" in part.get("memory", {})]
    ours = min(whole["answers"]["asked"][f"kangaroo, {s}"]["speedup"]
               for s in SAMPLERS) if "answers" in whole else None
    tests = parts.get("tests")

    def row(goal, wanted, value, fits, shown="{:.2f}"):
        return (goal, wanted, None, None) if value is None else (
            goal, wanted, shown.format(value), fits(value))

    def of_all(goal, same, among):
        total = sum(f[among] for f in equal)
        return row(goal, "all", sum(f[same] for f in equal) if equal else None,
                   lambda n: n == total, f"{{}} of {total}")

    return [
        row("vanilla 7B at width 1: share of measured copy bandwidth (on an H200 ≥ 0.75)", "≥ 0.80",
            first("shape-7B").get("share"), lambda x: x >= 0.80),
        row("one-shape step ÷ width-1 step, 7B", "≤ 1.05", first("shape-7B").get("ratio"),
            lambda x: x <= 1.05),
        row("draft step ÷ full step, 7B, ℓ = 2", "≤ 0.10", first("shape-7B").get("cost"),
            lambda x: x <= 0.10),
        row(f"speedup at compression rate {RATES[-1]} (the paper measured 1.68 there)", "≥ 1.75",
            speedup("shape-7B"), lambda x: x >= 1.75),
        row(f"speedup of SmolLM2's shape at compression rate {SMALL_RATES[-1]}", "> 1.1",
            speedup("shape-135M"), lambda x: x > 1.1),
        row("SmolLM2, vanilla with graphs ÷ without", "≥ 4", first("model").get("graphs"),
            lambda x: x >= 4),
        row("Kangaroo ÷ vanilla, both with graphs, SmolLM2 on Spec-Bench", "> 1", ours,
            lambda x: x > 1),
        row("memory beside weights and cache, the most", "≤ 1.5 GiB", max(other, default=None),
            lambda x: x <= 1.5, "{:.2f} GiB"),
        of_all("answers identical to vanilla, each dtype, greedy and sampled, chain and tree",
               "identical", "answers"),
        of_all("graphs on ≡ graphs off on CUDA", "identical_without_graphs", "without_graphs"),
        row("all tests on CUDA", "pass", tests and tests["passed"],
            lambda n: n > 0 and tests["exit_status"] == 0, "{} passed")]


def table(*rows):
    """A table of what was measured, and an empty line before it; nothing without rows."""
    head, *rows = rows
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|"
             for row in (head, *rows)]
    return ["", lines[0], "|" + "---|" * len(head), *lines[1:]] if rows else []


def cells(row, **digits):
    """The numbers of a row with so many digits; – for what it does not have."""
    return [f"{row[key]:.{n}f}" if key in row else "–" for key, n in digits.items()]


def page_of(results):
    """What stands between the page's markers."""
    settings, parts = results.get("settings"), results["parts"]
    found = goals(parts)
    lines = [fill("Run on " + " · ".join(settings.values()) + ".", 100) if parts else
             "**Nothing on this page has been run on a GPU yet.**"]
    lines += table(("", "goal", ""), *(
        (goal, wanted, f"{value}, {KIND[bool(fits)]}")
        for goal, wanted, value, fits in found if value is not None))
    if missing := sum(value is None for _, _, value, _ in found):
        lines += ["", f"{missing} more goals (`goals` in bench/gpu.py): not run by this program."]
    contexts = [(name.removeprefix("shape-"), c) for name, part in parts.items()
                for c in part.get("contexts", [])]
    steps = dict(width_1=2, one_shape=2)
    if contexts:
        lines += ["", fill("Times in milliseconds; speedups at compression rates, with drafts that "
                           "end with the first wrong token.", 100)]
    lines += table(("", "context", "width 1", "one shape", "bandwidth share", "draft step",
                    "verification", "speedups"), *(
        (name, c["context"], *cells(c, **steps, share=2, draft=3, verification=2),
         ", ".join(f"{speedup:.2f} at {rate:.2f}" for rate, speedup in
                   c.get("speedups", {}).get("stops", [])) or "–") for name, c in contexts))
    lines += table(("other settings", "context", "width 1", "one shape", "draft step",
                    "verification", "without graphs"), *(
        (f"{name.removeprefix('choices-')}, {c['choice']}", c["context"],
         *cells(c, **steps, draft=3, verification=2, no_graphs=2))
        for name, part in parts.items() for c in part.get("choices", [])))
    lines += table(("answers", "identical to vanilla", "without graphs", "compression rate",
                    "speedup"), *(
        (f"{name.removeprefix('equal-')}, {how}", f"{f['identical']} of {f['answers']}",
         f"{f['identical_without_graphs']} of {f['without_graphs']}",
         *cells(f, compression_rate=2, speedup=2))
        for name, part in parts.items() for how, f in part.get("asked", {}).items()))
    return "\n".join([*lines, ""])


def write_tables(page, results):
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    text = head + BEGIN + page_of(results) + END + rest.split(END)[1]
    write_atomically(page, text.encode())


# --------------------------------------------------------------------------------------------------
# Command line

def parse_arguments(argv):
    parser = parser_for(__doc__, model=None, adapter=None, questions=None, out=None,
                        new_tokens=256, device=None)
    option = parser.add_argument
    option("--everything", action="store_true", help="all parts that --out does not hold yet")
    option("--parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    option("--data", nargs="+", type=Path, help="ShareGPT's conversations, to train an adapter")
    option("--trained", type=Path, default=Path("trained"), help="where that goes")
    option("--answers", type=int, default=40, help="how many questions, spread over the file")
    option("--repeats", type=int, default=2, help="timed runs behind one that records")
    option("--contexts", type=int, nargs="+", default=[512, 4096], help="tokens before the text")
    option("--updates", type=int, default=2000, help="of the training")
    option("--minutes", type=float, default=MINUTES, help="that a part has at most")
    option("--page", type=Path, help="whose tables to write (default: docs/performance.md)")
    option("--compile", action="store_true", help="fuse pointwise operations with torch.compile")
    option("--tiny", action="store_true", help="toy sizes, on any device, to test this file")
    args = parser.parse_args(argv)
    refuse_below_one(args, "answers", "new_tokens", "repeats", "updates")
    if bool(args.everything) == bool(args.parts):
        parser.error("give one of --everything and --parts (see --help)")
    if args.out is None:
        parser.error("give --out, where the results go")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here (--tiny --device cpu runs without one)")
    args.parts = list(PARTS) if args.everything else args.parts
    for part in args.parts:
        for name in NEEDS.get(part.split("-")[0], ()):
            if getattr(args, name) is None:
                parser.error(f"--{name}: part {part} needs it (--parts chooses others)")
    args.adapter = args.adapter or args.model and args.model / "adapter"
    args.page = args.page or (None if args.tiny else PAGE)
    return args


def results_for(args, device, dtype):
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    settings = {"device": name, "software": f"{software()}, CUDA {torch.version.cuda}",
                "dtype": dtype_name(dtype),
                "answers": f"{args.answers} answers of {args.new_tokens} tokens",
                "pointwise": "compiled" if args.compile else "not compiled"}
    return results_of(args.out, settings, parts={})


def is_done(part, results):
    return not results["parts"].get(part, {"partial": True}).get("partial")


def measure(part, args, device, dtype):
    """Run a part here, and write each row of its result; it is "partial" until all are there."""
    results = results_for(args, device, dtype)
    found = results["parts"].setdefault(part, {})
    found["partial"] = True

    def write():
        write_atomically(args.out, json.dumps(results, indent=1).encode())

    for row in PARTS[part](found, args, device, dtype):
        say(f"{part}: {json.dumps(row)}")
        write()
    del found["partial"]
    write()


def measure_apart(part, argv, minutes):
    """Measure a part in a process that keeps its memory, its time and its crash to itself."""
    rest = [word for word in argv if word != "--everything"]
    try:
        subprocess.run([sys.executable, __file__, *rest, "--parts", part], timeout=60 * minutes,
                       stdout=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        say(f"{part}: not done in {minutes:g} minutes")


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_arguments(argv)
    device, dtype = pick_device_and_dtype(args.device, "float32" if args.tiny else None)
    for part in args.parts:
        if is_done(part, results_for(args, device, dtype)):
            continue
        if args.everything:
            say(part)
            measure_apart(part, argv, args.minutes)
        else:
            measure(part, args, device, dtype)
    results = results_for(args, device, dtype)
    if args.page:
        write_tables(args.page, results)
    print(page_of(results))
    done = all(is_done(part, results) for part in args.parts)
    return 0 if done and all(fits is not False for *_, fits in goals(results["parts"])) else 1


if __name__ == "__main__":
    sys.exit(run_program("gpu.py", main))
