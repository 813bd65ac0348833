"""Choose γ, η and the width for an adapter on real prompts, and print the table; for a tree, K.

    python bench/choose.py --model DIR --adapter DIR --prompts FILE [--widths 4 6 8] [--write]
    python bench/choose.py --model DIR --adapter DIR --prompts FILE --tree [--widths 16] [--write]
    python bench/choose.py --model DIR --prompts FILE --methods kangaroo,lookup,sps --out FILE

Take prompts that no reported figure comes from. Each prompt is decoded once, then the drafter
drafts from every position of the output. A draft follows from the tokens before it alone, so the
rounds of any γ and η can be walked through on paper: the counts of tokens, rounds and drafts are
exact (and compared with one real decode). The speedup is computed from these counts and the median
times of a vanilla step, a draft step and a verification in this run: a noisy machine then shifts
all entries alike. The width, the rows of a step, is chosen by tokens per second: a CPU that is
bound by arithmetic pays for each row, and a draft of γ tokens needs no more than γ + 1. --write
puts the best into the adapter's config.json: what is fastest on this machine.

--tree chooses K, γ and η of a draft tree, which takes as many nodes as the width has room for (the
rows are computed anyway). Its growth depends on all three, so every prompt is decoded with every
setting. A draft step is then a level of the tree.

--methods decodes the prompts with the settings and widths of each method's `grid`, interleaved, and
writes the fastest to --out, for `bench/spec_bench.py --settings`.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.common import (
    GRID_STEPS,
    GRID_THRESHOLDS,
    NEEDED,
    add_tables,
    count_tokens,
    decode,
    drafts_everywhere,
    estimate_speedup,
    ids_of,
    line,
    parser_for,
    pick,
    progress,
    walk,
)
from bench.methods import Methods, add_flags, fastest_of, figures_of, names_of
from drafters.table import drafter_named
from llama import Sampler
from support.decoder import Settings, load
from support.errors import UserError, require
from support.files import read_json, write_json
from support.limits import CHAIN_WIDTH, MAX_WIDTH, TREE_WIDTH
from support.program import refuse_below_one, run_program

TREE_GRID_STEPS, TREE_GRID_THRESHOLDS = (3, 4, 5, 6, 8), (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
CANDIDATES = 2, 4, 10
WIDTHS = 2, 4, 6, 8


def parse_arguments(argv):
    parser = parser_for(__doc__, model=NEEDED, adapter=None, prompts=NEEDED, each=4, skip=10,
                        new_tokens=128, longest=1024, dtype=None, device=None, out=None)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tree", action="store_true")
    parser.add_argument("--widths", type=int, nargs="+", help="rows of a step: of a chain 2 … "
                        f"{CHAIN_WIDTH} (default: {WIDTHS}), of a tree more ({TREE_WIDTH})")
    parser.add_argument("--write", action="store_true")
    add_flags(parser, default=None)
    args = parser.parse_args(argv)
    refuse_below_one(args, "each", "new_tokens", "longest")
    if args.methods and (args.tree or args.write or args.widths):
        raise UserError("--methods: tries all widths, leave out --tree, --write and --widths")
    if args.out and not args.methods:
        raise UserError("--out: is for --methods; --write puts the best into the adapter's folder")
    if not args.methods and args.adapter is None:
        raise UserError("give --adapter (see --help)")
    args.widths = args.widths or ([TREE_WIDTH] if args.tree else WIDTHS)
    least, most = (CHAIN_WIDTH + 1, MAX_WIDTH) if args.tree else (2, CHAIN_WIDTH)
    for width in args.widths:
        require(least <= width <= most, f"--widths {width}: must be from {least} to {most}"
                + " for --tree" * args.tree)
    return args


def settings_to_try(args):
    if args.tree:
        return [Settings(steps=steps, threshold=threshold, top_candidates=candidates,
                         nodes=args.width - 1)
                for candidates in CANDIDATES for steps in TREE_GRID_STEPS
                for threshold in TREE_GRID_THRESHOLDS]
    return [Settings(steps=steps, threshold=threshold) for steps in GRID_STEPS if steps < args.width
            for threshold in GRID_THRESHOLDS]


def key(settings):
    return getattr(settings, "top_candidates", 0), settings.steps, settings.threshold


def measure(decoder, prompts, args):
    """({key: (tokens, rounds, draft steps after the first of each round)}, median seconds)

    The seconds are those of a vanilla step, a draft step and a verification.
    """
    sampler = Sampler(args.temperature, seed=2)
    grid, tables, times = settings_to_try(args), [], []
    drafter = "tree" if args.tree else "kangaroo"
    for settings in {key(s)[0]: s for s in grid}.values():
        decoder.warm_up(prompts, args.new_tokens, [("none", None), (drafter, None)], sampler,
                        settings)

    def real(ids, settings):
        found = decode(decoder, ids, drafter, args.new_tokens, sampler, settings)
        times.append((vanilla.rest, found.step, found.rest))
        depths = sum(max(r.draft.levels()) for r in found.rounds)
        return len(found.tokens), len(found.rounds), depths

    for i, ids in enumerate(progress(prompts)):
        vanilla = decode(decoder, ids, "none", args.new_tokens, sampler)
        if args.tree:
            tables.append({key(settings): real(ids, settings) for settings in grid})
            continue
        output = vanilla.tokens
        drafts = drafts_everywhere(decoder, ids, output, sampler)
        left = min(args.new_tokens, decoder.model.config.max_position_embeddings - len(ids))
        tables.append({key(s): count_tokens(
            output, walk(drafts, output, left, s.steps, s.threshold)) for s in grid})
        one = grid[13 * i % len(grid)]
        assert tables[-1][key(one)] == real(ids, one), (one, tables[-1][key(one)])
    return add_tables(tables), [statistics.median(seconds) for seconds in zip(*times)]


def show(counts, speedup, tree):
    """The tables of all settings, one for each number of candidates."""
    candidates, steps, thresholds = (sorted(set(values)) for values in zip(*counts))
    print("speedup (compression rate)")
    for c in candidates:
        label = f"K {c}" if tree else ""
        print(line(f"{label:4}{'γ':>4}", [f"η {threshold}" for threshold in thresholds], 14))
        for s in steps:
            cells = [f"{speedup[c, s, t]:.2f} ({counts[c, s, t][0] / counts[c, s, t][1]:.2f})"
                     for t in thresholds]
            print(line(f"{s:>8}", cells, 14))


def grid_of(name):
    """The settings to decode with of a method; its usual ones, if it names none."""
    return drafter_named(name).cls.grid or [{}]


def choose_methods(args):
    """Decode the prompts with each method's grid, print the table, write the best to --out."""
    names = names_of(args.methods)
    methods = Methods(args, [word for flag in ("device", "dtype", "temperature")
                             if (value := getattr(args, flag)) is not None
                             for word in (f"--{flag}", str(value))])
    for name in names:
        for i, settings in enumerate(grid_of(name)):
            methods.add(f"{name} {i}", name, settings)
    questions = pick(args.prompts, args.each, args.skip)
    methods.warm_up([question.turns[:1] for question in questions], args.new_tokens)
    turns = [methods.answers(question.turns[:1], question.line, args.new_tokens)[0]
             for question in progress(questions)]
    fastest, best = fastest_of(turns), {}
    print(f"{len(turns)} prompts, {args.new_tokens} tokens at most, against {fastest}: compression "
          "rate / speedup")
    for name, method in methods.methods.items():
        figures = figures_of(turns, name, fastest)
        if method.drafter != "none":
            best.setdefault(method.drafter, []).append((figures["speedup"], name))
        print(f"{method.drafter:12}{figures['compression_rate']:6.2f} / {figures['speedup']:.2f}  "
              f"{method.describe()}")
    chosen = {drafter: grid_of(drafter)[int(max(figures)[1].split()[1])]
              for drafter, figures in best.items()}
    for name in names:
        print(f"{name}: {chosen.get(name) or methods.left_out[f'{name} 0']}")
    if args.out:
        write_json(args.out, chosen)


