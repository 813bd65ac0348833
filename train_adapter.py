"""Train Kangaroo's adapter for any Llama that loads, on a CPU, one GPU or several.

    text -> token ids -> one pass of the frozen target -> states at the exit layer -> adapter
                                                       -> final distribution       -> loss

The adapter learns to make the target's own LM head say after ℓ layers what it says after all of
them; or (`--learn text`) what the text says next, for which the first ℓ layers suffice. Hidden
states live in memory for as long as a window of documents is trained on, and never on disk. A
window may be passed over several times (`--passes`), because on a CPU the target's pass is several
times as slow as a step of the adapter.

Nothing here can change what `kangaroo.py` decodes, only how fast. Output: adapter.safetensors,
config.json and log.jsonl. Left out on purpose: training the target; options and their checks
(`support/training_options.py`); several processes (`support/processes.py`); Medusa's heads
(`drafters/train_medusa.py`). Read first `Target`, then `train_step`, then `Training`;
docs/training.md says how to choose options, and what to do if few drafts are accepted.
"""
import contextlib
import copy
import math
import os
import random
import sys
import time
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from drafters.adapters import ADAPTERS, PartialHead, describe, load_adapter, new_adapter
from kangaroo import STEPS, THRESHOLD, KangarooDrafter, generate
from support.chat import find_chat_template
from support.checkpoint import (
    config_json,
    load_llama,
    trained_weights,
    write_json,
    write_safetensors,
)
from support.data import (
    Windows,
    batches_of,
    digest,
    encode,
    every_token,
    most_frequent,
    prompt_of,
    split,
)
from support.errors import UserError, require
from support.processes import Processes, run_among_others
from support.program import run_program
from support.progress import Progress, load_checkpoint, save_checkpoint, trim_log
from support.tokenizer import Tokenizer
from support.training_options import EXACT, parse_adapter_options, refuse_misfit

import torch
import torch.nn.functional as F

BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.0  # of AdamW; so small a module needs no decay
CLIP = 1.0  # the largest norm of a gradient: only that of the first updates is larger
# Of p (n, V), the target's distribution, and log q, the adapter's -> (n,). Compared in
# docs/training.md.
LOSSES = {"cross-entropy": lambda p, log_q: -(p * log_q).sum(-1),
          "reverse": lambda p, log_q: (log_q.exp() * (log_q - p.clamp(min=1e-30).log())).sum(-1),
          "acceptance": lambda p, log_q: -overlap(p, log_q).clamp(min=1e-6).log(),
          "hard": lambda p, log_q: F.nll_loss(log_q, p.argmax(-1), reduction="none")}


# --------------------------------------------------------------------------------------------------
# What is learned: the target's states, and the loss

class States(NamedTuple):
    """A batch behind the target's pass: B texts of T positions, n of which are to be learned."""
    x: torch.Tensor         # (B, T, d) the exit layer's states, which the adapter gets
    learn: torch.Tensor     # (B, T) bool: which n positions
    y: torch.Tensor         # (n, d) normed last states: the LM head makes p of them
    log_sums: torch.Tensor  # (n,) log Σ exp of the LM head's logits, float32
    best: torch.Tensor      # (n,) the target's top-1 tokens


class TextStates(NamedTuple):
    """A batch where the text itself is learned: x and learn are as in `States`."""
    x: torch.Tensor          # (B, T, d)
    learn: torch.Tensor      # (B, T) bool
    following: torch.Tensor  # (n,) the next token, by its number in the vocabulary


