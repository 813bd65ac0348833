"""Does the order of summation matter in a tree? Count the logits that differ from vanilla's.

    python bench/order.py [--model DIR --adapter DIR] [--prompts FILE]
    python bench/order.py --cost [--model DIR]

Decodes prompts with a draft tree twice, greedily: with attention as it is here, which adds up each
node's keys and values in the order of their positions, and with the usual tree attention, whose
mask alone knows the tree and which adds up in the order in which the nodes lie in the cache. A row
of logits is one that chose a token; rows behind the first other token are not counted.

The second command times all layers of a chain's step with the attention that keeps the order, which
a chain does not need, against PyTorch's fused one, interleaved: what it would cost to have one
attention for every width.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import llama
import support.attention
from bench.common import parser_for, pick, stopwatch
from drafters.tree import TOP_CANDIDATES, TREE_STEPS, TREE_THRESHOLD
from kangaroo import WIDTH, generate
from support.decoder import DEFAULT_MODEL, Settings, load
from support.limits import TREE_WIDTH
from support.program import refuse_below_one, run_program

import torch

SETTINGS = Settings(steps=TREE_STEPS, threshold=TREE_THRESHOLD, top_candidates=TOP_CANDIDATES,
                    nodes=TREE_WIDTH - 1)
in_order = support.attention.attend_in_order


def by_slot(q, k, v, mask, columns, shared):
    """Attention to the keys and values of each row in the order in which they lie in the cache."""
    by_slot = torch.full_like(mask, -torch.inf).scatter_reduce(1, columns, mask, "amax")
    slots = torch.arange(k.shape[1], device=q.device).expand_as(columns)
    return in_order(q, k, v, by_slot, slots, shared)


def decode(decoder, drafter, prompt, n):
    """(ids, the row of logits that chose each of them), past any end of sequence."""
    model, verified = decoder.model, []
    logits, drafter = model.logits, decoder.drafter(drafter, settings=SETTINGS)
    model.logits = lambda h: verified.append(logits(h)) or verified[-1]
    rounds = list(generate(model, drafter, prompt, n, TREE_STEPS, width=TREE_WIDTH))
    del model.logits
    rows = [x[0, [0, *r.path][:len(r.tokens)]] for x, r in zip(verified, rounds)]
    return [token for r in rounds for token in r.tokens], torch.cat(rows)


def compare(decoder, prompts, n):
    """(rows of logits that differ from vanilla's, rows compared)"""
    unequal = total = 0
    for prompt in prompts:
        prompt = decoder.tokenizer.encode(prompt)
        vanilla, vanilla_rows = decode(decoder, "none", prompt, n)
        ids, rows = decode(decoder, "tree", prompt, n)
        differ = (i for i, pair in enumerate(zip(ids, vanilla)) if pair[0] != pair[1])
        same = next(differ, len(ids) - 1) + 1
        unequal += (rows[:same] != vanilla_rows[:same]).any(-1).sum().item()
        total += same
    return unequal, total


@torch.inference_mode()
def cost(folder, repeats=100):
    """Print the median ratio of a step's time with attention in order to that with the fused."""
    model = load(folder, device="cpu", dtype="bfloat16", adapter=False).model
    x, n_layers = model.embed([1]), len(model.layers)
    for start in (100, 400):
        cache = model.new_cache(start + WIDTH, WIDTH)
        seconds = {WIDTH: [], 0: []}
        for _ in range(repeats):
            for llama.CHAIN_WIDTH in seconds:
                step = (*llama.one_shape(x, start, cache), 0, n_layers)
                seconds[llama.CHAIN_WIDTH].append(stopwatch(model.run_layers, *step)[1])
        ratio = statistics.median(b / a for a, b in zip(seconds[WIDTH][5:], seconds[0][5:]))
        print(f"{Path(folder).name}: a step of width {WIDTH} at position {start} takes {ratio:.2f} "
              "times as long in order")


def main(argv=None):
    parser = parser_for(__doc__, model=DEFAULT_MODEL, adapter=DEFAULT_MODEL / "adapter",
                        prompts=None, new_tokens=100)
    parser.add_argument("--cost", action="store_true")
    args = parser.parse_args(argv)
    refuse_below_one(args, "new_tokens")
    if args.cost:
        cost(args.model)
        return
    prompts = ["Once upon a time"]
    if args.prompts:
        prompts = [question.turns[0] for question in pick(args.prompts)]
    for dtype in ("float32", "bfloat16"):
        decoder = load(args.model, device="cpu", dtype=dtype, width=TREE_WIDTH,
                       adapter=args.adapter)
        for name, support.attention.attend_in_order in (("position", in_order), ("slot", by_slot)):
            unequal, total = compare(decoder, prompts, args.new_tokens)
            print(f"{dtype:9} in order of {name:9} {unequal:5} of {total} rows of logits differ",
                  flush=True)
        support.attention.attend_in_order = in_order  # for the self-check of the next decoder


if __name__ == "__main__":
    sys.exit(run_program("order.py", main))
