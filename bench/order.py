"""Does the order of summation matter in a tree? Count the logits that differ from vanilla's, with
it and without.

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
import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings(
    "ignore", "Failed to initialize NumPy")  # PyTorch says so at import; nothing here needs it
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import llama
from bench.speed import pick
from drafters.tree import TOP_CANDIDATES, TREE_STEPS, TREE_THRESHOLD, TREE_WIDTH
from kangaroo import WIDTH, KangarooDrafter, NoDrafter, generate
from support.checkpoint import load_adapter
from support.decoder import DEFAULT_MODEL
from support.program import Parser, refuse_below_one, run_program
from support.tokenizer import Tokenizer

in_order = llama.attend_in_order


def by_slot(q, k, v, rows):
    """The same keys and values for each row, in the order in which they lie in the cache."""
    mask = torch.full_like(rows.mask, -torch.inf).scatter_reduce(1, rows.columns, rows.mask, "amax")
    slots = torch.arange(k.shape[1], device=q.device).expand_as(rows.columns)
    return in_order(q, k, v, rows._replace(mask=mask, columns=slots))


def decode(model, drafter, prompt, n):
    """(ids, the row of logits that chose each of them)."""
    verified, logits = [], type(model).logits
    model.logits = lambda h: verified.append(logits(model, h)) or verified[-1]
    rounds = list(generate(model, drafter, prompt, n, TREE_STEPS, width=TREE_WIDTH))
    del model.logits
    rows = [x[0, [0, *r.path][:len(r.tokens)]] for x, r in zip(verified, rounds)]
    return [token for r in rounds for token in r.tokens], torch.cat(rows)


@torch.inference_mode()
def cost(folder, dtype=torch.bfloat16, repeats=100):
    """Print the median ratio of a step's time with attention in order to its time with fused
    attention."""
    model = llama.pack(llama.load_llama(folder, "cpu", dtype), WIDTH)
    x, n_layers = model.embed([1]), len(model.layers)
    for start in (100, 400):
        cache = llama.KVCache.zeros(model.config, n_layers, start + WIDTH, x)
        seconds = {WIDTH: [], 0: []}
        for _ in range(repeats):
            for llama.CHAIN_WIDTH in seconds:
                begin = time.perf_counter()
                model.run_layers(*llama.one_shape(x, start, cache, WIDTH), 0, n_layers)
                seconds[llama.CHAIN_WIDTH].append(time.perf_counter() - begin)
        ratio = statistics.median(b / a for a, b in zip(seconds[WIDTH][5:], seconds[0][5:]))
        print(
            f"{Path(folder).name}: a step of width {WIDTH} at position {start} takes {ratio:.2f} times as long in order"
        )


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--adapter", default=DEFAULT_MODEL / "adapter")
    parser.add_argument("--prompts", help="a prompt a line (default: one prompt)")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--cost", action="store_true")
    args = parser.parse_args(argv)
    refuse_below_one(args, "new_tokens")
    if args.cost:
        cost(args.model)
        return
    prompts = [text for _, text in pick(args.prompts, 10 ** 9, 0)
               ] if args.prompts else ["Once upon a time"]
    for dtype in (torch.float32, torch.bfloat16):
        model = llama.load_llama(args.model, "cpu", dtype)
        adapter, facts = load_adapter(args.adapter, model)
        for module in (model, adapter):
            llama.pack(module, TREE_WIDTH)
        tokenizer, settings = Tokenizer(args.model,
                                        model.config), (None, TREE_WIDTH, TOP_CANDIDATES)
        for name, llama.attend_in_order in (("position", in_order), ("slot", by_slot)):
            unequal = total = 0
            for prompt in prompts:
                prompt = tokenizer.encode(prompt)
                vanilla, vanilla_rows = decode(model, NoDrafter(model), prompt, args.new_tokens)
                drafter = KangarooDrafter(model, adapter, facts["exit_layer"], TREE_THRESHOLD,
                                          *settings)
                ids, rows = decode(model, drafter, prompt, args.new_tokens)
                same = next((i for i, pair in enumerate(zip(ids, vanilla)) if pair[0] != pair[1]),
                            len(ids) - 1) + 1
                unequal += (rows[:same] != vanilla_rows[:same]).any(-1).sum().item()
                total += same
            dtype_name = str(dtype).removeprefix("torch.")
            print(
                f"{dtype_name:9} in order of {name:9} {unequal:5} of {total} rows of logits differ",
                flush=True)


if __name__ == "__main__":
    sys.exit(run_program("order.py", main))
