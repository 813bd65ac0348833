"""The paper's ablations at the size of a laptop: exit layer, adapter, loss, threshold × draft
length, acceptance, confidence.

    python bench/ablations.py --model DIR --data FILE… --questions FILE --out results.json
    [--adapter DIR]

Every variant gets the same small budget: one pass of the frozen model over --tokens learned tokens
gives the states at all exit layers, and each adapter is trained on them for --passes passes, in the
same order and with the same schedule. The drafts of each, one from every position of the answers to
the questions, then say what any γ and η would have come to (`walk` in choose.py): compression rates
are exact. Speedups are reckoned from these counts and the times of a few real decodes.

--adapter adds the same for an adapter trained in full: its γ × η table, how often its drafts are
accepted by position, and how sure it was of accepted and of rejected tokens, by subtask. Take
questions that no adapter was chosen by.
"""
import argparse
import json
import platform
import random
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

warnings.filterwarnings(
    "ignore", "Failed to initialize NumPy")  # PyTorch says so at import; nothing here needs it
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.choose import STEPS, THRESHOLDS, counted, decode, drafts_everywhere, reckoned, walk
from bench.speed import pick_ids, processor
from kangaroo import WIDTH, Adapter, KangarooDrafter, LayerAdapter, NoDrafter
from llama import Sampler, UserError, pack
from support.checkpoint import load_adapter, load_llama, read_json, write_atomically
from support.data import batches_of, encode, most_frequent, split
from support.decoder import pick_device_and_dtype
from support.program import Parser, refuse_below_one, run_program
from support.tokenizer import Tokenizer, find_chat_template
from train_adapter import Target, for_decoding, learning_rate, new_adapter

PAPER = 6, 0.6  # γ and η at which the variants are compared, besides the best pair of each
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
    """Drafts through an LM head of the adapter's own, which begins as the target's and is
    trained."""

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
    exits = [
        Variant(f"ℓ = {layer}", layer, Adapter) for layer in (0, 1, 2, 4, 8, 16) if layer < n_layers
    ]
    more = [
        Variant("no input norm", adapter=NoInputNorm),
        Variant("attention + MLP"),
        Variant("MLP only", adapter=MLPOnly),
        Variant("own LM head", adapter=Adapter, target=OwnHead),
        Variant("attention + MLP, loss −log Σ min(p, q)", loss="acceptance")
    ]
    return exits + more + [Variant("attention + MLP, whole vocabulary", vocabulary=False)
                           ] * bool(vocabulary)


# --------------------------------------------------------------------------------------------------
# Training

