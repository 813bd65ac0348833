"""Train Kangaroo's adapter for any Llama that loads, on a CPU, one GPU or several.

    text -> token ids -> one pass of the frozen target -> states at the exit layer -> adapter
                                                       -> final distribution       -> loss

The adapter learns to make the target's own LM head say after ℓ layers what it says after all of
them; or (`--learn text`) what the text says next, for which the first ℓ layers suffice. Hidden
states live in memory for as long as a window of documents is trained on, and never on disk. A
window may be passed over several times (`--passes`), because on a CPU the target's pass is several
times as slow as a step of the adapter.

Nothing here can change what `kangaroo.py` decodes, only how fast. Output: adapter.safetensors,
config.json and log.jsonl. Left out on purpose: training the target. In order: what is learned
(`States`, `Target`), from which batches (`updates`), one step of it (`take_step`), what a new
adapter begins with, and a whole run (`Training`). docs/training.md says how to choose options, and
what to do if few drafts are accepted.
"""
import sys

from support.program import run_program
from support.terminal import say, status
from support.training_options import parse_adapter_arguments


def main(argv=None):
    def run():
        args = parse_adapter_arguments(argv)
        status(f"loading {args.model.resolve().name} …")
        from train_adapter import train  # not before: importing PyTorch takes a second
        train(args)

    return run_program("train_adapter.py", run)


if __name__ == "__main__":
    sys.exit(main())

import copy
import math
import random
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from drafters.adapters import ADAPTERS, PartialHead, describe, load_adapter, new_adapter
from kangaroo import STEPS, THRESHOLD, KangarooDrafter, generate
from support.checkpoint import (
    config_json,
    digest_of,
    load_llama,
    trained_weights,
    write_safetensors,
)
from support.data import digest
from support.decoder import pick_device_and_dtype
from support.errors import UserError, require
from support.files import write_json
from support.processes import Processes, end_together
from support.progress import Clock, Interruption, Progress, load_checkpoint, save_checkpoint
from support.training_text import Text

import torch
import torch.nn.functional as F

# Of p (n, V), the target's distribution, and log q, the adapter's -> (n,). Compared in
# docs/lab.md.
LOSSES = {"cross-entropy": lambda p, log_q: -(p * log_q).sum(-1),
          "reverse": lambda p, log_q: (log_q.exp() * (log_q - p.clamp(min=1e-30).log())).sum(-1),
          "acceptance": lambda p, log_q: -overlap(p, log_q).clamp(min=1e-6).log(),
          "hard": lambda p, log_q: F.nll_loss(log_q, p.argmax(-1), reduction="none")}


def overlap(p, log_q):
    """Σ min(p, q): how often the usual sampling rule would accept; (n, V) -> (n,)."""
    return torch.minimum(p, log_q.exp()).sum(-1)


# --------------------------------------------------------------------------------------------------
# What is learned

class Distribution(NamedTuple):
    """What the whole model says at n positions: p = softmax(LM head × y).

    Its n × V numbers would not fit into memory, so they are made of these when they are needed.
    """
    y: torch.Tensor         # (n, d) the final states, normed
    log_sums: torch.Tensor  # (n,) log Σ exp of their logits, float32
    best: torch.Tensor      # (n,) their top-1 tokens


class NextTokens(NamedTuple):
    """What the text says at n positions: all of p is on its next token."""
    following: torch.Tensor  # (n,) that token, by its number in the vocabulary


class States(NamedTuple):
    """A batch of B documents, padded to T tokens, of which n positions are to be learned.

    Where they are, learn (B, T) says; the goal has a row for each of these alone. For the tokens
    of "a b c" with only c to be learned, x has rows for a, b and c, learn is true at b, and n is 1.
    """
    x: torch.Tensor                   # (B, T, d) the exit layer's states: what the adapter gets
    learn: torch.Tensor               # (B, T) bool
    goal: Distribution | NextTokens   # of n positions: what the adapter shall say


