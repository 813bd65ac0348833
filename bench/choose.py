"""Choose γ and η for an adapter by decoding prompts with each pair of them, and print the table.

    python bench/choose.py --model DIR --adapter DIR --prompts FILE [--write]

Take prompts that no reported figure comes from. Tokens, rounds and drafts are counted exactly; the speedup is reckoned from
these counts and the median times of a vanilla step, a draft step and a verification, all measured in this run: a noisy machine
then shifts all entries alike. --write puts the best pair into the adapter's config.json.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from speed import pick  # noqa: E402

from kangaroo import WIDTH, KangarooDrafter, NoDrafter, generate, load_adapter, pick_device_and_dtype  # noqa: E402
from llama import Sampler, load_llama, pack, read_json, write_atomically  # noqa: E402
from tokenizer import Tokenizer, find_chat_template, render_chat  # noqa: E402

STEPS, THRESHOLDS = (2, 3, 4, 5, 6, 7), (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8)


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
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    model = load_llama(args.model, *pick_device_and_dtype(args))
    adapter, facts = load_adapter(args.adapter, model)
    for module in (adapter, model):
        pack(module, WIDTH)
    tokenizer, (_, template) = Tokenizer(args.model, model.config), find_chat_template(args.model)
    prompts = [tokenizer.encode(render_chat(template, [text]))[-args.longest:] for _, text in
               pick(args.prompts, args.each, args.skip)]
    sampler, eos, exit_layer = Sampler(args.temperature, seed=2), model.config.eos_token_ids, facts["exit_layer"]
    draft_seconds, verify_seconds, step_seconds = [], [], []

    def decode(ids, steps, threshold):
        """(tokens, rounds, tokens drafted) of one prompt."""
        drafter = KangarooDrafter(model, adapter, exit_layer, threshold, sampler) if steps else NoDrafter(model)
        draft, spent = drafter.draft, []

        def timed(*arguments):
            begin = time.perf_counter()
            result = draft(*arguments)
            spent.append(time.perf_counter() - begin)
            return result

        drafter.draft = timed
        rounds, begin = [], None
        for round_ in generate(model, drafter, ids, args.new_tokens, steps, sampler, eos):
            if begin is not None:
                rest = time.perf_counter() - begin - spent[-1]
                (verify_seconds if steps else step_seconds).append(rest)
                if steps:
                    draft_seconds.append(spent[-1] / (len(round_.draft.tokens) + 1))
            rounds.append(round_)
            begin = time.perf_counter()
        return sum(len(r.tokens) for r in rounds), len(rounds), sum(len(r.draft.tokens) for r in rounds)

    counts = {}
    for steps, threshold in [(0, 0.0)] + [(s, t) for s in STEPS for t in THRESHOLDS]:
        counts[steps, threshold] = [sum(n) for n in zip(*(decode(ids, steps, threshold) for ids in prompts))]
        print(f"\r{len(counts)}/{1 + len(STEPS) * len(THRESHOLDS)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    step, draft, verify = (statistics.median(s) for s in (step_seconds, draft_seconds, verify_seconds))
    print(f"{len(prompts)} prompts, {args.new_tokens} tokens at most, temperature {args.temperature:g}, exit layer {exit_layer}; "
          f"ms: vanilla step {step * 1e3:.2f}, draft step {draft * 1e3:.2f}, verification {verify * 1e3:.2f}")
    print("speedup (compression rate)")
    print(f"{'γ':>8}" + "".join(f"{f'η {threshold}':>14}" for threshold in THRESHOLDS))
    best = (0, None)
    for steps in STEPS:
        cells = []
        for threshold in THRESHOLDS:
            tokens, rounds, drafted = counts[steps, threshold]
            speedup = tokens * step / (rounds * (verify + draft) + drafted * draft)
            best = max(best, (speedup, (steps, threshold)))
            cells.append(f"{speedup:.2f} ({tokens / rounds:.2f})")
        print(f"{steps:>8}" + "".join(f"{cell:>14}" for cell in cells))
    print(f"best: γ {best[1][0]}, η {best[1][1]}")
    if args.write:
        path = Path(args.adapter) / "config.json"
        data = read_json(path) | {"steps": best[1][0], "threshold": best[1][1]}
        write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
