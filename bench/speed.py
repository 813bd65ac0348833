"""Speed and memory of decoding: ratios in one process, methods interleaved run by run, medians.

    python bench/speed.py --model DIR [--adapter DIR]
    python bench/speed.py --model DIR --adapter DIR --prompts FILE [--each 10] \\
        [--temperature 0.8] [--tree [--width 32]]
    python bench/speed.py --model DIR --widths 8 16 32

The first compares, for one prompt of about 100 tokens and the same number of new tokens: vanilla
decoding at width 1, vanilla at the one shape (the third command: at several widths), Kangaroo if an
adapter is given, and the transformers package's greedy `generate` with its default cache where that
package is installed. Prefill is included in all of them; nobody stops at an end-of-sequence token.

The second decodes many prompts, to their ends, and prints compression rate and speedup against the
faster of the two vanilla decodings, prompt by prompt interleaved, and whether Kangaroo's tokens
equal vanilla's in every run. --tree adds a draft tree and vanilla decoding at the tree's width,
with weights packed for it; a tree's tokens are held against those.
"""
import statistics
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.common import (
    NEEDED,
    copy_bandwidth,
    decode,
    dtype_name,
    ids_of,
    machine,
    parser_for,
    pick,
    progress,
    refuse_tree_width,
    rotated,
    stopwatch,
    weights_of,
)
from drafters.tree import TREE_WIDTH
from kangaroo import STEPS, THRESHOLD, WIDTH, generate
from llama import MAX_WIDTH, Sampler
from support.decoder import Decoder, Settings, load, pick_device_and_dtype
from support.errors import UserError
from support.program import refuse_below_one, run_program

import torch

PROMPT = (
    "Kangaroos are large marsupials that live in Australia. They have strong hind legs, a long "
    "tail for balance, and a pouch in which the mother carries her joey for many months after its "
    "birth. Most of them feed on grass at dawn and at dusk, and rest in the shade while the sun is "
    "high. A group of kangaroos is called a mob, and its members warn one another of danger by "
    "thumping the ground with their feet. Explain to a child who has never seen one how a kangaroo "
    "jumps, why it can cross long distances without getting tired, and what it does when it meets "
    "a river on its way.")


def load_for(args, width):
    """A decoder with weights packed for steps of this width."""
    return load(args.model, args.adapter or False, args.device, args.dtype, width)


# --------------------------------------------------------------------------------------------------
# One prompt

def peak_memory(device):
    """The most memory that this process has ever had, in MB: resident, or given out by a GPU."""
    if device.type == "cuda":  # PyTorch's allocator keeps what it once had
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / 1e6
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def ours(decoder, prompt, n, drafter="none", width=None):
    """n tokens, past any end of sequence, with the paper's settings."""
    drafter = decoder.drafter(drafter, settings=Settings(STEPS, THRESHOLD))
    rounds = generate(decoder.model, drafter, prompt, n, width=width or decoder.width)
    return [token for r in rounds for token in r.tokens]


