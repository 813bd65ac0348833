"""What a GPU makes of it: one command, no download, at most 8 minutes on an H100.

    python bench/gpu.py
    python bench/gpu.py --model DIR --adapter DIR [--questions FILE]
    python bench/gpu.py --tiny

The first takes Llama shapes of 1B, 7B and 13B with random weights made on the device, then the
stories model. Its speedups are of real Kangaroo rounds whose acceptance is controlled: the drafter
does all of Kangaroo's work, but proposes the known continuation with probability α after each token
that was right; α is that of a compression rate 1 + α + α² + … + α^γ as the paper reports. Two of
them are printed: drafts that end with their first wrong token, as a perfect second early exit
would, and drafts that always have γ tokens. Prefill and recording are not timed; the vanilla beside
it is the faster of width 1 and the one shape.

The second adds a model from disk, and decodes the first turns of 40 of Spec-Bench's questions as
well: 256 tokens, every dtype, greedy and sampled, Kangaroo against vanilla decoding. The third runs
on any machine within seconds, to test this file.
"""
import argparse
import gc
import random
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

warnings.filterwarnings(
    "ignore", "Failed to initialize NumPy")  # PyTorch says so at import; nothing here needs it
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.speed import pick, processor
from drafters.tree import Node
from kangaroo import STEPS, THRESHOLD, WIDTH, Adapter, KangarooDrafter, NoDrafter, generate
from llama import Llama, LlamaConfig, Sampler, build, one_shape, rows_are_alike
from support.checkpoint import load_adapter, load_llama
from support.decoder import DEFAULT_MODEL, pick_device_and_dtype
from support.graphs import (
    CudaRecorder,
    GraphedAdapter,
    GraphedLlama,
    direct_recorder,
    fuse_pointwise,
    graph_drafter,
)
from support.program import Parser, refuse_below_one, run_program
from support.tokenizer import Tokenizer, find_chat_template, render_chat

SHAPES = {  # name: (config, exit layer)
    "1B": (LlamaConfig(2048, 5632, 22, 32, 4, 64, 32000, max_position_embeddings=8192), 2),
    "7B": (LlamaConfig(4096, 11008, 32, 32, 32, 128, 32000, max_position_embeddings=8192), 2),
    "13B": (LlamaConfig(5120, 13824, 40, 40, 40, 128, 32000, max_position_embeddings=8192), 3)}
TINY_SHAPES = {"tiny": (LlamaConfig(64, 96, 4, 4, 2, 16, 300, max_position_embeddings=512), 2)}
RATES = (1.41, 1.87, 2.05, 2.22
         )  # the paper's compression rates for a 7B: translation, questions, retrieval, MT-Bench


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device, size):
    """Bytes read and written per second by a copy of `size` bytes, the best of 10."""
    source, seconds = torch.zeros(size, dtype=torch.uint8, device=device), []
    target = torch.empty_like(source)
    for _ in range(10):
        synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * size / min(seconds)


