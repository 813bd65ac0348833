"""Choose γ and η for an adapter on real prompts, and print the table of all pairs.

    python bench/choose.py --model DIR --adapter DIR --prompts FILE [--write]

Take prompts that no reported figure comes from. Each prompt is decoded once, then the drafter drafts from every position of the
output. A draft follows from the tokens before it alone, so the rounds of any γ and η can be walked through on paper: the counts
of tokens, rounds and drafts are exact (and compared with one real decode). The speedup is reckoned from these counts and the
median times of a vanilla step, a draft step and a verification in this run: a noisy machine then shifts all entries alike.
--write puts the best pair into the adapter's config.json.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from speed import pick  # noqa: E402

from kangaroo import WIDTH, KangarooDrafter, NoDrafter, generate, load_adapter, pick_device_and_dtype  # noqa: E402
from llama import KVCache, Sampler, load_llama, pack, read_json, room_for_draft, write_atomically  # noqa: E402
from tokenizer import Tokenizer, find_chat_template, render_chat  # noqa: E402

STEPS, THRESHOLDS = (1, 2, 3, 4, 5, 6, 7), (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def decode(model, drafter, ids, steps, args, sampler):
    """The rounds of a prompt, and the median seconds of a draft step and of the rest of a round."""
    rounds, drafting, rest, draft = [], [], [], drafter.draft

    def timed(*arguments):
        begin = time.perf_counter()
        result = draft(*arguments)
        drafting.append((time.perf_counter() - begin, len(result.tokens) + 1))
        return result

    drafter.draft = timed
    begin = None
    for round_ in generate(model, drafter, ids, args.new_tokens, steps, sampler, model.config.eos_token_ids):
        if begin is not None:  # the first round has the prompt's time in it
            rest.append(time.perf_counter() - begin - drafting[-1][0])
        rounds.append(round_)
        begin = time.perf_counter()
    return rounds, statistics.median(seconds / n for seconds, n in drafting), statistics.median(rest or [0.0])


@torch.inference_mode()
def drafts_everywhere(model, drafter, ids, output):
    """[(tokens, confidence)] of the longest drafts: one from the prompt, and one after each token of the output but the last."""
    cache = KVCache.zeros(model.config, len(model.layers), len(ids) + len(output) + WIDTH, model.norm.weight)
    drafter.prefill(ids[:-1], cache)
    drafts = []
    for i in range(len(output)):
        n_max = min(max(STEPS), room_for_draft(len(ids) + i - 1, WIDTH))
        draft = drafter.draft(ids + output[:i], n_max, cache)
        drafts.append((draft.tokens, draft.confidence))
    return drafts


def walk(drafts, output, left, steps, threshold):
    """(tokens, rounds, tokens drafted) that γ = steps and η = threshold come to; `left` tokens may be made in all."""
    done = rounds = drafted = 0
    while done < len(output):
        tokens, confidence = drafts[done]
        n = min(steps, left - done - 1, len(tokens))
        n = next((k + 1 for k in range(n) if confidence[k] <= threshold), n)
        accepted = next((k for k in range(n) if done + k >= len(output) or tokens[k] != output[done + k]), n)
        rounds, drafted, done = rounds + 1, drafted + n, min(done + accepted + 1, len(output))
    return done, rounds, drafted


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--adapter", "--prompts"):
        parser.add_argument(name, required=True)
    parser.add_argument("--each", type=int, default=4, help="prompts of each category")
    parser.add_argument("--skip", type=int, default=10, help="after the first so many of each category")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--longest", type=int, default=1024, help="of a longer prompt, only so many last tokens")
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
    sampler, exit_layer = Sampler(args.temperature, seed=2), facts["exit_layer"]
    counts, times = {(s, t): [0, 0, 0] for s in STEPS for t in THRESHOLDS}, []
    for i, ids in enumerate(prompts):
        vanilla, _, step = decode(model, NoDrafter(model), ids, 0, args, sampler)
        output = [token for round_ in vanilla for token in round_.tokens]
        drafts = drafts_everywhere(model, KangarooDrafter(model, adapter, exit_layer, 0.0, sampler), ids, output)
        for pair, sums in counts.items():
            counts[pair] = [a + b for a, b in zip(sums, walk(drafts, output, args.new_tokens, *pair))]
        pair = list(counts)[(13 * i) % len(counts)]
        rounds, draft, verify = decode(model, KangarooDrafter(model, adapter, exit_layer, pair[1], sampler), ids, pair[0], args,
                                       sampler)
        real = len(output), len(rounds), sum(len(r.draft.tokens) for r in rounds)
        assert real == walk(drafts, output, args.new_tokens, *pair), (pair, real)
        times.append((step, draft, verify))
        print(f"\r{i + 1}/{len(prompts)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    step, draft, verify = (statistics.median(seconds) for seconds in zip(*times))
    print(f"{len(prompts)} prompts, {args.new_tokens} tokens at most, temperature {args.temperature:g}, exit layer {exit_layer}; "
          f"ms: vanilla step {step * 1e3:.2f}, draft step {draft * 1e3:.2f}, verification {verify * 1e3:.2f}")
    print("speedup (compression rate)")
    print(f"{'γ':>8}" + "".join(f"{f'η {threshold}':>14}" for threshold in THRESHOLDS))
    # A round runs the shallow layers once more than it drafts; `draft` is the mean over these.
    speedup = {pair: tokens * step / (rounds * (verify + draft) + drafted * draft)
               for pair, (tokens, rounds, drafted) in counts.items()}
    for steps in STEPS:
        cells = (f"{speedup[steps, t]:.2f} ({counts[steps, t][0] / counts[steps, t][1]:.2f})" for t in THRESHOLDS)
        print(f"{steps:>8}" + "".join(f"{cell:>14}" for cell in cells))
    steps, threshold = max(speedup, key=speedup.get)
    print(f"best: γ {steps}, η {threshold}")
    if args.write:
        path = Path(args.adapter) / "config.json"
        data = read_json(path) | {"steps": steps, "threshold": threshold}
        write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
