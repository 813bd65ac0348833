"""The paper's ablations at the size of a laptop.

    python bench/ablations.py --model DIR --data FILE… --questions FILE --out results.json \\
        [--adapter DIR]

Exit layer, adapter, loss, threshold × draft length, acceptance, confidence. Every variant gets the
same small budget: one pass of the frozen model over --tokens learned tokens gives the states at all
exit layers, and each adapter is trained on them for --passes passes, in the same order and with the
same schedule. The drafts of each, one from every position of the answers to the questions, then say
what any γ and η would have come to (`walk` in common.py): compression rates are exact. Speedups are
computed from these counts and the times of a few real decodes.

--adapter measures an adapter that was trained in full, too: its γ × η table, how often its drafts
are accepted by position, and how sure it was of accepted and of rejected tokens, by subtask. Take
questions that no adapter was chosen by.
"""
import copy
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
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
    machine,
    parser_for,
    pick,
    progress,
    results_of,
    software,
    walk,
)
from drafters.adapters import LayerAdapter, PartialHead
from kangaroo import WIDTH, Adapter
from support.chat import find_chat_template
from support.checkpoint import load_llama, read_config
from support.data import batches_of, encode, most_frequent, split
from support.decoder import Settings, load, pick_device_and_dtype
from support.files import write_atomically
from support.packing import pack
from support.program import refuse_below_one, run_program
from support.terminal import say
from support.tokenizer import Tokenizer
from train_adapter import (
    BETAS,
    WEIGHT_DECAY,
    States,
    Target,
    for_decoding,
    learning_rate,
    means_of,
    measure_batch,
    new_adapter,
    take_step,
)

import torch
import torch.nn as nn
import torch.nn.functional as F

PAPER = 6, 0.6  # γ and η at which the variants are compared, besides the best pair of each
PAPER_SETTINGS = Settings(steps=PAPER[0], threshold=PAPER[1])
BINS = 20       # of the draft's top-1 probability


# --------------------------------------------------------------------------------------------------
# What is compared

class NoInputNorm(Adapter):
    """The paper's without its first norm."""

    def __init__(self, config):
        super().__init__(config)
        self.input_layernorm = nn.Identity()


class MLPOnly(LayerAdapter):
    """norm → MLP → residual → norm: the state of one position alone."""

    def __init__(self, config):
        super().__init__(config)
        self.input_layernorm = self.self_attn = None

    def forward(self, x, positions, cache=None):
        return self.norm(x + self.mlp(self.post_attention_layernorm(x)))


class OwnHead(Target):
    """Drafts through an LM head of the adapter's own, which begins as the target's."""

    def __init__(self, *args):
        super().__init__(*args)
        self.own = nn.Parameter(self.head.float().clone())

    def draft_logits(self, x):
        return F.linear(x.float(), self.own)


@dataclass
class Variant:
    name: str
    exit_layer: int = 2
    adapter: type = LayerAdapter
    loss: str = "cross-entropy"
    target: type = Target
    vocabulary: bool = True  # draft from --vocabulary tokens alone, if it is given
    found: dict = field(default_factory=dict)


def variants(n_layers, vocabulary):
    exits = [Variant(f"ℓ = {layer}", layer, Adapter) for layer in (0, 1, 2, 4, 8, 16)
             if layer < n_layers]
    more = [Variant("no input norm", adapter=NoInputNorm), Variant("attention + MLP"),
            Variant("MLP only", adapter=MLPOnly),
            Variant("own LM head", adapter=Adapter, target=OwnHead),
            Variant("attention + MLP, loss −log Σ min(p, q)", loss="acceptance"),
            Variant("attention + MLP, loss reverse KL", loss="reverse"),
            Variant("attention + MLP, loss hard labels", loss="hard")]
    whole = [Variant("attention + MLP, whole vocabulary", vocabulary=False)]
    return exits + more + whole * bool(vocabulary)