class Target:
    """The frozen model: its states at the exit layer, its final distribution, and the loss."""
    CHUNK = {"cpu": 512, "cuda": 2048}  # positions whose logits exist at once

    def __init__(self, model, exit_layer, vocabulary=None):
        self.chunk = self.CHUNK[model.norm.weight.device.type]
        self.model, self.exit_layer, self.vocabulary = model, exit_layer, vocabulary
        weight = model.lm_head.weight
        self.head = weight if vocabulary is None else weight[vocabulary]

    @torch.no_grad()
    def states(self, ids, learn):
        """One pass over ids (B, T), of which learn (B, T) bool are to be learned -> States."""
        ids, learn = ids.to(self.head.device), learn.to(self.head.device)
        x, positions = self.run_to_exit(ids), torch.arange(ids.shape[1], device=ids.device)
        y = self.model.run_layers(x, positions, None, self.exit_layer, len(self.model.layers))
        return States(x, learn, *self.final(y[learn]))

    def run_to_exit(self, ids):
        """ids (B, T) -> the states (B, T, d) at the exit layer."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.model.embed_tokens(ids)
        return self.model.run_layers(x, positions, None, 0, self.exit_layer)

    @torch.no_grad()
    def final(self, y):
        """The last layer's output (n, d) -> (y, log_sums, best) of `States`."""
        y = self.model.norm(y)
        log_sums, best = zip(*[(logits.float().logsumexp(-1), logits.max(-1).indices)
                               for logits in map(self.model.lm_head, y.split(self.chunk))])
        return y, torch.cat(log_sums), torch.cat(best)

    def draft_logits(self, x):
        """What the adapter's output (n, d) says: (n, V), V the vocabulary that is drafted."""
        return F.linear(x.to(self.head.dtype), self.head)

    def loss(self, adapter, states, kind, scale=None, autocast=torch.bfloat16):
        """Sums over a batch: loss, acceptance Σ min(p, q), agreement of the top-1 tokens, n.

        p is the target's distribution, q the adapter's, over `vocabulary` if there is one: p then
        sums to less than 1. With `scale`, the gradients of scale × loss are added to the adapter's.
        The logits of all positions at once would not fit into memory. So the loss runs in chunks on
        a detached copy of the adapter's output, whose gradient then goes back through the adapter
        in one piece.
        """
        x, learn, *learned = states
        mixed = torch.autocast(x.device.type, autocast) if autocast else contextlib.nullcontext()
        with torch.set_grad_enabled(scale is not None):
            with mixed:
                out = adapter(x.float(), torch.arange(x.shape[1], device=x.device))[learn]
            leaf = out.detach().requires_grad_(scale is not None)
            sums = torch.zeros(4, dtype=torch.float64, device=x.device)
            for chunk in zip(*(t.split(self.chunk) for t in (leaf, *learned))):
                loss, figures = self.loss_of(*chunk, LOSSES[kind])
                if scale is not None:
                    (scale * loss).backward()
                sums += figures
            if scale is not None:
                out.backward(leaf.grad)
        return sums

    def loss_of(self, x, y, log_sums, best, loss):
        """(the loss, summed; the four sums of `loss`) at n positions, x (n, d) the adapter's."""
        p = (F.linear(y.to(self.head.dtype), self.head).float() - log_sums[:, None]).exp()
        log_q = self.draft_logits(x).float().log_softmax(-1)
        total, top = loss(p, log_q).sum(), log_q.argmax(-1)
        top = top if self.vocabulary is None else self.vocabulary[top]
        return total, sums_of(total, overlap(p, log_q), top == best)


class TextTarget(Target):
    """The text as the target: all of p is on its next token, so only the first layers run."""

    @torch.no_grad()
    def states(self, ids, learn):
        """The first layers over ids (B, T), of which learn (B, T) bool count -> TextStates."""
        ids, learn = ids.to(self.head.device), learn.to(self.head.device)
        following = ids.roll(-1, 1)[learn]
        if self.vocabulary is not None:
            following = torch.searchsorted(self.vocabulary, following)
        return TextStates(self.run_to_exit(ids), learn, following)

    def loss_of(self, x, following, loss):
        """(−log q of the next token, summed; the four sums of `loss`): Σ min(p, q) is q."""
        log_q = self.draft_logits(x).float().log_softmax(-1)
        total = log_q.gather(1, following[:, None])[:, 0]
        figures = sums_of(-total.sum(), total.exp(), log_q.argmax(-1) == following)
        return -total.sum(), figures


def sums_of(total, acceptance, agreement):
    """The four sums of `Target.loss`, of a summed loss and of (n,) and (n,) bool."""
    n = torch.ones_like(agreement, dtype=torch.long).sum()
    return torch.stack((total.detach(), acceptance.detach().sum(), agreement.sum(), n))


def figures_of(sums):
    """What the log has of the sums of `Target.loss`: means by name."""
    return dict(zip(("loss", "acceptance", "agreement"), (sums[:3] / sums[3]).tolist()))


def overlap(p, log_q):
    """Σ min(p, q): how often the usual sampling rule would accept; (n, V) -> (n,)."""
    return torch.minimum(p, log_q.exp()).sum(-1)


# --------------------------------------------------------------------------------------------------
# An update: what it learns from, and the step