@torch.no_grad()
def states_at(target, exit_layers, batches):
    """[{ℓ: states as of `Target.states`}] of the batches, with one pass of the model for all ℓ."""
    model, device, found = target.model, target.head.device, []
    for ids, learn in batches:
        ids, learn = ids.to(device), learn.to(device)
        x, positions, here, done = model.embed_tokens(ids), torch.arange(
            ids.shape[1], device=device), {}, 0
        for layer in sorted(exit_layers):
            x = model.run_layers(x, positions, None, done, layer)
            here[layer], done = x, layer
        final = target.final(model.run_layers(x, positions, None, done, len(model.layers))[learn])
        found.append({layer: (x, learn, *final) for layer, x in here.items()})
        print(f"\rstates {len(found)}/{len(batches)} batches", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def train(variant, model, vocabulary, states, held_out, args):
    """The variant's adapter, ready for decoding; fills `found` with held-out figures, seconds and
    parameters."""
    torch.manual_seed(args.seed)
    target = variant.target(model, variant.exit_layer, vocabulary if variant.vocabulary else None)
    adapter = new_adapter(variant.adapter, model)
    own = [target.own] if variant.target is OwnHead else []
    parameters = [*adapter.parameters(), *own]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    total, step, begin = args.passes * len(states), 0, time.perf_counter()
    for k in range(args.passes):
        for i in random.Random(f"{args.seed} {k}").sample(range(len(states)), len(states)):
            batch = states[i][variant.exit_layer]
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate(step, total, min(50, 1 + total // 10))
            optimizer.zero_grad()
            target.loss(adapter, batch, variant.loss, 1 / len(batch[2]), None)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
    seconds = time.perf_counter() - begin
    sums = sum(
        target.loss(adapter, batch[variant.exit_layer], variant.loss, autocast=None)
        for batch in held_out)
    variant.found = {
        "parameters": sum(p.numel() for p in parameters), "updates": total,
        "training_seconds": round(seconds), **dict(
            zip(("loss", "acceptance", "agreement"), (sums[:3] / sums[3]).tolist()))
    }
    adapter = for_decoding(adapter, target)
    if own:
        vocabulary = torch.arange(model.config.vocab_size, device=target.own.device)
        adapter.draft_from(vocabulary if target.vocabulary is None else target.vocabulary,
                           model.lm_head)
        adapter.head.weight.data.copy_(target.own)
    return adapter


# --------------------------------------------------------------------------------------------------
# Decoding

def measure(model, adapter, exit_layer, prompts, outputs, args):
    """What an adapter's drafts come to, by γ and η, by draft position, by confidence and subtask;
    and its seconds."""
    grid = {(s, t): [0, 0, 0] for s in STEPS for t in THRESHOLDS}
    drafted, accepted, times, confidence = [0] * max(STEPS), [0] * max(STEPS), [], {}
    for i, ((category, ids), output) in enumerate(zip(prompts, outputs)):
        left = min(args.new_tokens, model.config.max_position_embeddings - len(ids))
        drafts = drafts_everywhere(model, KangarooDrafter(model, adapter, exit_layer, 0.0), ids,
                                   output)
        for (steps, threshold), counts in grid.items():
            found = counted(output, walk(drafts, output, left, steps, threshold))
            grid[steps, threshold] = [a + b for a, b in zip(counts, found)]
        for n, k in walk(drafts, output, left, PAPER[0], 0.0):
            for w in range(n):
                drafted[w] += 1
                accepted[w] += w < k
        bins = confidence.setdefault(category, {"accepted": [0] * BINS, "rejected": [0] * BINS})
        for (tokens, sure), token in zip(drafts, output):
            if tokens:
                bins["accepted" if tokens[0] == token else "rejected"][min(
                    BINS - 1, int(sure[0] * BINS))] += 1
        if i % max(1,
                   len(prompts) //
                   4) == 0:  # a few real ones, for the times and to see that the counts are right
            rounds, draft, verify = decode(model,
                                           KangarooDrafter(model, adapter, exit_layer, PAPER[1]),
                                           ids, PAPER[0], args, Sampler())
            step = decode(model, NoDrafter(model), ids, 0, args, Sampler())[2]
            times.append((step, draft, verify))
            real = [(len(r.draft.tokens), r.accepted) for r in rounds]
            assert real == walk(drafts, output, left, *PAPER), (ids, real)
    seconds = dict(zip(("step", "draft", "verify"), map(statistics.median, zip(*times))))
    return {
        "exit_layer": exit_layer, "grid": [{
            "steps": s, "threshold": t, "compression_rate": round(tokens / rounds, 4),
            "drafted": round(drafts / rounds, 4)
        } for (s, t), (tokens, rounds, drafts) in grid.items()],
        "by_position": {"drafted": drafted,
                        "accepted": accepted}, "confidence": confidence, "seconds": seconds
    }


def with_speedups(variants):
    """The variants of a results file with `speedup` in every cell of their grids.

    A verification lasts as long as its layers: for all variants its share of a vanilla step is read
    off one straight line through the measured shares, since a single one is uncertain by more than
    what tells the variants apart on a busy machine.
    """
    shares = [(found["exit_layer"], found["seconds"]["verify"] / found["seconds"]["step"])
              for found in variants.values()]
    line = statistics.linear_regression(*zip(
        *shares)) if len(dict(shares)) > 1 else (0, statistics.median(y for _, y in shares))
    for found in variants.values():
        verify, draft = line[0] * found["exit_layer"] + line[
            1], found["seconds"]["draft"] / found["seconds"]["step"]
        for cell in found["grid"]:
            cell["speedup"] = reckoned((cell["compression_rate"], 1, cell["drafted"]), 1, draft,
                                       verify)
    return variants


def at(found, steps=None, threshold=None):
    """The cell of the grid for γ and η, or the one with the best speedup."""
    cells = [
        cell for cell in found["grid"]
        if steps is None or (cell["steps"], cell["threshold"]) == (steps, threshold)
    ]
    return max(cells, key=lambda cell: cell["speedup"])


def show(results):
    print(" · ".join(results["settings"].values()))
    print(
        f"{'':44}{'parameters':>11}{'agreement':>10}{'draft ÷ step':>13}{'γ 6, η 0.6':>14}{'the best γ, η':>26}"
    )
    for name, found in with_speedups(results["variants"]).items():
        paper, best, t = at(found, *PAPER), at(found), found["seconds"]
        parameters = f"{found['parameters'] / 1e6:.2f} M" if "parameters" in found else ""
        agreement = f"{found['agreement']:.1%}" if "agreement" in found else ""
        cells = [
            f"{cell['compression_rate']:.2f} / {cell['speedup']:.2f}" for cell in (paper, best)
        ]
        print(
            f"{name:44}{parameters:>11}{agreement:>10}{t['draft'] / t['step']:13.2f}{cells[0]:>14}"
            f"{cells[1] + ' at γ {steps}, η {threshold}'.format(**best):>26}")
    print("compression rate / speedup against vanilla decoding at the one shape")


def trained(todo, model, encoded, args):
    """[(variant, its adapter)], all trained on the same states; encoded(document) as `encode` of
    train_adapter.py."""
    documents, held = split(args)
    random.Random(args.seed).shuffle(documents)
    vocabulary = None
    if args.vocabulary:
        vocabulary, _ = most_frequent(documents, args.vocabulary, encoded, model.config.vocab_size,
                                      model.config.eos_token_ids)
    rest, learned = [], 0
    for example in map(encoded, documents):
        if learned < args.tokens:
            learned, rest = learned + sum(example[1][1:]), [*rest, example]
    held = [encoded(document) for document in held[:32] or documents[-1:]]
    exits, target = {variant.exit_layer for variant in todo}, Target(model, 0, vocabulary)
    states, held = (states_at(target, exits, batches_of(examples, args.batch_tokens))
                    for examples in (rest, held))
    print(
        f"{learned:,} tokens to learn from, {sum(len(s[min(exits)][2]) for s in held):,} held out",
        file=sys.stderr)
    adapters = []
    for variant in todo:
        adapters.append((variant, train(variant, model, vocabulary, states, held, args)))
        print(f"{variant.name}: {variant.found}", file=sys.stderr, flush=True)
    return adapters


def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", nargs="+", required=True, help="as of train_adapter.py")
    parser.add_argument("--questions", dest="prompts", required=True,
                        help="Spec-Bench's JSONL, or a prompt a line")
    parser.add_argument("--out", type=Path, required=True,
                        help="the results file; variants that it holds already are kept")
    parser.add_argument("--adapter", type=Path, help="an adapter trained in full, measured as well")
    parser.add_argument("--only", nargs="*", help="these variants only")
    parser.add_argument("--tokens", type=int, default=100_000,
                        help="learned tokens that the model's pass sees")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, help="draft from the most frequent tokens alone")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", dest="each", type=int, default=2,
                        help="questions of each subtask")
    parser.add_argument("--skip", type=int, default=0,
                        help="after the first so many of each subtask")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--longest", type=int, default=512,
                        help="of a longer prompt, only so many last tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    refuse_below_one(args, "tokens", "passes", "batch_tokens", "max_length", "each", "new_tokens",
                     "longest")
    args.width, args.allow_truncated = WIDTH, False
    return args


