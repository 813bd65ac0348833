"""Choose γ and η for an adapter by decoding prompts with each pair of them, and print the table.

    python bench/choose.py --model DIR --adapter DIR --prompts FILE [--tree [--width 32]] [--write]

Take prompts that no reported figure comes from. Tokens, rounds and drafts are counted exactly; the speedup is reckoned from
these counts and the median times of a vanilla step, a draft step and a verification, all measured in this run: a noisy machine
then shifts all entries alike. --write puts the best pair into the adapter's config.json.

--tree chooses K, γ and η of a draft tree, which takes as many nodes as the width has room for (the rows are computed anyway):
run it for each width. A draft step is a level of the tree.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from speed import pick  # noqa: E402

from kangaroo import TREE_WIDTH, WIDTH, KangarooDrafter, NoDrafter, generate, load_adapter, pick_device_and_dtype  # noqa: E402
from llama import Sampler, load_llama, pack, read_json, write_atomically  # noqa: E402
from tokenizer import Tokenizer, find_chat_template, render_chat  # noqa: E402

STEPS, THRESHOLDS = (2, 3, 4, 5, 6, 7), (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8)
TREE_STEPS, TREE_THRESHOLDS, CANDIDATES = (3, 4, 5, 6, 8), (0.0, 0.02, 0.05, 0.1, 0.2, 0.4), (2, 4, 10)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--adapter", "--prompts"):
        parser.add_argument(name, required=True)
    parser.add_argument("--each", type=int, default=4, help="prompts of each category")
    parser.add_argument("--skip", type=int, default=10, help="after the first so many of each category")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--longest", type=int, default=512, help="of a longer prompt, only so many last tokens")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--tree", action="store_true")
    parser.add_argument("--width", type=int, default=TREE_WIDTH, help="rows of a step for the tree")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    width = args.width if args.tree else WIDTH
    all_steps, thresholds, all_candidates = (TREE_STEPS, TREE_THRESHOLDS, CANDIDATES) if args.tree else (STEPS, THRESHOLDS, (1,))
    model = load_llama(args.model, *pick_device_and_dtype(args))
    adapter, facts = load_adapter(args.adapter, model)
    for module in (adapter, model):
        pack(module, width)
    tokenizer, (_, template) = Tokenizer(args.model, model.config), find_chat_template(args.model)
    prompts = [tokenizer.encode(render_chat(template, [text]))[-args.longest:] for _, text in
               pick(args.prompts, args.each, args.skip)]
    sampler, eos, exit_layer = Sampler(args.temperature, seed=2), model.config.eos_token_ids, facts["exit_layer"]
    draft_seconds, verify_seconds, step_seconds = [], [], []

    def decode(ids, candidates, steps, threshold):
        """(tokens, rounds, draft steps after the first of each round) of one prompt."""
        drafter = KangarooDrafter(
            model, adapter, exit_layer, threshold, sampler, width, candidates) if steps else NoDrafter(model)
        draft, spent = drafter.draft, []

        def timed(*arguments):
            begin = time.perf_counter()
            result = draft(*arguments)
            spent.append(time.perf_counter() - begin)
            return result

        drafter.draft = timed
        rounds, begin = [], None
        for round_ in generate(model, drafter, ids, args.new_tokens, steps, sampler, eos, width):
            if begin is not None:
                rest = time.perf_counter() - begin - spent[-1]
                (verify_seconds if steps else step_seconds).append(rest)
                if steps:
                    draft_seconds.append(spent[-1] / (max(round_.draft.depth()) + 1))
            rounds.append(round_)
            begin = time.perf_counter()
        return sum(len(r.tokens) for r in rounds), len(rounds), sum(max(r.draft.depth()) for r in rounds)

    grid = [(c, s, t) for c in all_candidates for s in all_steps for t in thresholds]
    counts = {}
    for setting in [(1, 0, 0.0), *grid]:
        counts[setting] = [sum(n) for n in zip(*(decode(ids, *setting) for ids in prompts))]
        print(f"\r{len(counts)}/{1 + len(grid)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    step, draft, verify = (statistics.median(s) for s in (step_seconds, draft_seconds, verify_seconds))
    print(f"{len(prompts)} prompts, {args.new_tokens} tokens at most, temperature {args.temperature:g}, exit layer {exit_layer}, "
          f"width {width}; ms: vanilla step {step * 1e3:.2f}, draft step {draft * 1e3:.2f}, verification {verify * 1e3:.2f}")
    print("speedup (compression rate)")
    best = (0, None)
    for candidates in all_candidates:
        label = f"K {candidates}" if args.tree else ""
        print(f"{label:4}{'γ':>4}" + "".join(f"{f'η {threshold}':>14}" for threshold in thresholds))
        for steps in all_steps:
            cells = []
            for threshold in thresholds:
                tokens, rounds, drafted = counts[candidates, steps, threshold]
                speedup = tokens * step / (rounds * (verify + draft) + drafted * draft)
                best = max(best, (speedup, (candidates, steps, threshold)))
                cells.append(f"{speedup:.2f} ({tokens / rounds:.2f})")
            print(f"{steps:>8}" + "".join(f"{cell:>14}" for cell in cells))
    candidates, steps, threshold = best[1]
    print(f"best: γ {steps}, η {threshold}" + (f", K {candidates}, {width - 1} nodes" if args.tree else ""))
    if args.write:
        path = Path(args.adapter) / "config.json"
        chosen = {"steps": steps, "threshold": threshold}
        if args.tree:
            chosen = {"tree": chosen | {"top_candidates": candidates, "nodes": width - 1}}
        write_atomically(path, (json.dumps(read_json(path) | chosen, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