# --------------------------------------------------------------------------------------------------
# Training

@torch.no_grad()
def states_at(target, exit_layers, batches):
    """[{ℓ: the States of the batch}] of the batches, with one pass of the model for all ℓ."""
    model, device, found = target.model, target.head.device, []
    for ids, learn in progress(batches, "states "):
        ids, learn = ids.to(device), learn.to(device)
        x, positions = model.embed_tokens(ids), torch.arange(ids.shape[1], device=device)
        here, done = {}, 0
        for layer in sorted(exit_layers):
            x = model.run_layers(x, positions, None, done, layer)
            here[layer], done = x, layer
        final = model.run_layers(x, positions, None, done, len(model.layers))
        goal = target.distribution(final[learn])
        found.append({layer: States(x, learn, goal) for layer, x in here.items()})
    return found


def train(variant, model, vocabulary, states, held_out, args):
    """The variant's adapter, ready for decoding.

    Fills `found` with held-out figures, seconds and parameters.
    """
    torch.manual_seed(args.seed)
    target = variant.target(model, variant.exit_layer, vocabulary if variant.vocabulary else None,
                            variant.loss)
    adapter = new_adapter(variant.adapter, model)
    own = [target.own] if variant.target is OwnHead else []
    parameters = [*adapter.parameters(), *own]
    begin = time.perf_counter()
    total = update(variant, target, adapter, parameters, states, args)
    seconds = time.perf_counter() - begin
    figures = means_of(sum(measure_batch(adapter, target, batch[variant.exit_layer])
                           for batch in held_out))
    variant.found = {"parameters": sum(p.numel() for p in parameters), "updates": total,
                     "training_seconds": round(seconds), **figures}
    adapter = for_decoding(adapter, target)
    if own:
        vocabulary = torch.arange(model.config.vocab_size, device=target.own.device)
        adapter.head = PartialHead(
            model.lm_head, vocabulary if target.vocabulary is None else target.vocabulary)
        adapter.head.rows.weight.data.copy_(target.own)
    return adapter