def main(argv=None):
    args = parse_arguments(argv)
    model = load_llama(args.model, *pick_device_and_dtype(args))
    (_, template), tokenizer = find_chat_template(args.model), Tokenizer(args.model, model.config)
    settings = {
        "model": f"{args.model.name}, {args.dtype}", "data": " ".join(
            Path(path).name for path in args.data),
        "budget": f"{args.tokens:,} tokens × {args.passes} passes, learning rate {args.lr:g}",
        "vocabulary": f"drafts from {args.vocabulary or 'all'} tokens",
        "questions": f"{args.each} a subtask after the first {args.skip}, at most {args.new_tokens} tokens",
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "software": f"Python {platform.python_version()}, torch {torch.__version__}"
    }
    results = read_json(args.out) if args.out.exists() else {"settings": settings, "variants": {}}
    if results.get("settings") != settings:
        raise UserError(f"--out {args.out}: was made with other settings, give another file")
    todo = [
        variant for variant in variants(len(model.layers), args.vocabulary)
        if variant.name not in results["variants"] and (
            args.only is None or variant.name in args.only)
    ]
    adapters = []
    if todo:
        encoded = partial(encode, tokenizer=tokenizer, template=template,
                          eos=model.config.eos_token_ids, max_length=args.max_length)
        adapters = trained(todo, model, encoded, args)
    if args.adapter and "in full" not in results["variants"]:
        adapter, facts = load_adapter(args.adapter, model)
        adapters.append((Variant("in full", facts["exit_layer"]), adapter))
    pack(model, WIDTH)
    prompts = pick_ids(args, tokenizer, template, model.config)
    vanilla = [decode(model, NoDrafter(model), ids, 0, args, Sampler())[0] for _, ids in prompts]
    outputs = [[token for round_ in rounds for token in round_.tokens] for rounds in vanilla]
    for variant, adapter in adapters:
        found = measure(model, pack(adapter, WIDTH), variant.exit_layer, prompts, outputs, args)
        results["variants"][variant.name] = variant.found | found
        write_atomically(args.out, json.dumps(results, ensure_ascii=False).encode())
        print(f"{variant.name}: measured", file=sys.stderr, flush=True)
    show(results)


if __name__ == "__main__":
    sys.exit(run_program("ablations.py", main))
