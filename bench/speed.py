"""Speed and memory of decoding, measured: ratios in one process, methods interleaved token budget
by token budget, medians.

    python bench/speed.py --model DIR [--adapter DIR] python bench/speed.py --model DIR --adapter
    DIR --prompts FILE [--each 10] [--temperature 0.8] [--tree [--width 32]] python bench/speed.py
    --model DIR --widths 8 16 32

The first compares, for one prompt of about 100 tokens and the same number of new tokens: vanilla
decoding at width 1, vanilla at the one shape (the third command: at several widths), Kangaroo if an
adapter is given, and the transformers package's greedy `generate` with its default cache where that
package is installed. Prefill is included in all of them; nobody stops at an end-of-sequence token.

The second decodes many prompts, to their ends, and prints compression rate and speedup against the
faster of the two vanilla decodings, prompt by prompt interleaved, and whether Kangaroo's tokens
equal vanilla's in every run. --tree adds a draft tree and vanilla decoding at the tree's width,
with weights packed for it; a tree's tokens are held against those.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings(
    "ignore", "Failed to initialize NumPy")  # PyTorch says so at import; nothing here needs it
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from drafters.tree import TOP_CANDIDATES, TREE_STEPS, TREE_THRESHOLD, TREE_WIDTH
from kangaroo import STEPS, THRESHOLD, WIDTH, KangarooDrafter, NoDrafter, generate
from llama import CHAIN_WIDTH, KVCache, Sampler, UserError, pack
from support.checkpoint import load_adapter, load_llama
from support.data import json_turns
from support.decoder import pick_device_and_dtype
from support.program import Parser, refuse_below_one, run_program
from support.tokenizer import Tokenizer, find_chat_template, render_chat

PROMPT = (
    "Kangaroos are large marsupials that live in Australia. They have strong hind legs, a long tail for balance, and a pouch "
    "in which the mother carries her joey for many months after its birth. Most of them feed on grass at dawn and at dusk, and "
    "rest in the shade while the sun is high. A group of kangaroos is called a mob, and its members warn one another of danger "
    "by thumping the ground with their feet. Explain to a child who has never seen one how a kangaroo jumps, why it can cross "
    "long distances without getting tired, and what it does when it meets a river on its way.")


def peak_memory():
    """The most resident memory this process has ever had, in MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return next(
        int(line.split()[1])
        for line in status.read_text().splitlines()
        if line.startswith("VmHWM")) / 1000


def processor():
    """The CPU's own name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")),
                platform.machine())


def read_bandwidth():
    """Bytes per second of one pass over 256 MB, best of 5."""
    data = torch.ones(64 * 1024 * 1024)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - begin)
    return data.numel() * 4 / min(seconds)


def ours(model, prompt, n, width, adapter=None, exit_layer=None):
    drafter = KangarooDrafter(model, adapter, exit_layer,
                              width=width) if adapter else NoDrafter(model)
    rounds = [r.tokens for r in generate(model, drafter, prompt, n, width=width)]
    return sum(rounds, []), len(rounds)


MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem",
            "humanities")


class Question(NamedTuple):
    line: int  # of the file
    category: str  # Spec-Bench's subtask; "prompts" in other files
    turns: list  # what the user says, turn by turn


def pick(path, each, skip):
    """[Question]: `each` of each category, after the first `skip`, of a file of prompts or of
    Spec-Bench's questions."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from None
    taken, seen = [], Counter()
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        turns, category = [line], "prompts"
        if line.startswith("{"):
            turns = json_turns(line, f"{path}:{i}")
            category = str(json.loads(line).get("category", category))
        category = "mt_bench" if category in MT_BENCH else category
        seen[category] += 1
        if skip < seen[category] <= skip + each:
            taken.append(Question(i, category, turns))
    if not taken:
        raise UserError(
            f"{path}: of its {seen.total()} prompts, after the first {skip} of each category, none is left (--skip)"
        )
    return taken