def theirs(args, decoder, prompt):
    """{name: function of n} of transformers' generate, if that package is installed."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: left out")
        return {}
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=decoder.dtype)
    model, ids = model.to(decoder.device).eval(), torch.tensor([prompt], device=decoder.device)

    def run(n):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                               min_new_tokens=n, max_new_tokens=n, pad_token_id=0)
        return found[0, len(prompt):].tolist()

    return {f"transformers {transformers.__version__}": run}


def one_prompt(args):
    """The first table of the docstring."""
    decoder = load_for(args, WIDTH)
    prompt, context = decoder.tokenizer.encode(PROMPT), decoder.model.config.max_position_embeddings
    if len(prompt) + args.new_tokens > context:
        raise UserError(f"--new-tokens {args.new_tokens}: the context has room for "
                        f"{context - len(prompt)} behind the prompt")
    if args.memory:
        decoder.make_room([prompt], args.new_tokens)
        ours(decoder, prompt, args.new_tokens)
        print(peak_memory(decoder.device))
        return
    decoder.make_room([prompt], args.new_tokens)
    methods = {"vanilla, width 1": partial(ours, decoder, prompt, width=1)}
    for width in args.widths:
        wide = decoder if width == WIDTH else load_for(args, width)
        wide.make_room([prompt], args.new_tokens)
        methods[f"vanilla, one shape (width {width})"] = partial(ours, wide, prompt)
    if args.adapter:
        methods["Kangaroo"] = partial(ours, decoder, prompt, drafter="kangaroo")
    methods |= theirs(args, decoder, prompt)
    compare(args, decoder, prompt, methods)
    print_memory(args, decoder, prompt)


def compare(args, decoder, prompt, methods):
    """Run all methods, interleaved, and print a line for each."""
    for method in methods.values():
        method(n=args.new_tokens)  # the first pass over a shape compiles kernels, or records them
    seconds, tokens, bandwidth = {name: [] for name in methods}, {}, []
    for _ in range(args.repeats):
        bandwidth.append(copy_bandwidth(decoder.device, 2 ** 28))
        for name, method in methods.items():
            tokens[name], spent = stopwatch(partial(method, n=args.new_tokens))
            seconds[name].append(spent)
            assert len(tokens[name]) == args.new_tokens
    bandwidth = statistics.median(bandwidth)
    weights = sum(p.nbytes for p in weights_of(decoder.model))
    print(f"{args.model.name} · {dtype_name(decoder.dtype)} · {decoder.device} ({machine()}) · "
          f"torch {torch.__version__}\n{len(prompt)} prompt tokens, {args.new_tokens} new, median "
          f"of {args.repeats} interleaved runs")
    print(f"{'':32} {'tokens/s':>9} {'ms/token':>9} {'÷ width 1':>10} {'bandwidth share':>16}")
    for name in methods:
        each = statistics.median(seconds[name]) / args.new_tokens
        ratio = statistics.median(b / a for a, b in zip(seconds["vanilla, width 1"], seconds[name]))
        print(f"{name:32} {1 / each:9.1f} {each * 1e3:9.1f} {ratio:10.2f} "
              f"{weights / bandwidth / each:16.2f}")
    print(f"bandwidth share = {weights / 1e6:.0f} MB of weights ÷ {bandwidth / 1e9:.1f} GB/s "
          "(a measured copy) ÷ seconds a token")
    names = [name for name in methods if f"(width {WIDTH})" in name or name == "Kangaroo"]
    if len(names) == 2:
        print(f"Kangaroo's tokens equal vanilla's: {tokens[names[0]] == tokens[names[1]]}")


def print_memory(args, decoder, prompt):
    """One line: what the peak memory of a process that only decodes is made of, in MB.

    On a GPU all processes count, this one too, so what they have is named first.
    """
    this = [sys.executable, __file__, "--model", args.model, "--dtype", dtype_name(decoder.dtype),
            "--device", str(decoder.device), "--new-tokens", str(args.new_tokens), "--memory"]
    base, peak = (float(subprocess.run([*this, what], capture_output=True, text=True,
                                       check=True).stdout) for what in ("nothing", "decode"))
    weights = sum(p.nbytes for p in weights_of(decoder.model)) / 1e6
    cache = decoder.model.new_cache(len(prompt) + args.new_tokens + WIDTH).rows.nbytes / 1e6
    first = "before" if decoder.device.type == "cuda" else "Python and torch"
    print(f"peak memory {peak:.0f} MB = {base:.0f} {first} + {weights:.0f} weights + {cache:.0f} "
          f"cache + {peak - base - weights - cache:.0f} other")


# --------------------------------------------------------------------------------------------------
# Many prompts

class Method(NamedTuple):
    decoder: Decoder
    drafter: str
    settings: Settings
    width: int    # rows of a step
    vanilla: str  # the method whose tokens it must give

    def decode(self, ids, new_tokens, sampler):
        return decode(self.decoder, ids, self.drafter, new_tokens, sampler, self.settings,
                      self.width)


def methods_of(args):
    """({name: Method}, their settings in words)"""
    decoder = load_for(args, WIDTH)
    chain = decoder.settings(steps=args.steps, threshold=args.threshold)
    methods = {"width 1": Method(decoder, "none", chain, 1, "one shape"),
               "one shape": Method(decoder, "none", chain, WIDTH, "one shape"),
               "Kangaroo": Method(decoder, "kangaroo", chain, WIDTH, "one shape")}
    text = f"exit layer {decoder.exit_layer}, γ {chain.steps}, η {chain.threshold}"
    if args.tree:
        wide = load_for(args, args.width)
        tree = wide.settings("tree", steps=args.tree_steps, threshold=args.tree_threshold,
                             top_candidates=args.top_candidates, nodes=args.nodes)
        methods |= {"wide shape": Method(wide, "none", tree, args.width, "wide shape"),
                    "tree": Method(wide, "tree", tree, args.width, "wide shape")}
        text += (f" · tree: width {args.width}, {tree.nodes} nodes, {tree.top_candidates} "
                 f"candidates, γ {tree.steps}, η {tree.threshold}")
    return methods, text


def each(figures):
    """Seconds a token."""
    return figures["seconds"] / figures["tokens"]


def figures_of(runs, vanilla):
    """Of the runs of a method on a prompt: the counts of one, its median seconds in all."""
    first = runs[0]
    return {"seconds": statistics.median(sum(run.seconds) for run in runs),
            "tokens": len(first.tokens), "rounds": len(first.rounds),
            "drafting": sum(first.drafting),
            "drafted": sum(len(r.draft.tokens) for r in first.rounds),
            "accepted": sum(r.accepted for r in first.rounds),
            "levels": sum(max(r.draft.levels()) for r in first.rounds),
            "same": all(run.tokens == vanilla.tokens for run in runs)}


def measure(methods, prompts, args, sampler):
    """[{method: figures}] of each prompt."""
    figures = []
    for i, ids in enumerate(progress(prompts)):
        runs = {name: [] for name in methods}
        for repeat in range(args.repeats):
            for name in rotated(methods, i + repeat):
                runs[name].append(methods[name].decode(ids, args.new_tokens, sampler))
        figures.append({name: figures_of(runs[name], runs[method.vanilla][0])
                        for name, method in methods.items()})
    return figures


def print_table(name, vanilla, categories, figures):
    """A line for each category: compression rate, speedup, and whether all was identical."""
    print(f"{name:24} {'prompts':>7} {'tokens':>7} {'compression rate':>17} {'speedup':>8} "
          f"{'identical':>10}")
    for category in [*dict.fromkeys(categories), "all"]:
        rows = [f for c, f in zip(categories, figures) if category in (c, "all")]
        tokens, rounds, same = (sum(f[name][key] for f in rows)
                                for key in ("tokens", "rounds", "same"))
        speedup = statistics.median(each(f[vanilla]) / each(f[name]) for f in rows)
        print(f"{category:24} {len(rows):7} {tokens:7} {tokens / rounds:17.2f} {speedup:8.2f} "
              f"{same:>3} of {len(rows):3}")


def print_rounds(name, total, vanilla):
    """A line: tokens drafted and accepted, and what drafting costs beside a step of its vanilla."""
    print(f"{name}: {total['drafted'] / total['rounds']:.2f} tokens drafted a round, "
          f"{total['accepted'] / max(1, total['drafted']):.0%} of them accepted, "
          f"{total['drafting'] / total['seconds']:.0%} of its time drafting, "
          f"{total['drafting'] / (total['levels'] + total['rounds']) * 1e3:.2f} ms a draft step; a "
          f"vanilla step of its width takes {each(vanilla) * 1e3:.2f} ms")


def print_parts(method, prompts, new_tokens, sampler):
    """One line: which part of Kangaroo's time goes where, after the first round of each prompt."""
    decoder, spent, sums = method.decoder, Counter(), Counter()
    model, adapter, depth = decoder.model, decoder.adapter, decoder.exit_layer

    def watch(owner, name, part):
        inner = getattr(owner, name)

        def timed(*arguments, **more):
            result, seconds = stopwatch(partial(inner, **more), *arguments)
            spent[part(*arguments)] += seconds
            return result

        object.__setattr__(owner, name, timed)

    def layers(*arguments):
        return "draft: layers" if arguments[-1] == depth else "verify: layers"

    watch(model, "run_layers", layers)
    watch(model, "logits", lambda *_: "verify: LM head")
    watch(adapter, "forward", lambda *_: "draft: adapter")
    watch(adapter.head or model.lm_head, "forward", lambda *_: "draft: LM head")
    watch(sampler, "choose", lambda *_: "sampling")
    for ids in prompts:
        rounds = decoder.rounds(ids, method.drafter, new_tokens, sampler, settings=method.settings)
        next(rounds)
        spent.clear()
        begin = time.perf_counter()
        list(rounds)
        sums["all"] += time.perf_counter() - begin
        sums.update(spent)
    if adapter.head is None:
        sums["draft: LM head"] -= sums["verify: LM head"]  # the same module
    every = sums.pop("all")
    parts = [*sorted(sums.items()), ("Python and the rest", every - sums.total())]
    shares = ", ".join(f"{part} {seconds / every:.0%}" for part, seconds in parts)
    print(f"where Kangaroo's time goes: {shares}")


