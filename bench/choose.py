"""Choose γ and η for an adapter on real prompts, and print the table of all pairs; for a tree K
too.

    python bench/choose.py --model DIR --adapter DIR --prompts FILE [--tree [--width 32]] [--write]

Take prompts that no reported figure comes from. Each prompt is decoded once, then the drafter
drafts from every position of the output. A draft follows from the tokens before it alone, so the
rounds of any γ and η can be walked through on paper: the counts of tokens, rounds and drafts are
exact (and compared with one real decode). The speedup is reckoned from these counts and the median
times of a vanilla step, a draft step and a verification in this run: a noisy machine then shifts
all entries alike. --write puts the best pair into the adapter's config.json.

--tree chooses K, γ and η of a draft tree, which takes as many nodes as the width has room for (the
rows are computed anyway). Its growth depends on all three, so every prompt is decoded with every
setting; run it for each width. A draft step is then a level of the tree.
"""
import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings(
    "ignore", "Failed to initialize NumPy")  # PyTorch says so at import; nothing here needs it
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.speed import pick_ids, refuse_tree_width
from drafters.tree import TREE_WIDTH
from kangaroo import WIDTH, KangarooDrafter, NoDrafter, generate
from llama import KVCache, Sampler, pack, room_for_draft
from support.checkpoint import load_adapter, load_llama, read_json, write_atomically
from support.decoder import pick_device_and_dtype
from support.program import Parser, refuse_below_one, run_program
from support.tokenizer import Tokenizer, find_chat_template