def choose(args):
    """The best settings at args.width: (tokens a second, width, their key); prints the table."""
    decoder = load(args.model, device=args.device, dtype=args.dtype, width=args.width,
                   adapter=args.adapter)
    questions = pick(args.prompts, args.each, args.skip)
    prompts = [ids_of(decoder, question, args.longest) for question in questions]
    counts, (step, draft, verify) = measure(decoder, prompts, args)
    print(f"{len(prompts)} prompts, {args.new_tokens} tokens at most, temperature "
          f"{args.temperature:g}, exit layer {decoder.adapter.exit_layer}, width {args.width}; "
          f"ms: vanilla step {step * 1e3:.2f}, draft step {draft * 1e3:.2f}, verification "
          f"{verify * 1e3:.2f}")
    speedup = {key: estimate_speedup(total, step, draft, verify) for key, total in counts.items()}
    show(counts, speedup, args.tree)
    best = max(speedup, key=speedup.get)
    speed = speedup[best] / step if step else 0.0  # texts of one token have no step to time
    return speed, args.width, best


def main(argv=None):
    args, found = parse_arguments(argv), []
    if args.methods:
        return choose_methods(args)
    where = args.adapter / "config.json"
    written = read_json(where) if args.write else {}  # known before measuring
    for width in args.widths:
        args.width = width
        found.append(choose(args))
    speed, width, (candidates, steps, threshold) = max(found)
    chosen, more = {"steps": steps, "threshold": threshold, "width": width}, ""
    flags = f"--width {width} --steps {steps} --threshold {threshold}"
    if args.tree:
        chosen = {"tree": chosen | {"top_candidates": candidates, "nodes": width - 1}}
        more = f", K {candidates}, {width - 1} nodes"
        flags = f"--tree {flags} --top-candidates {candidates}"
    print(f"best: γ {steps}, η {threshold}{more}, width {width}: {speed:.1f} tokens/s")
    print(f"python kangaroo.py --model {args.model} --adapter {args.adapter} {flags} --prompt …")
    if args.write:
        write_json(where, written | chosen)


if __name__ == "__main__":
    sys.exit(run_program("choose.py", main))