def pick_ids(args, tokenizer, template, config):
    """[(category, ids)] of first turns; of what is too long the last tokens, so that there is room
    for one more."""
    longest = min(args.longest, config.max_position_embeddings - 1)
    return [(question.category, tokenizer.encode(render_chat(template,
                                                             question.turns[:1]))[-longest:])
            for question in pick(args.prompts, args.each, args.skip)]


def refuse_tree_width(args):
    if args.tree and not CHAIN_WIDTH < args.width <= KVCache.BLOCK:
        raise UserError(
            f"--width {args.width}: must be above {CHAIN_WIDTH} and at most {KVCache.BLOCK} for --tree"
        )


def print_parts(model, drafting, width, steps, prompts, args):
    """One line: which part of Kangaroo's time goes where, after the first round of each prompt."""
    spent, sums, (adapter, depth, _, sampler, *_) = Counter(), Counter(), drafting

    def watch(owner, name, part):
        inner = getattr(owner, name)

        def timed(*arguments, **more):
            begin = time.perf_counter()
            result = inner(*arguments, **more)
            spent[part(*arguments)] += time.perf_counter() - begin
            return result

        object.__setattr__(owner, name, timed)

    watch(model, "run_layers", lambda *arguments: "draft: layers"
          if arguments[-1] == depth else "verify: layers")
    watch(model, "logits", lambda *_: "verify: LM head")
    watch(adapter, "forward", lambda *_: "draft: adapter")
    watch(adapter.head or model.lm_head, "forward", lambda *_: "draft: LM head")
    watch(sampler, "choose", lambda *_: "sampling")
    for ids in prompts:
        rounds = generate(model, KangarooDrafter(model, *drafting), ids, args.new_tokens, steps,
                          sampler, model.config.eos_token_ids, width)
        next(rounds)
        spent.clear()
        begin = time.perf_counter()
        list(rounds)
        sums["all"] += time.perf_counter() - begin
        sums.update(spent)
    if adapter.head is None:
        sums["draft: LM head"] -= sums["verify: LM head"]  # the same module
    rest = sums["all"] - sum(seconds for part, seconds in sums.items() if part != "all")
    print("where Kangaroo's time goes: "
          + ", ".join(f"{part} {seconds / sums['all']:.0%}"
                      for part, seconds in [*sorted(sums.items()), ("Python and the rest", rest)]
                      if part != "all"))


