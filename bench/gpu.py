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
import copy
import gc
import random
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # nothing here needs NumPy
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.common import (
    dtype_name,
    ids_of,
    parser_for,
    pick,
    processor,
    stopwatch,
    weights_of,
)
from kangaroo import STEPS, THRESHOLD, WIDTH, Adapter, KangarooDrafter, generate
from llama import Llama, LlamaConfig, Sampler, build, one_shape, rows_are_alike
from support.decoder import DEFAULT_MODEL, Decoder, Settings, load, pick_device_and_dtype
from support.graphs import CudaRecorder, direct_recorder, fuse_pointwise, graph_drafter
from support.program import refuse_below_one, run_program

SHAPES = {  # name: (config, exit layer)
    "1B": (LlamaConfig(2048, 5632, 22, 32, 4, 64, 32000, max_position_embeddings=8192), 2),
    "7B": (LlamaConfig(4096, 11008, 32, 32, 32, 128, 32000, max_position_embeddings=8192), 2),
    "13B": (LlamaConfig(5120, 13824, 40, 40, 40, 128, 32000, max_position_embeddings=8192), 3)}
TINY_SHAPES = {"tiny": (LlamaConfig(64, 96, 4, 4, 2, 16, 300, max_position_embeddings=512), 2)}
# The paper's compression rates for a 7B: translation, questions, retrieval, MT-Bench.
RATES = 1.41, 1.87, 2.05, 2.22
PAPER, INDENT = Settings(STEPS, THRESHOLD), " " * 15


# --------------------------------------------------------------------------------------------------
# The device, and models that were never trained

def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def copy_bandwidth(device, size):
    """Bytes read and written per second by a copy of `size` bytes, the best of 10."""
    source, seconds = torch.zeros(size, dtype=torch.uint8, device=device), []
    target = torch.empty_like(source)

    def copied():
        target.copy_(source)
        synchronize(device)

    for _ in range(10):
        synchronize(device)
        seconds.append(stopwatch(copied)[1])
    return 2 * size / min(seconds)