def update(variant, target, adapter, parameters, states, args):
    """All passes over the states; returns the number of updates."""
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    total, step = args.passes * len(states), 0
    for k in range(args.passes):
        for i in random.Random(f"{args.seed} {k}").sample(range(len(states)), len(states)):
            batch = states[i][variant.exit_layer]
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate(step, total, min(50, 1 + total // 10))
            take_step([(adapter, batch, 1 / len(batch.goal.best))], target, optimizer)
            step += 1
    return total


def train_all(todo, args):
    """[(variant, its adapter)], all trained on the same states."""
    model = load_llama(args.model, *pick_device_and_dtype(args.device, args.dtype))
    tokenizer = Tokenizer(args.model, model.config)
    model.config = tokenizer.with_ends(model.config)
    _, template = find_chat_template(args.model)
    encoded = partial(encode, tokenizer=tokenizer, template=template,
                      eos=model.config.eos_token_ids, max_length=args.max_length)
    documents, held = split(args.data, template)
    random.Random(args.seed).shuffle(documents)
    vocabulary = None
    if args.vocabulary:
        vocabulary, _ = most_frequent(map(encoded, documents[:4000]), args.vocabulary,
                                      model.config.vocab_size, model.config.eos_token_ids)
    rest, learned = [], 0
    for example in map(encoded, documents):
        if learned < args.tokens:
            learned, rest = learned + sum(example[1][1:]), [*rest, example]
    held = [encoded(document) for document in held[:32] or documents[-1:]]
    exits, target = {variant.exit_layer for variant in todo}, Target(model, 0, vocabulary)
    states, held = (states_at(target, exits, batches_of(examples, args.batch_tokens))
                    for examples in (rest, held))
    held_tokens = sum(len(batch[min(exits)].goal.best) for batch in held)
    say(f"{learned:,} tokens to learn from, {held_tokens:,} held out")
    adapters = []
    for variant in todo:
        adapters.append((variant, train(variant, model, vocabulary, states, held, args)))
        say(f"{variant.name}: {variant.found}")
    return adapters


# --------------------------------------------------------------------------------------------------
# Decoding

def with_adapter(decoder, adapter):
    """The decoder with another adapter."""
    decoder = copy.copy(decoder)
    decoder.adapter = pack(adapter, WIDTH)
    return decoder


def measure(decoder, questions, prompts, outputs, args):
    """What an adapter's drafts come to, and its seconds.

    By γ and η, by draft position, and by confidence and subtask.
    """
    tables, by_position, times, confidence = [], [], [], {}
    for i, (question, ids, output) in enumerate(zip(questions, prompts, outputs)):
        left = min(args.new_tokens, decoder.model.config.max_position_embeddings - len(ids))
        drafts = drafts_everywhere(decoder, ids, output)
        tables.append({(s, t): count_tokens(output, walk(drafts, output, left, s, t))
                       for s in GRID_STEPS for t in GRID_THRESHOLDS})
        by_position += walk(drafts, output, left, PAPER[0], 0.0)
        bins = confidence.setdefault(question.category,
                                     {"accepted": [0] * BINS, "rejected": [0] * BINS})
        for (tokens, sure), token in zip(drafts, output):
            if tokens:
                right = "accepted" if tokens[0] == token else "rejected"
                bins[right][min(BINS - 1, int(sure[0] * BINS))] += 1
        if i % max(1, len(prompts) // 4) == 0:  # a few real ones, for the times, and to see that
            real = decode(decoder, ids, "kangaroo", args.new_tokens, settings=PAPER_SETTINGS)
            vanilla = decode(decoder, ids, "none", args.new_tokens)  # the counts are right
            times.append((vanilla.rest, real.step, real.rest))
            counts = [(len(r.draft.tokens), r.accepted) for r in real.rounds]
            assert counts == walk(drafts, output, left, *PAPER), (ids, counts)
    grid = [{"steps": s, "threshold": t, "compression_rate": round(tokens / rounds, 4),
             "drafted": round(drafts / rounds, 4)}
            for (s, t), (tokens, rounds, drafts) in add_tables(tables).items()]
    drafted, accepted = ([sum(n > w for n in column) for w in range(max(GRID_STEPS))]
                         for column in zip(*by_position))
    seconds = dict(zip(("step", "draft", "verify"), map(statistics.median, zip(*times))))
    return {"exit_layer": decoder.adapter.exit_layer, "grid": grid,
            "by_position": {"drafted": drafted, "accepted": accepted}, "confidence": confidence,
            "seconds": seconds}


# --------------------------------------------------------------------------------------------------
# Tables

def with_speedups(variants):
    """The variants of a results file with `speedup` in every cell of their grids.

    A verification lasts as long as its layers: for all variants its share of a vanilla step is read
    off one straight line through the measured shares, since a single one is uncertain by more than
    what tells the variants apart on a busy machine.
    """
    shares = [(found["exit_layer"], found["seconds"]["verify"] / found["seconds"]["step"])
              for found in variants.values()]
    slope, share = 0, statistics.median(y for _, y in shares)
    if len(dict(shares)) > 1:
        slope, share = statistics.linear_regression(*zip(*shares))
    for found in variants.values():
        verify = slope * found["exit_layer"] + share
        draft = found["seconds"]["draft"] / found["seconds"]["step"]
        for cell in found["grid"]:
            counts = cell["compression_rate"], 1, cell["drafted"]
            cell["speedup"] = estimate_speedup(counts, 1, draft, verify)
    return variants


def at(found, steps=None, threshold=None):
    """The cell of the grid for γ and η, or the one with the best speedup."""
    cells = [cell for cell in found["grid"]
             if steps is None or (cell["steps"], cell["threshold"]) == (steps, threshold)]
    return max(cells, key=lambda cell: cell["speedup"])


def show(results):
    print(" · ".join(results["settings"].values()))
    print(f"{'':44}{'parameters':>11}{'agreement':>10}{'draft ÷ step':>13}{'γ 6, η 0.6':>14}"
          f"{'the best γ, η':>26}")
    for name, found in with_speedups(results["variants"]).items():
        best, seconds = at(found), found["seconds"]
        parameters = f"{found['parameters'] / 1e6:.2f} M" if "parameters" in found else ""
        agreement = f"{found['agreement']:.1%}" if "agreement" in found else ""
        at_paper, at_best = (f"{cell['compression_rate']:.2f} / {cell['speedup']:.2f}"
                             for cell in (at(found, *PAPER), best))
        at_best += f" at γ {best['steps']}, η {best['threshold']}"
        print(f"{name:44}{parameters:>11}{agreement:>10}{seconds['draft'] / seconds['step']:13.2f}"
              f"{at_paper:>14}{at_best:>26}")
    print("compression rate / speedup against vanilla decoding at the one shape")


# --------------------------------------------------------------------------------------------------
# Command line

def parse_arguments(argv):
    parser = parser_for(__doc__, model=NEEDED, questions=NEEDED, out=NEEDED, adapter=None, limit=2,
                        skip=0, new_tokens=64, longest=512, dtype="float32", device=None)
    option = parser.add_argument
    option("--data", nargs="+", required=True, help="as of train_adapter.py")
    option("--only", nargs="*", help="these variants only")
    option("--tokens", type=int, default=100_000, help="learned tokens that the model's pass sees")
    option("--passes", type=int, default=3)
    option("--batch-tokens", type=int, default=2048)
    option("--max-length", type=int, default=512)
    option("--vocabulary", type=int, help="draft from the most frequent tokens alone")
    option("--lr", type=float, default=1e-3)
    option("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    refuse_below_one(args, "tokens", "passes", "batch_tokens", "max_length", "limit", "new_tokens",
                     "longest")
    return args


def in_words(args):
    """All that the figures depend on."""
    return {
        "model": f"{args.model.name}, {args.dtype}",
        "data": " ".join(Path(path).name for path in args.data),
        "budget": f"{args.tokens:,} tokens × {args.passes} passes, learning rate {args.lr:g}",
        "vocabulary": f"drafts from {args.vocabulary or 'all'} tokens",
        "questions": f"{args.limit} a subtask after the first {args.skip}, at most "
                     f"{args.new_tokens} tokens",
        "machine": machine(), "software": software()}


def main(argv=None):
    args = parse_arguments(argv)
    n_layers = read_config(args.model).num_hidden_layers
    results = results_of(args.out, in_words(args), variants={})
    todo = [variant for variant in variants(n_layers, args.vocabulary)
            if variant.name not in results["variants"]
            and (args.only is None or variant.name in args.only)]
    adapters = train_all(todo, args) if todo else []
    decoder = load(args.model, device=args.device, dtype=args.dtype, graphs=False,
                   width=WIDTH, adapter=args.adapter or False)
    decoders = [(variant, with_adapter(decoder, adapter)) for variant, adapter in adapters]
    if args.adapter and "in full" not in results["variants"]:
        decoders.append((Variant("in full"), decoder))
    questions = pick(args.questions, args.limit, args.skip)
    prompts = [ids_of(decoder, question, args.longest) for question in questions]
    outputs = [decode(decoder, ids, "none", args.new_tokens).tokens for ids in prompts]
    for variant, decoder in decoders:
        found = measure(decoder, questions, prompts, outputs, args)
        results["variants"][variant.name] = variant.found | found
        write_atomically(args.out, json.dumps(results, ensure_ascii=False).encode())
        say(f"{variant.name}: measured")
    show(results)


if __name__ == "__main__":
    sys.exit(run_program("ablations.py", main))