def train_step(adapter, optimizer, target, batches, kind, tokens, processes, autocast):
    """states -> adapter -> loss in chunks -> backward -> step; returns the sums of `Target.loss`.

    batches: the States of this process; tokens: how many are learned in all processes together.
    """
    sums = 0
    optimizer.zero_grad()
    for i, states in enumerate(batches):
        # The loss is a mean over the tokens of all processes. DDP divides gradients by their
        # number, so they are scaled by it; and only the last batch of an update synchronises.
        scale = processes.ranks / max(1, tokens)
        with processes.without_sync(adapter, i + 1 < len(batches)):
            sums += target.loss(adapter, states, kind, scale, autocast)
    norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), CLIP)
    require(norm.isfinite(),  # in all processes alike
            f"--lr {optimizer.defaults['lr']}: the gradient is no longer finite; lower --lr or, if "
            "that does not help, give a --dtype that the target's values fit in")
    optimizer.step()
    return sums


def learning_rate(step, total, warmup):
    """The share of the peak at this step: a linear rise, then half a cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def updates(documents, args, encode, target, place=(0, 0), rank=0, ranks=1, workers=0):
    """Endless: (place after it, this rank's states, tokens learned by all) of each update.

    Begins at `place` = (window, update). Each update takes `args.batches` batches, dealt to the
    ranks in turn: with any number of processes an update sees the same batches. Which of them a
    batch is in its update stays the same in all passes, so that one rank alone computes its states.
    All of it follows from the seed and the place, which is what makes resuming exact.
    """
    windows = Windows(documents, args.window, args.seed, encode)
    for window, examples in windows.numbered(place[0], workers):
        batches = batches_of(examples, args.batch_tokens)
        # Later windows that fall short are skipped.
        require(window or len(batches) >= args.batches,
                f"--window {args.window}: its documents fill {len(batches)} batches, --batches "
                f"wants {args.batches}; lower that or --batch-tokens, or raise --window if there "
                "are more documents")
        order = []
        for k in range(args.passes):
            shuffle = random.Random(f"{args.seed} {window} {k}").sample
            columns = [range(i, len(batches), args.batches) for i in range(args.batches)]
            order += zip(*(shuffle(column, len(column)) for column in columns))
        states = {}
        for update in range(place[1] if window == place[0] else 0, len(order)):
            mine = order[update][rank::ranks]
            for i in mine:
                if i not in states:
                    found = target.states(*batches[i])
                    states[i] = found if args.passes == 1 else in_half(found)
            tokens = sum(batches[i][1].sum().item() for i in order[update])
            after = (window, update + 1) if update + 1 < len(order) else (window + 1, 0)
            yield after, [states[i] for i in mine], tokens
            if args.passes == 1:
                states.clear()


def in_half(states):
    """The states as they are kept: float32 vectors in bfloat16, which is half as long."""
    return type(states)(*(t.bfloat16() if t.dim() > 1 and t.dtype == torch.float32 else t
                          for t in states))


# --------------------------------------------------------------------------------------------------
# The adapter, as it decodes

@torch.no_grad()
def for_decoding(adapter, target):
    """A copy of the adapter as `load_adapter` would give it."""
    copied = copy.deepcopy(adapter).to(target.head.dtype).requires_grad_(False)
    head = target.vocabulary is not None and PartialHead(target.model.lm_head, target.vocabulary)
    return describe(copied, "adapter", {}, target.exit_layer, head or None)


# --------------------------------------------------------------------------------------------------
# Training

class Training:
    """One run, in one of several processes. `run` is the loop; __init__, read_text and begin
    prepare it.

    What drafters/train_medusa.py does otherwise: first_adapter, make_target, make_drafter, save;
    `exact`, the options that a resumed run must share; `architecture`, for messages.
    """
    exact = (*EXACT, "learn", "exit_layer", "loss")

    def __init__(self, args):
        self.args, self.processes = args, Processes(args.device, args.dtype)
        self.loss = getattr(args, "loss", "cross-entropy")  # a name in LOSSES
        device, dtype = self.processes.device, self.processes.dtype
        forks = device.type == "cuda" and hasattr(os, "fork")
        usual = min(4, os.cpu_count() or 1) if forks else 0
        self.workers = usual if args.workers is None else args.workers  # processes that encode
        self.autocast = None if dtype == torch.float32 else torch.bfloat16
        self.model = load_llama(args.model, device, dtype)
        refuse_misfit(args, self.model.config, self.processes.ranks)
        torch.manual_seed(args.seed)
        self.adapter, self.architecture, self.begun_from = self.first_adapter()
        self.read_text()
        vocabulary, self.coverage = None, 1.0  # coverage: the share of the text that it can say
        if args.vocabulary:
            config = self.model.config
            vocabulary, self.coverage = most_frequent(self.sample_examples(), args.vocabulary,
                                                      config.vocab_size, config.eos_token_ids)
            vocabulary = vocabulary.to(device)
        self.target, self.teacher = self.make_target(vocabulary)
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=args.lr, betas=BETAS,
                                           weight_decay=WEIGHT_DECAY)
        self.checkpoint, self.log = args.out / "checkpoint.pt", args.out / "log.jsonl"
        self.begin()

    def first_adapter(self):
        """What training begins from, in float32; its architecture; and how it was made."""
        args, n_layers = self.args, len(self.model.layers)
        require(0 <= args.exit_layer < n_layers, f"--exit-layer {args.exit_layer}: must be at "
                f"least 0 and below the model's {n_layers} layers")
        if args.init is None:
            return new_adapter(ADAPTERS[args.architecture], self.model), args.architecture, None
        try:
            adapter = load_adapter(args.init, self.model, args.exit_layer)
        except UserError as e:
            raise UserError(f"--init {e}") from None
        adapter.head, facts = None, adapter.facts  # --vocabulary chooses again
        return (adapter.float().requires_grad_(True), facts.get("architecture", "attention"),
                facts.get("training", str(args.init)))

    def make_target(self, vocabulary):
        """The Target that held-out figures are of, and the one that is learned from."""
        target = Target(self.model, self.args.exit_layer, vocabulary)
        if self.args.learn == "target":
            return target, target
        drafted = range(self.model.config.vocab_size) if vocabulary is None else set(
            vocabulary.tolist())
        self.encode = partial(every_token, encode=self.encode, wanted=drafted)
        return target, TextTarget(self.model, self.args.exit_layer, vocabulary)

    def make_drafter(self):
        """A drafter with the adapter as it is now."""
        adapter = for_decoding(self.adapter, self.target)
        return KangarooDrafter(self.model, adapter, adapter.exit_layer, head=adapter.head)

    def save(self, facts):
        """The weights and config.json, which `kangaroo.py --adapter` takes."""
        args, target = self.args, self.target
        write_safetensors(args.out / "adapter.safetensors",
                          trained_weights(self.adapter, target.vocabulary))
        write_json(args.out / "config.json", config_json(self.adapter.config) | {
            "architecture": self.architecture, "exit_layer": args.exit_layer, "steps": STEPS,
            "threshold": THRESHOLD, "target": self.model.fingerprint, "chat_template": self.chat,
            "training": facts})

    def read_text(self):
        """Documents to train on and held out, and how to encode them."""
        args, config = self.args, self.model.config
        self.tokenizer = Tokenizer(args.model, config)
        self.model.config = config = self.tokenizer.with_ends(config)
        self.chat, self.template = find_chat_template(args.model, args.chat)
        self.encode = partial(encode, tokenizer=self.tokenizer, template=self.template,
                              eos=config.eos_token_ids,
                              max_length=min(args.max_length, config.max_position_embeddings))
        self.documents, self.held = split(args.data, args.allow_truncated)
        self.tested = self.held or self.documents[:1]
        examples = [self.encode(document) for document in self.tested[:args.eval_documents]]
        self.held_batches = batches_of(examples, args.batch_tokens)
        require(self.held_batches, f"--max-length {args.max_length}: leaves nothing to learn of "
                f"the {len(self.tested)} held-out documents")

    def sample_examples(self, most=4000):
        """Some documents, encoded one by one: to encode all takes minutes, and hardly changes which
        of their tokens are frequent."""
        documents = random.Random(0).sample(self.documents, min(most, len(self.documents)))
        encoded = Windows(documents, 1, 0, self.encode).numbered(0, self.workers)
        return (example for _, [example] in islice(encoded, len(documents)))

    def begin(self):
        """The state of a new run, or that of the one to go on with."""
        args, dtype = self.args, str(self.model.norm.weight.dtype).removeprefix("torch.")
        made_with = {"init": args.init and str(args.init)} if hasattr(args, "init") else {}
        made_with |= {"architecture": self.architecture, "chat": self.chat, "dtype": dtype,
                      "model": f"of fingerprint {self.model.fingerprint}",
                      "data": f"of digest {digest(self.documents)}"}
        made_with |= {name: getattr(args, name) for name in self.exact}
        self.state = {"step": 0, "window": 0, "update": 0, "tokens": 0, "seconds": 0.0,
                      "options": made_with}
        if args.resume:
            self.state = load_checkpoint(self.checkpoint, self.adapter, [self.optimizer],
                                         made_with)
        if self.processes.rank == 0:
            if self.template.note and any(isinstance(d, list) for d in self.documents):
                print(self.template.note, file=sys.stderr)
            print(self.describe(dtype), file=sys.stderr)
            logged = trim_log(self.log, self.state["step"])
            self.evaluated = max((r["step"] for r in logged if "held_out" in r), default=0)
            prompts = [prompt_of(document, self.tokenizer, self.template)
                       for document in self.tested[:args.eval_prompts]]
            context = self.model.config.max_position_embeddings
            self.prompts = [ids for ids in prompts if 0 < len(ids) < context]
            self.progress = Progress(self.log, args.updates, self.state["step"])

    @cached_property
    def held_out(self):
        """The states of the held-out documents, not before they are needed: it takes a while."""
        return [in_half(self.target.states(*batch)) for batch in self.held_batches]

    def describe(self, dtype):
        args, n = self.args, sum(p.numel() for p in self.adapter.parameters())
        text = (f"{args.model} · {self.model.norm.weight.device} · {dtype} · exit layer "
                f"{self.target.exit_layer} · adapter {self.architecture}, {n / 1e6:.2f} M "
                f"parameters · {len(self.documents)} documents, {len(self.held)} held out")
        if not self.held:
            text += " (too few: figures are of one that is trained on)"
        if args.vocabulary:
            text += f" · drafts from {args.vocabulary} tokens, {self.coverage:.1%} of the text"
        return text

    def run(self):
        """All updates that are left, then the adapter."""
        args, state, processes = self.args, self.state, self.processes
        elapsed, begin, place = state["seconds"], time.time(), (state["window"], state["update"])
        stream = updates(self.documents, args, self.encode, self.teacher, place, processes.rank,
                         processes.ranks, self.workers)
        adapter = processes.share(self.adapter)
        self.evaluate_if_due()  # a killed run may have saved, and not evaluated any more
        while state["step"] < args.updates:
            (state["window"], state["update"]), batches, tokens = next(stream)
            for group in self.optimizer.param_groups:
                group["lr"] = args.lr * learning_rate(state["step"], args.updates, args.warmup)
            sums = train_step(adapter, self.optimizer, self.teacher, batches, self.loss, tokens,
                              processes, self.autocast)
            state["step"] += 1
            state["tokens"] += tokens
            state["seconds"] = elapsed + time.time() - begin
            self.after_update(sums, tokens)
        if processes.rank == 0:
            self.finish()
        processes.wait()
        processes.leave()

    def after_update(self, sums, tokens):
        """Report; save; evaluate, after saving, so that nothing is lost if that fails."""
        args, step = self.args, self.state["step"]
        if self.processes.rank == 0:
            self.progress.report(step, figures_of(sums), tokens)
            if step % args.save_every == 0 or step == args.updates:
                save_checkpoint(self.checkpoint, self.adapter, [self.optimizer], self.state)
        self.evaluate_if_due()

    def evaluate_if_due(self):
        step = self.state["step"]
        if step and step % self.args.eval_every == 0 and step < self.args.updates:
            if self.processes.rank == 0 and self.evaluated < step:
                self.evaluate()
            self.processes.wait()

    def evaluate(self):
        """Figures of the held-out states, and the compression rate of decoding the prompts
        greedily; reported."""
        self.evaluated = self.state["step"]
        figures = figures_of(sum(self.target.loss(self.adapter, states, self.loss,
                                                  autocast=self.autocast)
                                 for states in self.held_out))
        if self.prompts:
            model, drafter = self.model, self.make_drafter()
            rounds = [round_ for ids in self.prompts for round_ in generate(
                model, drafter, ids, 64, eos=model.config.eos_token_ids)]
            figures["compression_rate"] = sum(len(r.tokens) for r in rounds) / len(rounds)
        self.progress.write({"step": self.state["step"], "held_out": figures})
        shown = " · ".join(f"{name} {value:.3f}" for name, value in figures.items())
        self.progress.say(f"held out: {shown}")
        return figures

    def finish(self):
        """The result, with the facts of its training."""
        args, state = self.args, self.state
        held_out = {name: round(value, 4) for name, value in self.evaluate().items()}
        self.save({
            "data": [Path(path).name for path in args.data], "documents": len(self.documents),
            "held_out_documents": len(self.held), "updates": args.updates,
            "tokens": state["tokens"], "seconds": round(state["seconds"]),
            "device": str(self.model.norm.weight.device), "learn": getattr(args, "learn", "target"),
            "loss": self.loss, "lr": args.lr, "init": self.begun_from,
            "vocabulary_coverage": round(self.coverage, 4), "held_out": held_out})


def main(argv=None):
    return run_program("train_adapter.py", lambda: run_among_others(
        lambda: Training(parse_adapter_options(argv, LOSSES)).run()),
        "interrupted, --resume goes on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