def random_module(cls, config, device, dtype):
    """Random weights made on the device: norms are ones, matrices keep the size of what passes."""
    module = build(cls, config, device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for p in module.parameters():
        if p.dim() > 1:
            p.normal_(0, p.shape[-1] ** -0.5, generator=generator)
        else:
            p.fill_(1)
    return module.eval()


def random_decoder(name, config, exit_layer, device, dtype):
    """A Decoder without text, for a shape alone."""
    model = random_module(Llama, config, device, dtype)
    adapter = random_module(Adapter, replace(config, num_hidden_layers=1), device, dtype)
    return Decoder(Path(name), model, None, "none", None, adapter, {"exit_layer": exit_layer},
                   WIDTH)


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


class ControlledDrafter(KangarooDrafter):
    """Does all of Kangaroo's work, then proposes what follows in `text`.

    Or, once it is to be wrong, another token.
    """

    def control(self, text, rate, stops, steps):
        self.text, self.alpha = text, acceptance(rate, steps)
        self.stops, self.chance = stops, 0.0
        return self

    def draft(self, ids, n_max, cache):
        self.first = len(ids)  # the position of the draft's first token
        return super().draft(ids, n_max, cache)

    def propose(self, position):
        super().propose(position)
        drafted = position - self.first
        if drafted == 0:  # spread more evenly than random numbers would be
            self.chance = (self.chance + 0.5 * (5 ** 0.5 - 1)) % 1
        right = self.chance < self.alpha ** (drafted + 1)
        token = self.text[position]
        token = token if right else (token + 1) % self.model.config.vocab_size
        return token, 0.0 if self.stops and not right else 1.0


# --------------------------------------------------------------------------------------------------
# Measuring one model

class Bench:
    """A decoder with graphs and, to see what these are worth, one without."""

    def __init__(self, decoder, repeats):
        self.device, self.repeats = decoder.device, repeats
        self.plain, self.graphed = decoder, copy.copy(decoder)
        cuda = self.device.type == "cuda"
        self.graphed.use_graphs(CudaRecorder(self.device) if cuda else direct_recorder)
        self.graphed.model.widths = 1, WIDTH

    def controlled(self, text, rate, stops, steps=STEPS, graphs=True):
        decoder = self.graphed if graphs else self.plain
        drafter = ControlledDrafter(decoder.model, decoder.adapter, decoder.exit_layer)
        drafter = drafter.control(text, rate, stops, steps)
        return graph_drafter(drafter) if graphs else drafter

    def decode(self, drafter, prompt, n, width=WIDTH, steps=STEPS, sampler=None, eos=()):
        """(seconds per token after the first round, which prefills; all tokens; rate)"""
        rounds = generate(drafter.model, drafter, prompt, n, steps, sampler, eos, width)
        done = [next(rounds).tokens]
        rest, seconds = stopwatch(list, rounds)  # each round ends with a host sync
        done += [r.tokens for r in rest]
        tokens = sum(done, [])
        return seconds / max(1, len(tokens) - len(done[0])), tokens, len(tokens) / len(done)

    @torch.inference_mode()
    def parts(self, prompt, repeats):
        """Seconds of one draft step and of one verification, medians, right behind the prompt."""
        decoder, model, sampler = self.graphed, self.graphed.model, Sampler()
        drafter = decoder.drafter(settings=Settings(STEPS, -1.0))  # never unsure
        start, drafts, verifications = len(prompt) - 1, {1: [], STEPS: []}, []
        cache = model.new_cache(len(prompt) + 2 * WIDTH)
        drafter.prefill(prompt[:-1], cache)

        def drafted(n):
            draft = drafter.draft(prompt, n, cache)
            synchronize(self.device)
            return draft

        def verified(draft):
            x = one_shape(draft.hidden, start, cache, WIDTH, draft.parents)
            h = model.run_layers(*x, decoder.exit_layer, len(model.layers))
            logits = model.logits(h)[0, :len(draft.tokens) + 1]
            sampler.choose(logits, start + 1).tolist()

        for _ in range(repeats + 1):
            for n, seconds in drafts.items():
                drafter.seen = start
                synchronize(self.device)
                draft, spent = stopwatch(drafted, n)
                seconds.append(spent)
            verifications.append(stopwatch(verified, draft)[1])
        one, many, verification = (statistics.median(seconds[1:])  # the first ones record
                                   for seconds in (*drafts.values(), verifications))
        return (many - one) / (STEPS - 1), verification

    def methods(self, shipped, prompt, text, n):
        """{name: a run of it}; controlled ones are named (rate, whether it stops when wrong)."""
        vanilla = self.graphed.drafter("none")
        methods = {"width 1": lambda: self.decode(vanilla, prompt, n, 1),
                   "one shape": lambda: self.decode(vanilla, prompt, n)}
        if shipped:
            methods["no graphs"] = lambda: self.decode(self.plain.drafter("none"), prompt, n)
        for rate in RATES:
            for stops in (True, False):
                methods[rate, stops] = lambda rate=rate, stops=stops: self.decode(
                    self.controlled(text, rate, stops), prompt, n)
        return methods

    def table(self, shipped, context, n, bandwidth):
        """Print the figures of one context, and speedups under controlled acceptance.

        Returns what the goals ask of it.
        """
        config, source = self.plain.model.config, random.Random(context)
        prompt = [source.randrange(config.vocab_size) for _ in range(context)]
        self.graphed.model.room = context + n + 2 * WIDTH
        text = prompt + self.decode(self.graphed.drafter("none"), prompt, n)[1]
        methods = self.methods(shipped, prompt, text, n)
        results = {method: [] for method in methods}
        for repeat in range(1 + self.repeats):
            for method, run in methods.items():
                results[method] += [run()][:repeat]  # the first run records
        same = all(tokens == text[context:] for method, runs in results.items()
                   if method != "width 1" for _, tokens, _ in runs)
        seconds = {method: statistics.median(run[0] for run in runs)
                   for method, runs in results.items()}
        draft, verify = self.parts(prompt, 5 * self.repeats)
        one, shape = seconds["width 1"], seconds["one shape"]
        best = min(one, shape)
        share = {method: self.bytes_read(context + n / 2) / bandwidth / seconds[method]
                 for method in ("width 1", "one shape")}
        print(f"context {context:5}: vanilla at width 1 {one * 1e3:7.3f} ms, "
              f"{share['width 1']:.2f} of bandwidth; at the one shape {shape * 1e3:7.3f} ms, "
              f"{share['one shape']:.2f}, {shape / one:.3f} times width 1\n"
              f"{INDENT}draft step {draft * 1e3:7.3f} ms, draft cost {draft / shape:.3f}; "
              f"verification {verify * 1e3:7.3f} ms; tokens identical to vanilla's: {same}")
        for stops, when in ((True, "after a wrong token"), (False, f"after {STEPS} tokens")):
            speedups = ", ".join(
                f"{results[rate, stops][0][2]:.2f} -> {best / seconds[rate, stops]:.2f}"
                for rate in RATES)
            print(f"{INDENT}compression rate -> speedup, a draft ends {when}: {speedups}")
        graphs = seconds["no graphs"] / shape if shipped else None
        if shipped:
            print(f"{INDENT}the one shape without graphs {seconds['no graphs'] * 1e3:7.3f} ms, "
                  f"with graphs {graphs:.2f} times as fast")
        return {"share": share["width 1"], "shape": shape / one, "same": same,
                "cost": draft / shape, "speedup": best / seconds[RATES[-1], True],
                "graphs": graphs}

    def bytes_read(self, positions):
        """Of weights and of the cache's rows, for one token behind so many."""
        model = self.plain.model
        read = sum(p.nbytes for p in weights_of(model))
        if not model.config.tie_word_embeddings:  # of the embedding, a row a token is read
            read -= model.embed_tokens.weight.nbytes
        rows = self.graphed.model.memory[model.config].rows
        return read + rows.nbytes / rows.shape[3] * positions

    def print_memory(self):
        weights = sum(p.nbytes for p in weights_of(self.plain.model))
        weights += sum(p.nbytes for p in self.plain.adapter.parameters())
        cache = sum(memory.rows.nbytes for memory in self.graphed.model.memory.values())
        line = f"memory: weights {weights / 2 ** 30:.2f} GiB + cache {cache / 2 ** 30:.2f} GiB"
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            peak = torch.cuda.max_memory_reserved()
            line += (f" + other {(total - free - weights - cache) / 2 ** 30:.2f} GiB (all that the "
                     f"device has given out; PyTorch's own peak {peak / 2 ** 30:.2f} GiB)")
        print(f"{line}; {len(self.graphed.model.graphs.recordings)} recordings")


# --------------------------------------------------------------------------------------------------
# Real questions

def questions(args, device):
    """The second command's last part: are all answers vanilla's, in every dtype and sampling?"""
    asked = pick(args.questions)
    asked = asked[::max(1, len(asked) // args.answers)][:args.answers]  # spread over the file
    all_same = True
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        bench = Bench(load(args.model, args.adapter, device, dtype_name(dtype), graphs=False), 1)
        prompts = [ids_of(bench.plain, question, 1024) for question in asked]
        bench.graphed.make_room(prompts, args.new_tokens)
        for sampler in (Sampler(), Sampler(0.8, 0, 0.95, 1)):
            same, ratio = answers(bench, prompts, args.new_tokens, sampler)
            all_same = all_same and same == len(prompts)
            print(f"{dtype_name(dtype)}, temperature {sampler.temperature}: {same} of "
                  f"{len(prompts)} answers identical to vanilla's; median speedup, both with "
                  f"graphs, {ratio:.2f}", flush=True)
        del bench
        free_memory(device)
    return all_same


def answers(bench, prompts, new_tokens, sampler):
    """(how many are vanilla's, the median speedup)"""
    def decoded(ids, drafter):
        rounds = bench.graphed.rounds(ids, drafter, new_tokens, sampler)
        return [token for r in rounds for token in r.tokens]

    same, ratios = 0, []
    for i, ids in enumerate(prompts[:1] + prompts):  # the first one twice: it records
        (tokens, seconds), (vanilla, vanilla_seconds) = (
            stopwatch(decoded, ids, drafter) for drafter in ("kangaroo", "none"))
        if i:
            same += tokens == vanilla
            ratios.append(vanilla_seconds / seconds)
    return same, statistics.median(ratios)


# --------------------------------------------------------------------------------------------------
# Command line

def parse_arguments(argv):
    parser = parser_for(__doc__, model=None, adapter=None, questions=None, new_tokens=256)
    option = parser.add_argument
    option("--shapes", nargs="*", choices=SHAPES,
           help="of 1B, 7B, 13B (default: all; without a name: none)")
    option("--answers", type=int, default=40, help="so many of its questions, spread over the file")
    option("--repeats", type=int, default=3)
    option("--minutes", type=float, default=7, help="begin no further table after so many")
    option("--compile", action="store_true", help="fuse pointwise operations with torch.compile")
    option("--tiny", action="store_true", help="tiny shapes, on the CPU, to test this file")
    args = parser.parse_args(argv)
    refuse_below_one(args, "answers", "new_tokens", "repeats")
    if args.questions and not args.model:
        parser.error("--questions: give --model too")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here (--tiny runs without one)")
    args.repeats = 1 if args.tiny else args.repeats
    args.adapter = args.adapter or args.model and args.model / "adapter"
    return args


def decoders(args, device, dtype):
    """(name, title, whether it is on disk, Decoder) of shapes and models, one at a time."""
    for name, shape in (TINY_SHAPES if args.tiny else SHAPES).items():
        if args.shapes is None or name in args.shapes:
            title = f"Llama {name}, random weights"
            yield name, title, False, random_decoder(name, *shape, device, dtype)
    folders = [(DEFAULT_MODEL, DEFAULT_MODEL / "adapter"), (args.model, args.adapter)]
    dtype = dtype_name(dtype)
    for folder, adapter in folders if args.model else folders[:1]:
        yield str(folder), folder.name, True, load(folder, adapter, device, dtype, graphs=False)


def report(title, shipped, decoder, args, bandwidth, begin):
    """Print all figures of a model; returns what the goals ask of the shorter context."""
    bench, model, found = Bench(decoder, args.repeats), decoder.model, []
    contexts, n = ((16, 40), 10) if args.tiny else ((512, 4096), 128)
    weights = sum(p.numel() for p in weights_of(model)) / 1e9
    print(f"\n{title}: exit layer {decoder.exit_layer} of {len(model.layers)}, {weights:.2f}e9 "
          f"weights; rows of a step are alike: {rows_are_alike(model, WIDTH)}", flush=True)
    longest = model.config.max_position_embeddings - n
    for context in sorted({min(context, longest) for context in contexts}):
        if time.perf_counter() - begin > 60 * args.minutes:
            print(f"context {context:5}: left out after {args.minutes:g} minutes")
        else:
            found.append(bench.table(shipped, context, n, bandwidth))
    bench.print_memory()
    sys.stdout.flush()
    return found[0] if found else None


def show_goals(goals, tiny):
    print(f"\ngoals on an H100 ({'' if tiny else '7B, '}the shorter context)")
    if found := goals.get("tiny" if tiny else "7B"):
        for goal, value, fits in (
                ("vanilla at width 1: share of measured copy bandwidth >= 0.80", found["share"],
                 found["share"] >= 0.80),
                ("one-shape step ÷ width-1 step <= 1.05", found["shape"], found["shape"] <= 1.05),
                ("draft step ÷ full step <= 0.10", found["cost"], found["cost"] <= 0.10),
                (f"speedup at compression rate {RATES[-1]} >= 1.75 (a draft ends after a wrong "
                 "token)", found["speedup"], found["speedup"] >= 1.75)):
            print(f"{'reached' if fits else 'missed ':8} {value:6.3f}  {goal}")
    for name, found in goals.items():
        if found["graphs"]:
            print(f"{'reached' if found['graphs'] >= 4 else 'missed ':8} {found['graphs']:6.3f}  "
                  f"{Path(name).name}: vanilla with graphs ÷ without >= 4 (the goal is SmolLM2's)")


def main(argv=None):
    args, begin = parse_arguments(argv), time.perf_counter()
    device, dtype = pick_device_and_dtype(*(("cpu", "float32") if args.tiny else ()))
    if args.compile:
        fuse_pointwise()
    bandwidth = copy_bandwidth(device, 2 ** 20 if args.tiny else 2 ** 31)
    free_memory(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    print(f"{name} · torch {torch.__version__} · CUDA {torch.version.cuda} · {dtype_name(dtype)} · "
          f"width {WIDTH} · γ {STEPS} · measured copy bandwidth {bandwidth / 1e9:.0f} GB/s"
          f"{' · pointwise operations compiled' if args.compile else ''}", flush=True)
    print("bandwidth share = (weights + keys and values in use) ÷ measured copy bandwidth ÷ time "
          "of a token")
    goals = {}
    for name, title, shipped, decoder in decoders(args, device, dtype):
        goals[name] = report(title, shipped, decoder, args, bandwidth, begin)
        del decoder
        free_memory(device)
    goals = {name: found for name, found in goals.items() if found}
    all_same = all(found["same"] for found in goals.values())
    if args.questions:
        print()
        all_same = questions(args, device) and all_same
    show_goals(goals, args.tiny)
    print(f"{time.perf_counter() - begin:.0f} s")
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(run_program("gpu.py", main))