class Target:
    """The frozen model: a batch's states, and how near the adapter comes to what they say."""
    CHUNK = {"cpu": 512, "cuda": 2048}  # positions whose logits exist at once

    def __init__(self, model, exit_layer, vocabulary=None, loss="cross-entropy"):
        self.chunk = self.CHUNK[model.norm.weight.device.type]
        self.model, self.exit_layer, self.vocabulary = model, exit_layer, vocabulary
        self.loss, weight = LOSSES[loss], model.lm_head.weight
        self.head = weight if vocabulary is None else weight[vocabulary]

    @torch.no_grad()
    def states(self, ids, learn):
        """One pass over ids (B, T), and learn (B, T) bool, which says of what -> their States."""
        ids, learn = ids.to(self.head.device), learn.to(self.head.device)
        x = self.run_layers(self.model.embed_tokens(ids), 0, self.exit_layer)
        return States(x, learn, self.goal(x, ids, learn))

    def run_layers(self, x, first, last):
        positions = torch.arange(x.shape[1], device=x.device)
        return self.model.run_layers(x, positions, None, first, last)

    def goal(self, x, ids, learn):
        """What the model says at the positions to be learned, from the exit layer's states x on."""
        return self.distribution(
            self.run_layers(x, self.exit_layer, len(self.model.layers))[learn])

    @torch.no_grad()
    def distribution(self, y):
        """The last layer's output (n, d) -> the Distribution of these n positions."""
        y = self.model.norm(y)
        log_sums, best = zip(*[(logits.float().logsumexp(-1), logits.max(-1).indices)
                               for logits in map(self.model.lm_head, y.split(self.chunk))])
        return Distribution(y, torch.cat(log_sums), torch.cat(best))

    def draft_logits(self, x):
        """What the adapter's output (n, d) says; (n, V)."""
        return F.linear(x.to(self.head.dtype), self.head)

    def compare(self, x, goal):
        """The adapter's output x (n, d) with the goal -> loss, acceptance, agreement, each (n,).

        p is the target's distribution, q the adapter's, over `vocabulary` if there is one: p then
        sums to less than 1. Acceptance is Σ min(p, q), agreement whether both have the same top-1
        token.
        """
        logits = F.linear(goal.y.to(self.head.dtype), self.head).float()
        p = (logits - goal.log_sums[:, None]).exp()
        log_q = self.draft_logits(x).float().log_softmax(-1)
        top = log_q.argmax(-1)
        top = top if self.vocabulary is None else self.vocabulary[top]
        return self.loss(p, log_q), overlap(p, log_q), top == goal.best


class TextTarget(Target):
    """The text in place of the model: the adapter learns its next token, from the exit layer's
    states. So only the model's first layers run."""

    def goal(self, x, ids, learn):
        following = ids.roll(-1, 1)[learn]
        if self.vocabulary is not None:
            following = torch.searchsorted(self.vocabulary, following)
        return NextTokens(following)

    def compare(self, x, goal):
        """The adapter's output x (n, d) with the text -> loss, acceptance, agreement, each (n,).

        All of p is on the next token: cross-entropy is −log q of it, and Σ min(p, q) is its q.
        """
        log_q = self.draft_logits(x).float().log_softmax(-1)
        said = log_q.gather(1, goal.following[:, None])[:, 0]
        return -said, said.exp(), log_q.argmax(-1) == goal.following


# --------------------------------------------------------------------------------------------------
# From which batches

def updates(windows, args, target, done=0, rank=0, ranks=1):
    """Endless: (the place after it, this rank's States, tokens learned by all) of each update.

    windows: (number, batches) of each; of the first, `done` updates are past already. A place is
    (window, updates of it that are past). Each update takes `args.batches` batches, dealt to the
    ranks in turn: with any number of processes an update sees the same batches. All of it follows
    from the seed and the place, which is what makes resuming exact.
    """
    keep = in_half if args.passes > 1 else lambda states: states
    for window, batches in windows:
        # A later window that falls short is skipped.
        require(window > 0 or len(batches) >= args.batches,
                f"--window {args.window}: its documents fill {len(batches)} batches, --batches "
                f"wants {args.batches}; lower that or --batch-tokens, or raise --window if there "
                "are more documents")
        order, states = order_of(len(batches), window, args), {}
        for past, update in enumerate(order[done:], done + 1):
            mine = update[rank::ranks]
            for i in mine:
                if i not in states:
                    states[i] = keep(target.states(*batches[i]))
            place = (window, past) if past < len(order) else (window + 1, 0)
            tokens = sum(batches[i][1].sum().item() for i in update)
            yield place, [states[i] for i in mine], tokens
            if args.passes == 1:
                states.clear()
        done = 0