def many_prompts(args, load):
    """The second table of the docstring; load(width) gives model, adapter and the adapter's facts,
    packed for that width."""
    model, adapter, facts = load(WIDTH)
    tokenizer, (_, template) = Tokenizer(args.model, model.config), find_chat_template(args.model)
    sampler = Sampler(args.temperature, top_p=args.top_p, seed=1)
    exit_layer, eos = facts["exit_layer"], model.config.eos_token_ids
    chain = {"steps": STEPS, "threshold": THRESHOLD} | facts
    chain |= {
        name: value
        for name in ("steps", "threshold")
        if (value := getattr(args, name)) is not None
    }
    methods = {
        "width 1": (model, None, 1), "one shape": (model, None, WIDTH),
        "Kangaroo": (model, (adapter, exit_layer, chain["threshold"], sampler, WIDTH), WIDTH,
                     chain["steps"])
    }
    vanilla_of = {"width 1": "one shape", "one shape": "one shape", "Kangaroo": "one shape"}
    settings = f"exit layer {exit_layer}, γ {chain['steps']}, η {chain['threshold']}"
    if args.tree:
        tree = {"steps": TREE_STEPS, "threshold": TREE_THRESHOLD, "top_candidates": TOP_CANDIDATES
                } | facts.get("tree", {})
        tree |= {
            name: value
            for name, value in (("steps", args.tree_steps), ("threshold", args.tree_threshold),
                                ("top_candidates", args.top_candidates), ("nodes", args.nodes))
            if value is not None
        }
        nodes = min(tree.get("nodes", args.width), args.width - 1)
        wide_model, wide_adapter, _ = load(args.width)
        more = wide_adapter, exit_layer, tree["threshold"], sampler, args.width, tree[
            "top_candidates"], nodes
        methods |= {
            "wide shape": (wide_model, None, args.width),
            "tree": (wide_model, more, args.width, tree["steps"])
        }
        vanilla_of |= {"wide shape": "wide shape", "tree": "wide shape"}
        settings += (
            f" · tree: width {args.width}, {nodes} nodes, {tree['top_candidates']} candidates, γ {tree['steps']}, "
            f"η {tree['threshold']}")

    def decode(ids, model, drafting, width, steps=0):
        drafter = KangarooDrafter(model, *drafting) if drafting else NoDrafter(model)
        spent, draft = [0.0], drafter.draft

        def timed(*arguments):
            begin = time.perf_counter()
            result = draft(*arguments)
            spent[0] += time.perf_counter() - begin
            return result

        drafter.draft = timed
        begin = time.perf_counter()
        rounds = list(generate(model, drafter, ids, args.new_tokens, steps, sampler, eos, width))
        seconds = time.perf_counter() - begin
        return {
            "seconds": seconds, "drafting": spent[0], "rounds": len(rounds),
            "ids": [t for r in rounds for t in r.tokens], "drafted": sum(
                len(r.draft.tokens) for r in rounds), "accepted": sum(r.accepted for r in rounds),
            "levels": sum(max(r.draft.depth()) for r in rounds)
        }

    prompts = pick_ids(args, tokenizer, template, model.config)
    for method in methods.values():
        decode(prompts[0][1][:40], *method)  # the first pass over a shape compiles kernels
    runs = []
    for i, (category, ids) in enumerate(prompts):
        results = {name: [] for name in methods}
        for repeat in range(args.repeats):
            first = (i + repeat) % len(methods)
            for name in list(methods)[first:] + list(methods)[:first]:  # nobody is always first
                results[name].append(decode(ids, *methods[name]))
        for name, r in results.items():
            r[0] |= {
                "seconds": statistics.median(x["seconds"]
                                             for x in r) / len(r[0]["ids"]),  # of one token
                "same": all(x["ids"] == results[vanilla_of[name]][0]["ids"] for x in r)
            }
        runs.append((category, {name: r[0] for name, r in results.items()}))
        print(f"\r{i + 1}/{len(prompts)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    total = {
        name: sum(run[name]["seconds"] * len(run[name]["ids"])
                  for _, run in runs)
        for name in methods
    }
    tokens = {name: sum(len(run[name]["ids"]) for _, run in runs) for name in methods}
    vanilla = min((name for name, method in methods.items() if method[1] is None),
                  key=lambda name: total[name] / tokens[name])
    dtype = str(model.norm.weight.dtype).removeprefix("torch.")
    print(
        f"{Path(args.model).name} · {dtype} · {processor()}, {torch.get_num_threads()} threads · torch {torch.__version__} · "
        f"{settings} · temperature {args.temperature}")
    for method in ("Kangaroo", "tree") if args.tree else ("Kangaroo",):
        print(
            f"{method:24} {'prompts':>7} {'tokens':>7} {'compression rate':>17} {'speedup':>8} {'identical':>10}"
        )
        for name in [*dict.fromkeys(category for category, _ in runs), "all"]:
            rows = [run for category, run in runs if name in (category, "all")]
            n, rounds = sum(len(run[method]["ids"]) for run in rows), sum(run[method]["rounds"]
                                                                          for run in rows)
            speedup = statistics.median(run[vanilla]["seconds"] / run[method]["seconds"]
                                        for run in rows)
            print(f"{name:24} {len(rows):7} {n:7} {n / rounds:17.2f} {speedup:8.2f} "
                  f"{sum(run[method]['same'] for run in rows):>3} of {len(rows):3}")
    speeds = ", ".join(f"{name} {tokens[name] / total[name]:.1f}" for name in methods)
    print(f"fastest vanilla: {vanilla} · tokens/s, prefill included: {speeds}")
    for method in ("Kangaroo", "tree") if args.tree else ("Kangaroo",):
        drafted, accepted, drafting, rounds, levels = (sum(run[method][key]
                                                           for _, run in runs)
                                                       for key in ("drafted", "accepted",
                                                                   "drafting", "rounds", "levels"))
        own = vanilla_of[method]
        print(
            f"{method}: {drafted / rounds:.2f} tokens drafted a round, {accepted / max(1, drafted):.0%} of them accepted, "
            f"{drafting / total[method]:.0%} of its time drafting, {drafting / (levels + rounds) * 1e3:.2f} ms a draft step; "
            f"a vanilla step of its width takes {total[own] / tokens[own] * 1e3:.2f} ms")
    print_parts(*methods["Kangaroo"], [ids for _, ids in prompts[::max(1,
                                                                       len(prompts) // 6)]], args)
    if args.tree:
        rate = {
            name: tokens[name] / sum(run[name]["rounds"]
                                     for _, run in runs)
            for name in ("Kangaroo", "tree")
        }
        faster = statistics.median(run["Kangaroo"]["seconds"] / run["tree"]["seconds"]
                                   for _, run in runs)
        print(
            f"tree against chain: compression rate {rate['tree'] / rate['Kangaroo']:.2f} times, speed {faster:.2f} times"
        )


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter",
                        help="an adapter's folder, or random; without it Kangaroo is left out")
    parser.add_argument("--dtype", help="default: the command line's")
    parser.add_argument("--device")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompts",
                        help="a prompt a line, or Spec-Bench's JSONL: decode these instead")
    parser.add_argument("--each", type=int, default=10**9, help="so many prompts of each category")
    parser.add_argument("--skip", type=int, default=0,
                        help="after the first so many of each category")
    parser.add_argument("--longest", type=int, default=1024,
                        help="of a longer prompt, only so many last tokens")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--steps", type=int, help="γ (default: the adapter's)")
    parser.add_argument("--threshold", type=float, help="η (default: the adapter's)")
    parser.add_argument("--tree", action="store_true", help="with --prompts: a draft tree too")
    parser.add_argument("--width", type=int, default=TREE_WIDTH, help="rows of a step for the tree")
    parser.add_argument(
        "--nodes", type=int,
        help="the most tokens in the tree (default: the adapter's, or what the width takes)")
    parser.add_argument("--top-candidates", type=int,
                        help="of a node of the tree (default: the adapter's)")
    parser.add_argument("--tree-steps", type=int, help="γ of the tree (default: the adapter's)")
    parser.add_argument("--tree-threshold", type=float,
                        help="η of the tree (default: the adapter's)")
    parser.add_argument("--widths", type=int, nargs="+", default=[WIDTH],
                        help="without --prompts: vanilla at these widths")
    parser.add_argument("--memory", choices=("nothing", "decode"),
                        help="print the peak memory of doing just this, and stop")
    args = parser.parse_args(argv)
    refuse_below_one(args, "new_tokens", "repeats", "each", "longest")
    for width in args.widths:
        if not 1 <= width <= KVCache.BLOCK:
            raise UserError(f"--widths {width}: must be from 1 to {KVCache.BLOCK}")
    if args.prompts and not args.adapter:
        raise UserError("--prompts: compares with Kangaroo, give --adapter DIR too")
    refuse_tree_width(args)
    if args.memory == "nothing":
        print(peak_memory())
        return
    device, dtype = pick_device_and_dtype(args)
    model = load_llama(args.model, device, dtype)
    weights = sum(p.nbytes for p in model.parameters())
    prompt, context = Tokenizer(args.model,
                                model.config).encode(PROMPT), model.config.max_position_embeddings
    if not args.prompts and len(prompt) + args.new_tokens > context:
        raise UserError(
            f"--new-tokens {args.new_tokens}: the context has room for {context - len(prompt)} behind the prompt"
        )

    def load(width):
        model = load_llama(args.model, device, dtype)
        adapter, facts = load_adapter(args.adapter, model) if args.adapter else (None, {})
        for module in (adapter, model) if adapter else (model,):
            pack(module, width)
        return model, adapter, facts

    if args.prompts:
        many_prompts(args, load)
        return
    model, adapter, facts = load(WIDTH)
    if args.memory:
        ours(model, prompt, args.new_tokens, WIDTH)
        print(peak_memory())
        return

    methods = {"vanilla, width 1": lambda n: ours(model, prompt, n, 1)[0]}
    for width in args.widths:
        wide = model if width == WIDTH else load(width)[0]
        methods[f"vanilla, one shape (width {width})"] = lambda n, wide=wide, width=width: ours(
            wide, prompt, n, width)[0]
    if args.adapter:
        methods["Kangaroo"] = lambda n: ours(model, prompt, n, WIDTH, adapter, facts["exit_layer"])[
            0]
    try:
        import transformers
        theirs = transformers.AutoModelForCausalLM.from_pretrained(args.model,
                                                                   dtype=dtype).to(device).eval()
        ids = torch.tensor([prompt], device=device)
        methods[f"transformers {transformers.__version__}"] = lambda n: theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=n,
            max_new_tokens=n, pad_token_id=0)[0, len(prompt):].tolist()
    except ImportError:
        print("transformers is not installed: left out")

    for method in methods.values():
        method(8)  # the first pass over a shape compiles kernels
    seconds, tokens, bandwidth = {name: [] for name in methods}, {}, []
    for _ in range(args.repeats):
        bandwidth.append(read_bandwidth())
        for name, method in methods.items():
            begin = time.perf_counter()
            tokens[name] = method(args.new_tokens)
            seconds[name].append(time.perf_counter() - begin)
            assert len(tokens[name]) == args.new_tokens
    bandwidth = statistics.median(bandwidth)

    print(
        f"{Path(args.model).name} · {str(dtype).removeprefix('torch.')} · {device} ({processor()}, "
        f"{torch.get_num_threads()} threads) · torch {torch.__version__}\n{len(prompt)} prompt tokens, {args.new_tokens} new, "
        f"median of {args.repeats} interleaved runs")
    print(f"{'':32} {'tokens/s':>9} {'ms/token':>9} {'÷ width 1':>10} {'bandwidth share':>16}")
    first = "vanilla, width 1"
    for name in methods:
        each = statistics.median(seconds[name]) / args.new_tokens
        ratio = statistics.median(b / a for a, b in zip(seconds[first], seconds[name]))
        print(
            f"{name:32} {1 / each:9.1f} {each * 1e3:9.1f} {ratio:10.2f} {weights / bandwidth / each:16.2f}"
        )
    print(
        f"bandwidth share = {weights / 1e6:.0f} MB of weights ÷ {bandwidth / 1e9:.1f} GB/s (measured reads) ÷ seconds a token"
    )
    names = [name for name in methods if f"(width {WIDTH})" in name or name == "Kangaroo"]
    if len(names) == 2:
        print(f"Kangaroo's tokens equal vanilla's: {tokens[names[0]] == tokens[names[1]]}")
    if device.type == "cpu":
        this = [
            sys.executable, __file__, "--model", args.model, "--dtype",
            str(dtype).removeprefix("torch."), "--new-tokens",
            str(args.new_tokens)
        ]
        base, peak = (float(
            subprocess.run([*this, "--memory", what], capture_output=True, text=True,
                           check=True).stdout) for what in ("nothing", "decode"))
        cache = KVCache.zeros(model.config, len(model.layers),
                              len(prompt) + args.new_tokens + WIDTH, model.norm.weight)
        cached = sum(rows.nbytes for rows in cache.k + cache.v) / 1e6
        print(
            f"peak memory {peak:.0f} MB = {base:.0f} Python and torch + {weights / 1e6:.0f} weights + {cached:.0f} cache "
            f"+ {peak - base - weights / 1e6 - cached:.0f} other")


if __name__ == "__main__":
    sys.exit(run_program("speed.py", main))