STEPS, THRESHOLDS = (1, 2, 3, 4, 5, 6, 7), (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
TREE_STEPS, TREE_THRESHOLDS, CANDIDATES = (3, 4, 5, 6, 8), (0.0, 0.02, 0.05, 0.1, 0.2, 0.4), (2, 4,
                                                                                              10)


def decode(model, drafter, ids, steps, args, sampler):
    """The rounds of a prompt, and the median seconds of a draft step and of the rest of a round."""
    rounds, drafting, rest, draft = [], [], [], drafter.draft

    def timed(*arguments):
        begin = time.perf_counter()
        result = draft(*arguments)
        drafting.append((time.perf_counter() - begin, max(result.depth()) + 1))
        return result

    drafter.draft = timed
    begin = None
    for round_ in generate(model, drafter, ids, args.new_tokens, steps, sampler,
                           model.config.eos_token_ids, args.width):
        if begin is not None:  # the first round has the prompt's time in it
            rest.append(time.perf_counter() - begin - drafting[-1][0])
        rounds.append(round_)
        begin = time.perf_counter()
    return rounds, statistics.median(seconds / n
                                     for seconds, n in drafting), statistics.median(rest or [0.0])


@torch.inference_mode()
def drafts_everywhere(model, drafter, ids, output):
    """[(tokens, confidence)] of the longest drafts: one from the prompt, and one after each token
    of the output but the last."""
    cache = KVCache.zeros(model.config, len(model.layers),
                          len(ids) + len(output) + WIDTH, model.norm.weight)
    drafter.prefill(ids[:-1], cache)
    drafts = []
    for i in range(len(output)):
        n_max = min(max(STEPS), room_for_draft(len(ids) + i - 1, WIDTH))
        drafter.last = None  # what it drafted before is not what was committed
        draft = drafter.draft(ids + output[:i], n_max, cache)
        drafts.append((draft.tokens, draft.confidence))
    return drafts


def walk(drafts, output, left, steps, threshold):
    """[(tokens drafted, tokens accepted)] of the rounds that γ = steps and η = threshold come to;
    `left`: the most tokens."""
    rounds, done = [], 0
    while done < len(output):
        tokens, confidence = drafts[done]
        n = min(steps, left - done - 1, len(tokens))
        n = next((k + 1 for k in range(n) if confidence[k] <= threshold), n)
        accepted = next(
            (k for k in range(n) if done + k >= len(output) or tokens[k] != output[done + k]), n)
        rounds.append((n, accepted))
        done += accepted + 1
    return rounds


def counted(output, rounds):
    """(tokens, rounds, tokens drafted)"""
    return len(output), len(rounds), sum(drafted for drafted, _ in rounds)


def reckoned(counts, step, draft, verify):
    """The speedup that (tokens, rounds, tokens drafted) come to with these seconds of a vanilla
    step and so on.

    A round runs the shallow layers once more than it drafts; `draft` is the mean over these.
    """
    tokens, rounds, drafted = counts
    return tokens * step / (rounds * (verify + draft) + drafted * draft)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--adapter", "--prompts"):
        parser.add_argument(name, required=True)
    parser.add_argument("--each", type=int, default=4, help="prompts of each category")
    parser.add_argument("--skip", type=int, default=10,
                        help="after the first so many of each category")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--longest", type=int, default=1024,
                        help="of a longer prompt, only so many last tokens")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--tree", action="store_true")
    parser.add_argument("--width", type=int,
                        help=f"rows of a step of a tree (default: {TREE_WIDTH})")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    refuse_below_one(args, "each", "new_tokens", "longest")
    args.width = (args.width or TREE_WIDTH) if args.tree else WIDTH
    refuse_tree_width(args)
    if args.write:  # what cannot be written had better be known before measuring
        settings = read_json(Path(args.adapter) / "config.json")
    model = load_llama(args.model, *pick_device_and_dtype(args))
    adapter, facts = load_adapter(args.adapter, model)
    for module in (adapter, model):
        pack(module, args.width)
    tokenizer, (_, template) = Tokenizer(args.model, model.config), find_chat_template(args.model)
    prompts = [ids for _, ids in pick_ids(args, tokenizer, template, model.config)]
    sampler = Sampler(args.temperature, seed=2)
    all_candidates, all_steps, thresholds = (CANDIDATES, TREE_STEPS,
                                             TREE_THRESHOLDS) if args.tree else ((1,), STEPS,
                                                                                 THRESHOLDS)
    grid = [(c, s, t) for c in all_candidates for s in all_steps for t in thresholds]
    counts, times = {setting: [0, 0, 0] for setting in grid}, []

    def real(ids, candidates, steps, threshold):
        """(tokens, rounds, draft steps after the first of each round) of a decode; its times are
        kept."""
        drafter = KangarooDrafter(model, adapter, facts["exit_layer"], threshold, sampler,
                                  args.width, candidates)
        rounds, draft, verify = decode(model, drafter, ids, steps, args, sampler)
        times.append((step, draft, verify))
        return sum(len(r.tokens) for r in rounds), len(rounds), sum(
            max(r.draft.depth()) for r in rounds)

    for i, ids in enumerate(prompts):
        vanilla, _, step = decode(model, NoDrafter(model), ids, 0, args, sampler)
        output = [token for round_ in vanilla for token in round_.tokens]
        if args.tree:
            found = {setting: real(ids, *setting) for setting in grid}
        else:
            drafter = KangarooDrafter(model, adapter, facts["exit_layer"], 0.0, sampler)
            drafts = drafts_everywhere(model, drafter, ids, output)
            left = min(args.new_tokens, model.config.max_position_embeddings - len(ids))
            found = {
                setting: counted(output, walk(drafts, output, left, *setting[1:]))
                for setting in grid
            }
            setting = grid[13 * i % len(grid)]
            assert found[setting] == real(ids, *setting), (setting, found[setting])
        counts = {
            setting: [a + b
                      for a, b in zip(counts[setting], found[setting])]
            for setting in grid
        }
        print(f"\r{i + 1}/{len(prompts)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    step, draft, verify = (statistics.median(seconds) for seconds in zip(*times))
    print(
        f"{len(prompts)} prompts, {args.new_tokens} tokens at most, temperature {args.temperature:g}, exit layer "
        f"{facts['exit_layer']}, width {args.width}; ms: vanilla step {step * 1e3:.2f}, draft step {draft * 1e3:.2f}, "
        f"verification {verify * 1e3:.2f}")
    speedup = {setting: reckoned(total, step, draft, verify) for setting, total in counts.items()}
    print("speedup (compression rate)")
    for c in all_candidates:
        print(f"{f'K {c}' if args.tree else '':4}{'γ':>4}"
              + "".join(f"{f'η {threshold}':>14}" for threshold in thresholds))
        for s in all_steps:
            cells = (f"{speedup[c, s, t]:.2f} ({counts[c, s, t][0] / counts[c, s, t][1]:.2f})"
                     for t in thresholds)
            print(f"{s:>8}" + "".join(f"{cell:>14}" for cell in cells))
    candidates, steps, threshold = max(speedup, key=speedup.get)
    print(f"best: γ {steps}, η {threshold}"
          + (f", K {candidates}, {args.width - 1} nodes" if args.tree else ""))
    if args.write:
        chosen = {"steps": steps, "threshold": threshold}
        if args.tree:
            chosen = {"tree": chosen | {"top_candidates": candidates, "nodes": args.width - 1}}
        write_atomically(
            Path(args.adapter) / "config.json",
            (json.dumps(settings | chosen, indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.exit(run_program("choose.py", main))