def order_of(n, window, args):
    """Which of a window's n batches each update takes, in all passes: lists of `args.batches`.

    A batch keeps its column in all passes, so that one rank alone computes its states. With 5
    batches, 2 an update and 2 passes, the columns are 0 2 4 and 1 3, and the updates are, say,
    (2, 3) (0, 1) and then (4, 1) (2, 3): what is left over in one pass comes in another.
    """
    order = []
    for k in range(args.passes):
        shuffle = random.Random(f"{args.seed} {window} {k}").sample
        columns = [range(i, n, args.batches) for i in range(args.batches)]
        order += zip(*(shuffle(column, len(column)) for column in columns))
    return order


def in_half(states):
    """The states as they are kept: float32 vectors in bfloat16, which is half as long."""
    def halve(t):
        return t.bfloat16() if t.dim() > 1 and t.dtype == torch.float32 else t
    return States(halve(states.x), states.learn, type(states.goal)(*map(halve, states.goal)))


# --------------------------------------------------------------------------------------------------
# One step

BETAS = 0.9, 0.95   # of AdamW; a longer memory adds nothing (docs/lab.md)
WEIGHT_DECAY = 0.0  # 0.1 adds nothing (docs/lab.md)
CLIP = 1.0          # the largest norm of a gradient: usual, for the first updates


def take_step(parts, target, optimizer, autocast=None, processes=None):
    """One step of the optimizer; returns the sums (4,) of `sums_of` over this process's positions.

    parts: (adapter, States, scale) of each batch. A gradient is the sum of scale × loss over all
    positions of all parts, so the scale of a mean is 1 ÷ the tokens of all processes.
    """
    optimizer.zero_grad()
    sums = 0
    for adapter, states, scale in parts:
        out = run_adapter(adapter, states, autocast)
        # The logits of all n positions would not fit into memory. So the loss runs in chunks, on a
        # copy of the output that gathers their gradients. These go back through the adapter in one
        # piece.
        gathered = out.detach().requires_grad_()
        for x, goal in chunks(gathered, states.goal, target.chunk):
            loss, accepted, agreed = target.compare(x, goal)
            (scale * loss.sum()).backward()
            sums += sums_of(loss, accepted, agreed)
        out.backward(gathered.grad)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if processes:
        processes.sum_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    require(norm.isfinite(),  # the same in all processes
            f"--lr {optimizer.defaults['lr']}: the gradient is no longer finite; lower --lr or, if "
            "that does not help, give a --dtype that the target's values fit in")
    optimizer.step()
    return sums


@torch.no_grad()
def measure_batch(adapter, target, states, autocast=None):
    """The sums (4,) of `sums_of` over the batch's positions; nothing is learned."""
    out = run_adapter(adapter, states, autocast)
    return sum(sums_of(*target.compare(x, goal))
               for x, goal in chunks(out, states.goal, target.chunk))


def run_adapter(adapter, states, autocast=None):
    """What the adapter makes of the batch at its n positions to be learned, (n, d)."""
    x, device = states.x, states.x.device
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        return adapter(x.float(), torch.arange(x.shape[1], device=device))[states.learn]


def chunks(x, goal, size):
    """x (n, d) and the goal of n positions, `size` positions at a time."""
    for part, *rows in zip(*(t.split(size) for t in (x, *goal))):
        yield part, type(goal)(*rows)


def sums_of(loss, accepted, agreed):
    """(4,) float64: the sums over n positions, and n."""
    rows = loss, accepted, agreed, torch.ones_like(loss)
    return torch.stack([row.detach().float().sum() for row in rows]).double()


def means_of(sums):
    """The figures of the log, by name, from the sums of `sums_of`."""
    return dict(zip(("loss", "acceptance", "agreement"), (sums[:3] / sums[3]).tolist()))