def random_llama(cls, config, device, dtype):
    """A module with random weights made on the device: norms are ones, matrices keep the size of
    what passes through."""
    module = build(cls, config, device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for p in module.parameters():
        p.normal_(0, p.shape[-1] ** -0.5, generator=generator) if p.dim() > 1 else p.fill_(1)
    return module.eval()


def acceptance(rate, steps):
    """α with 1 + α + α² + … + α^steps = rate."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle ** w
                                          for w in range(steps + 1)) < rate else (low, middle)
    return low


class ControlledDrafter(KangarooDrafter):
    """Does all of Kangaroo's work, then proposes what follows in `text`, or, once it is to be
    wrong, another token."""

    def control(self, text, rate, stops, steps):
        self.text, self.alpha, self.stops, self.chance = text, acceptance(rate, steps), stops, 0.0
        return self

    def children(self, x, rows, first, start):
        super().children(x, rows, first, start)
        depth = rows[0].depth
        if depth == 0:
            self.chance = (self.chance + 0.5 *
                           (5 ** 0.5 - 1)) % 1  # spread more evenly than random numbers would be
        right = self.chance < self.alpha ** (depth + 1)
        token = self.text[start + 1 + depth]
        token = token if right else (token + 1) % self.model.config.vocab_size
        sure = 0.0 if self.stops and not right else 1.0
        return [Node(token, first, depth + 1, sure, sure)]


class Bench:
    """One model with its adapter; `graphed` and `plain` are the two with and without graphs."""

    def __init__(self, model, adapter, exit_layer, args):
        self.device, self.args, self.exit_layer = model.norm.weight.device, args, exit_layer
        record = CudaRecorder(self.device) if self.device.type == "cuda" else direct_recorder
        graphed = GraphedLlama(model, (1, WIDTH), record)
        self.plain, self.graphed = (model, adapter), (graphed, GraphedAdapter(adapter, graphed))

    def drafter(self, cls=KangarooDrafter, threshold=THRESHOLD, sampler=None, graphs=True):
        """A drafter on the graphed model or, to see what graphs are worth, on the plain one."""
        model, adapter = self.graphed if graphs else self.plain
        drafter = cls(model, adapter, self.exit_layer, threshold, sampler)
        return graph_drafter(drafter) if graphs else drafter

    def decode(self, drafter, prompt, n, width=WIDTH, steps=STEPS, sampler=None, eos=()):
        """(seconds after the first round, which prefills, per token; all tokens; compression
        rate)"""
        rounds = generate(drafter.model, drafter, prompt, n, steps, sampler, eos, width)
        done = [next(rounds).tokens]
        begin = time.perf_counter()
        done += [r.tokens for r in rounds]  # each round ends with a host sync
        seconds, tokens = time.perf_counter() - begin, sum(done, [])
        return seconds / max(1, len(tokens) - len(done[0])), tokens, len(tokens) / len(done)

    @torch.inference_mode()
    def parts(self, prompt, repeats):
        """Seconds of one draft step and of one verification, medians, right behind the prompt."""
        (model, _), drafter, sampler = self.graphed, self.drafter(
            threshold=-1.0), Sampler()  # never unsure
        start, n_layers, drafts, verifications = len(prompt) - 1, len(
            model.layers), {1: [], STEPS: []}, []
        cache = model.new_cache(len(prompt) + 2 * WIDTH)
        drafter.prefill(prompt[:-1], cache)
        for _ in range(repeats + 1):
            for n, seconds in drafts.items():
                drafter.last, drafter.seen = None, start
                synchronize(self.device)
                begin = time.perf_counter()
                draft = drafter.draft(prompt, n, cache)
                synchronize(self.device)
                seconds.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            x = one_shape(draft.hidden, start, cache, WIDTH, draft.parents)
            logits = model.logits(model.run_layers(*x, self.exit_layer,
                                                   n_layers))[0, :len(draft.tokens) + 1]
            sampler.choose(logits, start + 1).tolist()
            verifications.append(time.perf_counter() - begin)
        one, many, verification = (statistics.median(seconds[1:])
                                   for seconds in (*drafts.values(), verifications))
        return (many - one) / (STEPS - 1), verification

    def table(self, name, context, n, bandwidth):
        """Print one row of figures and the speedups under controlled acceptance; returns what the
        goals ask of it."""
        model, repeats, config = self.plain[0], self.args.repeats, self.plain[0].config
        source = random.Random(context)
        prompt = [source.randrange(config.vocab_size) for _ in range(context)]
        self.graphed[0].room = context + n + 2 * WIDTH
        vanilla = NoDrafter(self.graphed[0])
        text = prompt + self.decode(vanilla, prompt, n)[1]
        methods = {
            "width 1": lambda: self.decode(vanilla, prompt, n, 1),
            "one shape": lambda: self.decode(vanilla, prompt, n)
        }
        if name == "shipped":
            methods["no graphs"] = lambda: self.decode(NoDrafter(model), prompt, n)
        for rate in RATES:
            for stops in (True, False):
                methods[rate, stops] = lambda rate=rate, stops=stops: self.decode(
                    self.drafter(ControlledDrafter).control(text, rate, stops, STEPS), prompt, n)
        results = {method: [] for method in methods}
        for repeat in range(1 + repeats):
            for method, run in methods.items():
                results[method] += [run()][:repeat]  # the first run records
        same = all(tokens == text[context:] for method, runs in results.items()
                   if method != "width 1" for _, tokens, _ in runs)
        seconds = {
            method: statistics.median(run[0]
                                      for run in runs)
            for method, runs in results.items()
        }
        draft, verify = self.parts(prompt, 5 * repeats)
        read = sum(p.nbytes for p in model.parameters())
        if not config.tie_word_embeddings:  # of the embedding, a row a token is read
            read -= model.embed_tokens.weight.nbytes
        rows = self.graphed[0].memory[config].rows
        read += rows.nbytes / rows.shape[3] * (context + n / 2)
        best, share = min(seconds["width 1"], seconds["one shape"]), {
            name: read / bandwidth / t
            for name, t in seconds.items()
        }
        print(
            f"context {context:5}: vanilla at width 1 {seconds['width 1'] * 1e3:7.3f} ms, {share['width 1']:.2f} of bandwidth; "
            f"at the one shape {seconds['one shape'] * 1e3:7.3f} ms, {share['one shape']:.2f}, "
            f"{seconds['one shape'] / seconds['width 1']:.3f} times width 1\n"
            f"               draft step {draft * 1e3:7.3f} ms, draft cost {draft / seconds['one shape']:.3f}; "
            f"verification {verify * 1e3:7.3f} ms; tokens identical to vanilla's: {same}")
        for stops, when in ((True, "after a wrong token"), (False, f"after {STEPS} tokens")):
            speedups = ", ".join(
                f"{results[rate, stops][0][2]:.2f} -> {best / seconds[rate, stops]:.2f}"
                for rate in RATES)
            print(f"               compression rate -> speedup, a draft ends {when}: {speedups}")
        if name == "shipped":
            print(
                f"               the one shape without graphs {seconds['no graphs'] * 1e3:7.3f} ms, "
                f"with graphs {seconds['no graphs'] / seconds['one shape']:.2f} times as fast")
        return {
            "share": share["width 1"], "shape": seconds["one shape"] / seconds["width 1"],
            "same": same, "cost": draft / seconds["one shape"],
            "speedup": best / seconds[RATES[-1], True],
            "graphs": seconds["no graphs"] / seconds["one shape"] if name == "shipped" else None
        }

    def print_memory(self):
        model, adapter = self.plain
        weights = sum(p.nbytes for p in {*model.parameters(), *adapter.parameters()})
        cache = sum(memory.rows.nbytes for memory in self.graphed[0].memory.values())
        line = f"memory: weights {weights / 2 ** 30:.2f} GiB + cache {cache / 2 ** 30:.2f} GiB"
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            line += (
                f" + other {(total - free - weights - cache) / 2 ** 30:.2f} GiB (all that the device has given out; "
                f"PyTorch's own peak {torch.cuda.max_memory_reserved() / 2 ** 30:.2f} GiB)")
        print(f"{line}; {len(self.graphed[0].graphs.recordings)} recordings")


def free_memory(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def load(folder, adapter, device, dtype):
    model = load_llama(folder, device, dtype)
    adapter, facts = load_adapter(adapter, model)
    return model, adapter, facts["exit_layer"], facts


def questions(args, device):
    """The second command's last part: how many answers are identical, and whether Kangaroo is
    faster, by dtype and sampling."""
    tokenizer, (_, template) = Tokenizer(args.model, LlamaConfig.load(
        args.model)), find_chat_template(args.model)
    prompts = [question.turns[0] for question in pick(args.questions, 10 ** 9, 0)]
    prompts = prompts[::max(1, len(prompts) // args.answers)][:args.answers]  # spread over the file
    prompts, all_same = [
        tokenizer.encode(render_chat(template, [text]))[-1024:] for text in prompts
    ], True
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model, adapter, exit_layer, facts = load(args.model, args.adapter, device, dtype)
        bench, eos = Bench(model, adapter, exit_layer, args), model.config.eos_token_ids
        bench.graphed[0].room = max(map(len, prompts)) + args.new_tokens + 2 * WIDTH
        for sampler in (Sampler(), Sampler(0.8, 0, 0.95, 1)):
            more, same, ratios = dict(steps=facts.get("steps", STEPS), sampler=sampler,
                                      eos=eos), 0, []
            for i, ids in enumerate(prompts[:1] + prompts):  # the first one twice: it records
                drafter = bench.drafter(threshold=facts.get("threshold", THRESHOLD),
                                        sampler=sampler)
                answers, times = [], [time.perf_counter()]
                for who in (drafter, NoDrafter(bench.graphed[0])):
                    answers.append(bench.decode(who, ids, args.new_tokens, **more)[1])
                    times.append(time.perf_counter())
                if i:
                    same += answers[0] == answers[1]
                    ratios.append((times[2] - times[1]) / (times[1] - times[0]))
            all_same = all_same and same == len(prompts)
            print(
                f"{str(dtype).removeprefix('torch.')}, temperature {sampler.temperature}: {same} of {len(prompts)} answers "
                f"identical to vanilla's; median speedup, both with graphs, {statistics.median(ratios):.2f}",
                flush=True)
        del model, adapter, bench, drafter, who
        free_memory(device)
    return all_same


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES,
                        help="of 1B, 7B, 13B (default: all; without a name: none)")
    parser.add_argument("--model", help="a model folder to measure too")
    parser.add_argument("--adapter",
                        help="its adapter's folder (default: the folder `adapter` in it)")
    parser.add_argument("--questions", help="Spec-Bench's JSONL")
    parser.add_argument("--answers", type=int, default=40,
                        help="so many of its questions, spread over the file")
    parser.add_argument("--new-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=7,
                        help="begin no further table after so many")
    parser.add_argument("--compile", action="store_true",
                        help="fuse pointwise operations with torch.compile")
    parser.add_argument("--tiny", action="store_true",
                        help="tiny shapes, on the CPU, to test this file")
    parser.set_defaults(device=None, dtype=None, tf32=False)
    args = parser.parse_args(argv)
    refuse_below_one(args, "answers", "new_tokens", "repeats")
    begin = time.perf_counter()
    if args.questions and not args.model:
        parser.error("--questions: give --model too")
    if args.tiny:
        args.device, args.dtype, args.repeats = "cpu", "float32", 1
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here (--tiny runs without one)")
    args.adapter = args.adapter or args.model and Path(args.model) / "adapter"
    device, dtype = pick_device_and_dtype(args)
    if args.compile:
        fuse_pointwise()
    shapes, contexts, n, copied = (TINY_SHAPES, (16, 40), 10,
                                   2 ** 20) if args.tiny else (SHAPES, (512, 4096), 128, 2 ** 31)
    shapes = {
        name: shape
        for name, shape in shapes.items()
        if args.shapes is None or name in args.shapes
    }
    bandwidth = copy_bandwidth(device, copied)
    free_memory(device)
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else processor()} · torch {torch.__version__} · CUDA "
        f"{torch.version.cuda} · {str(dtype).removeprefix('torch.')} · width {WIDTH} · γ {STEPS} · measured copy bandwidth "
        f"{bandwidth / 1e9:.0f} GB/s{' · pointwise operations compiled' if args.compile else ''}",
        flush=True)
    print(
        "bandwidth share = (weights + keys and values in use) ÷ measured copy bandwidth ÷ time of a token"
    )

    def report(title, kind, model, adapter, exit_layer):
        bench, found = Bench(model, adapter, exit_layer, args), {}
        weights = sum(p.numel() for p in model.parameters()) / 1e9
        print(
            f"\n{title}: exit layer {exit_layer} of {len(model.layers)}, {weights:.2f}e9 weights; rows of a step are alike: "
            f"{rows_are_alike(model, WIDTH)}", flush=True)
        for context in sorted(
            {min(context, model.config.max_position_embeddings - n)
             for context in contexts}):
            if time.perf_counter() - begin > 60 * args.minutes:
                print(f"context {context:5}: left out after {args.minutes:g} minutes")
                continue
            result = bench.table(kind, context, n, bandwidth)
            found = found or result  # the goals are for the shorter context
        bench.print_memory()
        sys.stdout.flush()
        return found or None

    goals = {}
    for name, (config, exit_layer) in shapes.items():
        model = random_llama(Llama, config, device, dtype)
        adapter = random_llama(Adapter, replace(config, num_hidden_layers=1), device, dtype)
        goals[name] = report(f"Llama {name}, random weights", "random", model, adapter, exit_layer)
        del model, adapter
        free_memory(device)
    folders = [(DEFAULT_MODEL, DEFAULT_MODEL / "adapter"), (args.model, args.adapter)]
    for folder, adapter_folder in folders if args.model else folders[:1]:
        model, adapter, exit_layer, _ = load(folder, adapter_folder, device, dtype)
        goals[str(folder)] = report(Path(folder).name, "shipped", model, adapter, exit_layer)
        del model, adapter
        free_memory(device)
    goals = {name: found for name, found in goals.items() if found}
    all_same = all(found["same"] for found in goals.values())
    if args.questions:
        print()
        all_same = questions(args, device) and all_same
    seven = goals.get("7B" if not args.tiny else "tiny")
    print(f"\ngoals on an H100 ({'7B, ' if not args.tiny else ''}the shorter context)")
    if seven:
        for goal, value, fits in (
            ("vanilla at width 1: share of measured copy bandwidth >= 0.80", seven["share"],
             seven["share"]
             >= 0.80), ("one-shape step ÷ width-1 step <= 1.05", seven["shape"], seven["shape"]
                        <= 1.05), ("draft step ÷ full step <= 0.10", seven["cost"], seven["cost"]
                                   <= 0.10),
            (f"speedup at compression rate {RATES[-1]} >= 1.75 (a draft ends after a wrong token)",
             seven["speedup"], seven["speedup"] >= 1.75)):
            print(f"{'reached' if fits else 'missed ':8} {value:6.3f}  {goal}")
    for name, found in goals.items():
        if found["graphs"]:
            print(
                f"{'reached' if found['graphs'] >= 4 else 'missed ':8} {found['graphs']:6.3f}  {Path(name).name}: vanilla with "
                "graphs ÷ without >= 4 (the goal is SmolLM2's)")
    print(f"{time.perf_counter() - begin:.0f} s")
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(run_program("gpu.py", main))