def many_prompts(args):
    """The second table of the docstring."""
    methods, settings = methods_of(args)
    sampler = Sampler(args.temperature, top_p=args.top_p, seed=1)
    decoder, drafting = methods["Kangaroo"].decoder, ["Kangaroo", "tree"][:1 + args.tree]
    questions = pick(args.prompts, args.each, args.skip)
    prompts = [ids_of(decoder, question, args.longest) for question in questions]
    for method in methods.values():
        method.decoder.warm_up(prompts, args.new_tokens, [(method.drafter, method.width)], sampler)
    figures = measure(methods, prompts, args, sampler)
    total = {name: {key: sum(f[name][key] for f in figures) for key in figures[0][name]}
             for name in methods}
    fastest = min((name for name in methods if name not in drafting),
                  key=lambda name: each(total[name]))
    print(f"{args.model.name} · {dtype_name(decoder.dtype)} · {machine()} · torch "
          f"{torch.__version__} · {settings} · temperature {args.temperature}")
    for name in drafting:
        print_table(name, fastest, [question.category for question in questions], figures)
    speeds = ", ".join(f"{name} {1 / each(total[name]):.1f}" for name in methods)
    print(f"fastest vanilla: {fastest} · tokens/s, prefill included: {speeds}")
    for name in drafting:
        print_rounds(name, total[name], total[methods[name].vanilla])
    if not decoder.graphed:  # a replay has no parts that Python sees
        print_parts(methods["Kangaroo"], prompts[::max(1, len(prompts) // 6)], args.new_tokens,
                    sampler)
    if args.tree:
        rate = {name: total[name]["tokens"] / total[name]["rounds"] for name in drafting}
        faster = statistics.median(each(f["Kangaroo"]) / each(f["tree"]) for f in figures)
        print(f"tree against chain: compression rate {rate['tree'] / rate['Kangaroo']:.2f} times, "
              f"speed {faster:.2f} times")


# --------------------------------------------------------------------------------------------------
# Command line

def parse_arguments(argv):
    parser = parser_for(__doc__, model=NEEDED, adapter=None, prompts=None, each=10, skip=0,
                        new_tokens=128, longest=1024, dtype=None, device=None)
    option = parser.add_argument
    option("--repeats", type=int, default=7)
    option("--temperature", type=float, default=0.0)
    option("--top-p", type=float, default=1.0)
    option("--steps", type=int, help="γ (default: the adapter's)")
    option("--threshold", type=float, help="η (default: the adapter's)")
    option("--tree", action="store_true", help="with --prompts: a draft tree too")
    option("--width", type=int, default=TREE_WIDTH, help="rows of a step for the tree")
    option("--nodes", type=int, help="the most tokens in the tree (default: the adapter's, or what "
           "the width takes)")
    option("--top-candidates", type=int, help="of a node of the tree (default: the adapter's)")
    option("--tree-steps", type=int, help="γ of the tree (default: the adapter's)")
    option("--tree-threshold", type=float, help="η of the tree (default: the adapter's)")
    option("--widths", type=int, nargs="+", default=[WIDTH],
           help="without --prompts: vanilla at these widths")
    option("--memory", choices=("nothing", "decode"),
           help="print the peak memory of doing just this, and stop")
    args = parser.parse_args(argv)
    refuse_below_one(args, "new_tokens", "repeats", "each", "longest")
    for width in args.widths:
        if not 1 <= width <= MAX_WIDTH:
            raise UserError(f"--widths {width}: must be from 1 to {MAX_WIDTH}")
    if args.prompts and not args.adapter:
        raise UserError("--prompts: compares with Kangaroo, give --adapter DIR too")
    refuse_tree_width(args)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.memory == "nothing":
        device, _ = pick_device_and_dtype(args.device, args.dtype)
        torch.zeros(1, device=device)
        print(peak_memory(device))
    elif args.prompts:
        many_prompts(args)
    else:
        one_prompt(args)


if __name__ == "__main__":
    sys.exit(run_program("speed.py", main))