def learning_rate(step, total, warmup):
    """The share of the peak at this step: a linear rise, then half a cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# --------------------------------------------------------------------------------------------------
# The adapter, as it decodes

@torch.no_grad()
def for_decoding(adapter, target):
    """A copy of the adapter as `load_adapter` would give it."""
    copied = copy.deepcopy(adapter).to(target.head.dtype).requires_grad_(False)
    some = target.vocabulary is not None
    head = PartialHead(target.model.lm_head, target.vocabulary) if some else None
    return describe(copied, "what is trained", {}, target.exit_layer, head)


# --------------------------------------------------------------------------------------------------
# A run

class Training:
    """One run, in one of several processes. `run` is the loop; __init__ and what it calls prepare
    it, in that order; the rest reports, evaluates and saves.

    What is trained in place of an adapter (Medusa's heads, in drafters/train_medusa.py) overrides
    make_adapter, make_target, parts, make_drafter and save.
    """
    # Options that a resumed run must share with the one that it goes on from.
    EXACT = ("learn", "exit_layer", "vocabulary", "loss", "lr", "warmup", "updates", "batches",
             "batch_tokens", "max_length", "window", "passes", "norm", "seed")

    def __init__(self, args):
        self.args = args
        device, dtype = pick_device_and_dtype(args.device, args.dtype)
        self.processes, device = Processes.join(device)
        self.first = self.processes.rank == 0  # it alone reports, evaluates and saves
        self.autocast = None if dtype == torch.float32 else torch.bfloat16
        self.model = load_llama(args.model, device, dtype)
        torch.manual_seed(args.seed)
        self.adapter, self.architecture, self.begun_from = self.make_adapter()
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=args.lr, betas=BETAS,
                                           weight_decay=WEIGHT_DECAY)
        require(args.batches % self.processes.ranks == 0, f"--batches {args.batches}: must be a "
                f"multiple of the {self.processes.ranks} processes")
        self.text = Text(args, self.model.config, device)
        self.model.config = self.text.config
        vocabulary = self.text.vocabulary
        vocabulary = None if vocabulary is None else vocabulary.to(device)
        self.target = self.teacher = self.make_target(vocabulary)
        if args.learn == "text":  # held-out figures are of the target, whatever is learned
            self.teacher = TextTarget(self.model, args.exit_layer, vocabulary)
        self.begin(str(dtype).removeprefix("torch."))

    def make_adapter(self):
        """(what to begin from, in float32; its architecture's name; how it was made before).

        That is a new adapter, or the one in --init with its architecture.
        """
        args, layers = self.args, self.model.config.num_hidden_layers
        require(0 <= args.exit_layer < layers, f"--exit-layer {args.exit_layer}: must be at least "
                f"0 and below the model's {layers} layers")
        if args.init is None:
            name = args.architecture or "attention"
            return new_adapter(ADAPTERS[name], self.model, args.norm), name, None
        try:
            adapter = load_adapter(args.init, self.model, args.exit_layer)
        except UserError as e:
            raise UserError(f"--init {e}") from None
        adapter.head, facts = None, adapter.facts  # --vocabulary chooses again
        name = facts.get("architecture", "attention")
        require(args.architecture in (None, name), f"--architecture {args.architecture}: the "
                f"adapter of --init has {name}")
        return adapter.float().requires_grad_(True), name, facts.get("training", str(args.init))

    def make_target(self, vocabulary):
        return Target(self.model, self.args.exit_layer, vocabulary, self.args.loss)

    def begin(self, dtype):
        """The state of a new run, or that of the one to go on with; and the log."""
        args, text = self.args, self.text
        made_with = {"init": args.init and f"of digest {digest_of(self.adapter)}",
                     "chat": text.chat, "dtype": dtype, "architecture": self.architecture,
                     "model": f"of fingerprint {self.model.fingerprint}",
                     "data": f"of digest {digest(text.documents)}"}
        made_with |= {name: getattr(args, name) for name in self.EXACT}
        if args.resume and args.init is None:
            del made_with["init"]  # the checkpoint's, whatever it was
        self.state = {"step": 0, "window": 0, "update": 0, "tokens": 0, "seconds": 0.0,
                      "waited": 0.0, "options": made_with, "begun_from": self.begun_from}
        self.checkpoint = args.out / "checkpoint.pt"
        if args.resume:
            self.state |= load_checkpoint(self.checkpoint, self.adapter, [self.optimizer],
                                          made_with)
        if self.first:
            if text.note():
                say(text.note())
            if not args.resume:
                self.checkpoint.unlink(missing_ok=True)  # of a run that --overwrite ends
            n = sum(p.numel() for p in self.adapter.parameters())
            say(f"{args.model} · {self.model.norm.weight.device} · {dtype} · exit layer "
                f"{self.target.exit_layer} · adapter {self.architecture}, {n / 1e6:.2f} M "
                f"parameters · {text.describe()}")
            self.progress = Progress(args.out / "log.jsonl", args.updates, self.state)
            self.evaluated = max((r["step"] for r in self.progress.logged if "held_out" in r),
                                 default=0)

    def run(self):
        """All updates that are left, then the adapter."""
        with Interruption(quiet=not self.first) as self.interruption:
            self.make_updates()
            if self.first:
                self.finish()
        self.processes.wait()
        self.processes.leave()

    def make_updates(self):
        args, state = self.args, self.state
        self.evaluate_if_due()  # a killed run may have saved, and not evaluated any more
        self.clock = clock = Clock(state)
        stream = updates(clock.waiting(self.text.windows(state["window"])), args, self.teacher,
                         state["update"], self.processes.rank, self.processes.ranks)
        while state["step"] < args.updates:
            (state["window"], state["update"]), batches, tokens = next(stream)
            for group in self.optimizer.param_groups:
                group["lr"] = args.lr * learning_rate(state["step"], args.updates, args.warmup)
            sums = take_step(self.parts(batches, 1 / tokens), self.teacher, self.optimizer,
                             self.autocast, self.processes)
            state["step"] += 1
            state["tokens"] += tokens
            clock.lap()
            if self.first:
                self.progress.report(means_of(sums), state)
            with clock.paused():
                self.save_if_due()
                self.evaluate_if_due()

    def parts(self, batches, scale):
        """(adapter, States, scale) of each batch, as `take_step` wants them."""
        return ((self.adapter, states, scale) for states in batches)

    def save_if_due(self):
        """Also before an evaluation, so that nothing is lost if that fails."""
        if not self.first:
            return
        args, step, ended_by = self.args, self.state["step"], self.interruption.signal
        late = self.clock.strikes(args.save_every)
        if late or ended_by or step == args.updates or self.evaluation_is_due():
            save_checkpoint(self.checkpoint, self.adapter, [self.optimizer], self.state)
        if ended_by:
            raise KeyboardInterrupt(f"interrupted after update {step}, --resume goes on from there",
                                    128 + ended_by)

    def evaluation_is_due(self):
        step = self.state["step"]
        return step and step % self.args.eval_every == 0 and step < self.args.updates

    def evaluate_if_due(self):
        if self.evaluation_is_due():
            if self.first and self.evaluated < self.state["step"]:
                self.evaluate()
            self.processes.wait()

    def evaluate(self):
        """The figures of the held-out documents, reported."""
        self.evaluated = self.state["step"]
        figures = means_of(sum(measure_batch(adapter, self.target, states, self.autocast)
                               for adapter, states, _ in self.parts(self.held_out, 1)))
        figures |= self.decode_prompts()
        self.progress.write({"step": self.state["step"], "held_out": figures})
        shown = " · ".join(f"{name} {value:.3f}" for name, value in figures.items())
        say(f"held out: {shown}")
        return figures

    @cached_property
    def held_out(self):
        """The States of the held-out documents, not before they are needed: it takes a while."""
        return [in_half(self.target.states(*batch)) for batch in self.text.held_batches]

    def decode_prompts(self):
        """The compression rate of decoding a few held-out prompts greedily, if there are any."""
        drafter, rounds = self.make_drafter(for_decoding(self.adapter, self.target)), []
        for ids in self.text.prompts():
            rounds += generate(self.model, drafter, ids, 64, eos=self.model.config.eos_token_ids)
        tokens = sum(len(round_.tokens) for round_ in rounds)
        return {"compression_rate": tokens / len(rounds)} if rounds else {}

    def make_drafter(self, adapter):
        return KangarooDrafter(self.model, adapter, adapter.exit_layer, head=adapter.head)

    def finish(self):
        """The adapter, with the facts of its training."""
        args, state, device = self.args, self.state, self.model.norm.weight.device
        held_out = {name: round(value, 4) for name, value in self.evaluate().items()}
        self.save({
            "data": [Path(path).name for path in args.data], "documents": len(self.text.documents),
            "held_out_documents": len(self.text.held), "updates": args.updates,
            "tokens": state["tokens"], "seconds": round(state["seconds"]),
            "waited": round(state["waited"], 1), "device": str(device), "learn": args.learn,
            "loss": args.loss, "lr": args.lr, "init": state["begun_from"],
            "vocabulary_coverage": round(self.text.coverage, 4), "held_out": held_out})

    def save(self, facts):
        """The weights and config.json, which `kangaroo.py --adapter` takes."""
        folder = self.args.out
        write_safetensors(folder / "adapter.safetensors",
                          trained_weights(self.adapter, self.target.vocabulary))
        write_json(folder / "config.json", config_json(self.adapter.config) | {
            "architecture": self.architecture, "exit_layer": self.args.exit_layer, "steps": STEPS,
            "threshold": THRESHOLD, "target": self.model.fingerprint,
            "chat_template": self.text.chat, "training": facts})


@end_together()
def train(args):
    Training(args).run()
