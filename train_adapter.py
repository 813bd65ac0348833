"""Train Kangaroo's adapter for any Llama that loads, on a CPU, one GPU or several.

    text -> token ids -> one pass of the frozen target -> states at the exit layer -> adapter
                                                       -> final distribution       -> loss

The adapter learns to make the target's own LM head say after ℓ layers what it says after all of
them; or (`--learn text`) what the text says next, for which the first ℓ layers suffice. Hidden
states live in memory for as long as a window of documents is trained on, and never on disk. A
window may be passed over several times (`--passes`), because on a CPU the target's pass is several
times as slow as a step of the adapter. Medusa heads (`--architecture medusa`) learn likewise: head
k from the last layer's states, what the target says k positions later.

Nothing here can change what `kangaroo.py` decodes, only how fast. Output: adapter.safetensors,
config.json and log.jsonl. Left out on purpose: training the target. Read first `Target`, then
`Training`; docs/training.md says how to choose options, and what to do if few drafts are accepted.
"""
import contextlib
import copy
import datetime
import math
import os
import random
import sys
import time
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from drafters.medusa import Heads, MedusaDrafter, sparse_tree
from kangaroo import ADAPTERS, STEPS, THRESHOLD, KangarooDrafter, generate
from support.chat import find_chat_template
from support.checkpoint import (
    config_json,
    load_adapter,
    load_llama,
    named_weights,
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
from support.decoder import pick_device_and_dtype
from support.errors import UserError
from support.program import HELP, Parser, options, refuse_below_one, run_program
from support.progress import Progress, load_checkpoint, save_checkpoint, trim_log
from support.tokenizer import Tokenizer

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = datetime.timedelta(minutes=10)  # of what all processes do together
# Options that a resumed run must share with the one that it goes on from.
EXACT = ("learn", "exit_layer", "architecture", "vocabulary", "loss", "lr", "weight_decay",
         "warmup", "clip", "updates", "batches", "batch_tokens", "max_length", "window", "passes",
         "seed", "heads")
LEARN = "target", "text"
# Of p (n, V), the target's distribution, and log q, the adapter's -> (n,). Compared in
# docs/training.md.
LOSSES = {"cross-entropy": lambda p, log_q: -(p * log_q).sum(-1),
          "reverse": lambda p, log_q: (log_q.exp() * (log_q - p.clamp(min=1e-30).log())).sum(-1),
          "acceptance": lambda p, log_q: -overlap(p, log_q).clamp(min=1e-6).log(),
          "hard": lambda p, log_q: F.nll_loss(log_q, p.argmax(-1), reduction="none")}


# --------------------------------------------------------------------------------------------------
# The target's pass and the loss

class Target:
    """The frozen model: its states at the exit layer, its final distribution, and the loss.

    The states of a batch are a tuple of five:
    x (B, T, d)       the exit layer's states, which the adapter gets
    learn (B, T)      bool: which n positions are to be learned; for these alone
    y (n, d)          the final states, of which the LM head makes the target's distribution
    log_sums (n,)     log Σ exp of its logits, float32
    best (n,)         its top-1 tokens
    """
    CHUNK = {"cpu": 512, "cuda": 2048}  # positions whose logits exist at once

    def __init__(self, model, exit_layer, vocabulary=None):
        self.chunk = self.CHUNK[model.norm.weight.device.type]
        self.model, self.exit_layer, self.vocabulary = model, exit_layer, vocabulary
        weight = model.lm_head.weight
        self.head = weight if vocabulary is None else weight[vocabulary]

    @torch.no_grad()
    def states(self, ids, learn):
        """One pass over ids (B, T) -> the states of the batch."""
        model, device = self.model, self.head.device
        ids, learn = ids.to(device), learn.to(device)
        positions = torch.arange(ids.shape[1], device=device)
        x = model.run_layers(model.embed_tokens(ids), positions, None, 0, self.exit_layer)
        return x, learn, *self.wanted(x, ids, learn, positions)

    def wanted(self, x, ids, learn, positions):
        """(y, log_sums, best) of the positions to be learned."""
        y = self.model.run_layers(x, positions, None, self.exit_layer, len(self.model.layers))
        return self.final(y[learn])

    @torch.no_grad()
    def final(self, y):
        """The last layer's output (n, d) -> (y, log_sums, best)."""
        y = self.model.norm(y)
        whole = [(logits.float().logsumexp(-1), logits.max(-1).indices)
                 for logits in map(self.model.lm_head, y.split(self.chunk))]
        log_sums, best = zip(*whole) if whole else ((y[:, 0].float(),), (y[:, 0].long(),))
        return y, torch.cat(log_sums), torch.cat(best)

    def draft_logits(self, x):
        """What the adapter's output (n, d) says."""
        return F.linear(x.to(self.head.dtype), self.head)

    def loss(self, adapter, states, kind, scale=None, autocast=torch.bfloat16):
        """Sums over a batch: loss, acceptance Σ min(p, q), agreement of the top-1 tokens, n.

        p is the target's distribution, q the adapter's, over `vocabulary` if there is one: p then
        sums to less than 1. With `scale`, the gradients of scale × loss are added to the adapter's.
        The logits of all positions at once would not fit into memory. So the loss runs in chunks on
        a detached copy of the adapter's output, whose gradient then goes back through the adapter
        in one piece.
        """
        x, learn, *wanted = states
        mixed = torch.autocast(x.device.type, autocast) if autocast else contextlib.nullcontext()
        with torch.set_grad_enabled(scale is not None):
            with mixed:
                out = adapter(x.float(), torch.arange(x.shape[1], device=x.device))[learn]
            leaf = out.detach().requires_grad_(scale is not None)
            sums = torch.zeros(4, dtype=torch.float64, device=x.device)
            chunks = zip(*(t.split(self.chunk) for t in (leaf, *wanted)))
            for chunk in chunks:
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
        figures = (total.detach(), overlap(p, log_q).detach().sum(), (top == best).sum(),
                   torch.ones_like(top).sum())
        return total, torch.stack(figures)


class TextTarget(Target):
    """The same where the text itself is the target: all of p is on its next token.

    So only the first layers run. Of `states`, x and learn are as above, and then comes
    following (n,)    the next token, by its number in the vocabulary
    """
    def wanted(self, x, ids, learn, positions):
        following = ids.roll(-1, 1)[learn]
        if self.vocabulary is not None:
            following = torch.searchsorted(self.vocabulary, following)
        return following,

    def loss_of(self, x, following, loss):
        """Here any loss is −log q of the next token, and Σ min(p, q) is q."""
        log_q = self.draft_logits(x).float().log_softmax(-1)
        said = log_q.gather(1, following[:, None])
        figures = (-said.detach().sum(), said.detach().exp().sum(),
                   (log_q.argmax(-1) == following).sum(), torch.ones_like(following).sum())
        return -said.sum(), torch.stack(figures)


class MedusaTarget(Target):
    """The same for Medusa heads, which read the last layer: head k is to say at position t what the
    target says at t + k."""
    WEIGHT = 0.8  # of a head's loss against that of the one before

    def loss(self, heads, states, kind, scale=None, autocast=torch.bfloat16):
        """As for an adapter; the sums are over all heads."""
        sums = 0
        for k, head in enumerate(heads.heads, 1):
            sums += super().loss(lambda x, _, head=head: head(x), self.before(k, states), kind,
                                 scale and scale * self.WEIGHT ** (k - 1), autocast)
        return sums

    @torch.no_grad()
    def before(self, k, states):
        """The states of a batch for head k: of every position the normed ones k positions before
        it, as it reads them."""
        x, learn, y, log_sums, best = states
        later = learn.clone()
        later[:, :k] = False  # no state is so many positions before these
        kept = later[learn]
        x = self.model.norm(x.to(self.head.dtype)).float()
        return x.roll(k, 1), later, y[kept], log_sums[kept], best[kept]

    @torch.no_grad()
    def tree(self, heads, held_out, nodes=31, candidates=10):
        """Medusa's tree for these heads, the likeliest path first: how often each choice of each
        is right on held-out states decides. Its first n nodes are the tree of n nodes."""
        right = []
        for k, head in enumerate(heads.heads, 1):
            hits, n = torch.zeros(candidates), 0
            for states in held_out:
                x, learn, _, _, best = self.before(k, states)
                top = self.draft_logits(head(x[learn])).topk(candidates).indices
                top = top if self.vocabulary is None else self.vocabulary[top]
                hits += (top == best[:, None]).sum(0).cpu()
                n += len(best)
            right.append((hits / max(1, n)).tolist())
        return sparse_tree(right, nodes)


def figures_of(sums):
    """What the log has of the sums of `Target.loss`: means by name."""
    return dict(zip(("loss", "acceptance", "agreement"), (sums[:3] / sums[3]).tolist()))


def overlap(p, log_q):
    """Σ min(p, q): how often the usual sampling rule would accept; (n, V) -> (n,)."""
    return torch.minimum(p, log_q.exp()).sum(-1)


# --------------------------------------------------------------------------------------------------
# What an update learns from

def updates(documents, args, encode, target, place=(0, 0), rank=0, ranks=1):
    """Endless: (place after it, this rank's states, tokens learned by all) of each update.

    Begins at `place` = (window, update). Each update takes `args.batches` batches, dealt to the
    ranks in turn: with any number of processes an update sees the same batches. Which of them a
    batch is in its update stays the same in all passes, so that one rank alone computes its states.
    All of it follows from the seed and the place, which is what makes resuming exact.
    """
    windows = Windows(documents, args.window, args.seed, encode)
    for window, examples in windows.numbered(place[0], args.workers):
        batches = batches_of(examples, args.batch_tokens)
        if window == 0 and len(batches) < args.batches:  # later ones that fall short are skipped
            raise UserError(f"--window {args.window}: its documents fill {len(batches)} batches, "
                            f"--batches wants {args.batches}; lower that or --batch-tokens, or "
                            "raise --window if there are more documents")
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
            last = update + 1 == len(order)
            after = (window + 1, 0) if last else (window, update + 1)
            yield after, [states[i] for i in mine], tokens
            if args.passes == 1:
                states.clear()


def in_half(states):
    """The states as they are kept: float32 vectors in bfloat16, which is half as long."""
    return tuple(t.bfloat16() if t.dim() > 1 and t.dtype == torch.float32 else t for t in states)


# --------------------------------------------------------------------------------------------------
# The adapter, before and after

UNSURE = 0.3  # of the target's final norm: what a new adapter begins with


def new_adapter(cls, model):
    """An adapter in float32 that begins as the target's final norm alone, scaled down.

    Its residual branches start at zero. What it then says of the exit state is wrong, and with the
    target's own norm it would say that with a trained model's certainty, which would have to be
    unlearned first (docs/training.md has the trial).
    """
    adapter = cls(replace(model.config, num_hidden_layers=1))
    for name, weight in named_weights(adapter).items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.zero_()
        elif weight.dim() > 1:
            weight.data.normal_(std=weight.shape[1] ** -0.5)
    adapter.norm.weight.data.copy_(UNSURE * model.norm.weight)
    return adapter.to(model.norm.weight.device)


def new_heads(n, model):
    """Medusa heads in float32 that begin as the target's LM head: their blocks add zero."""
    heads = Heads((n, 1, model.config.hidden_size, 0))
    for weight in heads.parameters():
        weight.data.zero_()
    return heads.to(model.norm.weight.device)


def first_adapter(args, model):
    """What training begins from, in float32, and how that was made.

    That is a new adapter, or the one in --init with its architecture.
    """
    if args.architecture == "medusa":
        return new_heads(args.heads, model), None
    if args.init is None:
        return new_adapter(ADAPTERS[args.architecture], model), None
    try:
        adapter, facts = load_adapter(args.init, model, args.exit_layer)
    except UserError as e:
        raise UserError(f"--init {e}") from None
    args.architecture = facts.get("architecture", "attention")
    adapter.head = adapter.vocabulary = None  # --vocabulary chooses again
    return adapter.float().requires_grad_(True), facts.get("training", str(args.init))


@torch.no_grad()
def for_decoding(adapter, target):
    """A copy of the adapter as `load_adapter` would give it."""
    copied = copy.deepcopy(adapter).to(target.head.dtype).requires_grad_(False)
    if target.vocabulary is not None:
        copied.draft_from(target.vocabulary, target.model.lm_head)
    return copied


def save_adapter(folder, adapter, args, target, chat, facts):
    """The weights (bfloat16) and config.json, which `kangaroo.py --adapter` takes."""
    tensors = {name: weight.detach().bfloat16() for name, weight in named_weights(adapter).items()}
    if target.vocabulary is not None:
        tensors["vocabulary"] = target.vocabulary.int()
    if args.architecture == "medusa":
        tensors = {name.removeprefix("heads."): tensor for name, tensor in tensors.items()}
        write_safetensors(folder / "medusa_lm_head.safetensors", tensors)
        return write_json(folder / "config.json", {
            "architecture": "medusa", "medusa_num_heads": args.heads, "medusa_num_layers": 1,
            "medusa_choices": adapter.tree,
            "target": target.model.fingerprint, "chat_template": chat, "training": facts})
    write_safetensors(folder / "adapter.safetensors", tensors)
    write_json(folder / "config.json", config_json(adapter.config) | {
        "architecture": args.architecture, "exit_layer": args.exit_layer, "steps": STEPS,
        "threshold": THRESHOLD, "target": target.model.fingerprint, "chat_template": chat,
        "training": facts})


# --------------------------------------------------------------------------------------------------
# Training

def learning_rate(step, total, warmup):
    """The share of the peak at this step: a linear rise, then half a cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def evaluate(adapter, target, held_out, prompts, args, autocast):
    """Figures of the held-out states, and the compression rate of decoding the prompts greedily."""
    sums = sum(target.loss(adapter, states, args.loss, autocast=autocast) for states in held_out)
    figures = figures_of(sums)
    if prompts:
        model, copied, rounds = target.model, for_decoding(adapter, target), []
        for ids in prompts:
            drafter = (MedusaDrafter(model, copied) if args.architecture == "medusa" else
                       KangarooDrafter(model, copied, args.exit_layer))
            rounds += generate(model, drafter, ids, 64, eos=model.config.eos_token_ids)
        figures["compression_rate"] = sum(len(r.tokens) for r in rounds) / len(rounds)
    return figures


class Training:
    """One run, in one of `ranks` processes. `run` is the loop; __init__, read_text and begin
    prepare it."""

    def __init__(self, args):
        self.args = args
        self.rank, self.ranks, self.slow_group = join(args)
        device, dtype = pick_device_and_dtype(args.device, args.dtype)
        if args.workers is None:
            forks = device.type == "cuda" and hasattr(os, "fork")
            args.workers = min(4, os.cpu_count() or 1) if forks else 0
        self.autocast = None if dtype == torch.float32 else torch.bfloat16
        self.model = load_llama(args.model, device, dtype)
        refuse_misfit(args, self.model.config, self.ranks)
        torch.manual_seed(args.seed)
        self.adapter, self.begun_from = first_adapter(args, self.model)
        medusa = args.architecture == "medusa"
        exit_layer = self.model.config.num_hidden_layers if medusa else args.exit_layer
        self.read_text()
        vocabulary, self.coverage = None, 1.0  # coverage: the share of the text that it can say
        if args.vocabulary:
            config = self.model.config
            vocabulary, self.coverage = most_frequent(self.drawn(), args.vocabulary,
                                                      config.vocab_size, config.eos_token_ids)
            vocabulary = vocabulary.to(device)
        self.target = (MedusaTarget if medusa else Target)(self.model, exit_layer, vocabulary)
        self.teacher = self.target  # what is learned from; held-out figures are of the target
        if args.learn == "text":
            self.teacher = TextTarget(self.model, exit_layer, vocabulary)
            drafted = range(self.model.config.vocab_size)
            drafted = set(vocabulary.tolist()) if args.vocabulary else drafted
            self.encode = partial(every_token, encode=self.encode, wanted=drafted)
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=args.lr,
                                           betas=(0.9, 0.95), weight_decay=args.weight_decay)
        self.checkpoint, self.log = args.out / "checkpoint.pt", args.out / "log.jsonl"
        self.begin()

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
        if not self.held_batches:
            raise UserError(f"--max-length {args.max_length}: leaves nothing to learn of the "
                            f"{len(self.tested)} held-out documents")

    def drawn(self, most=4000):
        """Documents drawn from all, encoded one by one: to encode all takes minutes, and hardly
        changes which of their tokens are frequent."""
        documents = random.Random(0).sample(self.documents, min(most, len(self.documents)))
        encoded = Windows(documents, 1, 0, self.encode).numbered(0, self.args.workers)
        return (example for _, [example] in islice(encoded, len(documents)))

    def begin(self):
        """The state of a new run, or that of the one to go on with."""
        args, dtype = self.args, str(self.model.norm.weight.dtype).removeprefix("torch.")
        made_with = {"init": args.init and str(args.init), "chat": self.chat, "dtype": dtype,
                     "model": f"of fingerprint {self.model.fingerprint}",
                     "data": f"of digest {digest(self.documents)}"}
        made_with |= {name: getattr(args, name) for name in EXACT}
        self.state = {"step": 0, "window": 0, "update": 0, "tokens": 0, "seconds": 0.0,
                      "options": made_with}
        if args.resume:
            self.state = load_checkpoint(self.checkpoint, self.adapter, [self.optimizer],
                                         made_with)
        if self.rank == 0:
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
                f"{self.target.exit_layer} · adapter {args.architecture}, {n / 1e6:.2f} M "
                f"parameters · {len(self.documents)} documents, {len(self.held)} held out")
        if not self.held:
            text += " (too few: figures are of one that is trained on)"
        if args.vocabulary:
            text += f" · drafts from {args.vocabulary} tokens, {self.coverage:.1%} of the text"
        return text

    def run(self):
        """All updates that are left, then the adapter."""
        args, state, elapsed, begin = self.args, self.state, self.state["seconds"], time.time()
        stream = updates(self.documents, args, self.encode, self.teacher,
                         (state["window"], state["update"]), self.rank, self.ranks)
        wrapped = DistributedDataParallel(self.adapter) if self.ranks > 1 else self.adapter
        self.evaluate_if_due()  # a killed run may have saved, and not evaluated any more
        while state["step"] < args.updates:
            (state["window"], state["update"]), mine, tokens = next(stream)
            for group in self.optimizer.param_groups:
                group["lr"] = args.lr * learning_rate(state["step"], args.updates, args.warmup)
            sums = self.one_update(wrapped, mine, tokens)
            state["step"] += 1
            state["tokens"] += tokens
            state["seconds"] = elapsed + time.time() - begin
            self.after_update(sums, tokens)
        if self.rank == 0:
            self.finish()
        self.wait()
        if self.ranks > 1:
            dist.destroy_process_group()

    def one_update(self, adapter, batches, tokens):
        """A step of the optimizer on batches of states; returns the sums of `Target.loss`."""
        args, ranks, sums = self.args, self.ranks, 0
        self.optimizer.zero_grad()
        for i, states in enumerate(batches):
            # The loss is a mean over the tokens of all ranks. DDP divides gradients by `ranks`, so
            # they are scaled by it; and only the last batch of an update synchronises.
            alone = ranks > 1 and i + 1 < len(batches)
            with adapter.no_sync() if alone else contextlib.nullcontext():
                scale = ranks / max(1, tokens)
                sums += self.teacher.loss(adapter, states, args.loss, scale, self.autocast)
        norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), args.clip)
        if not norm.isfinite():  # the same in all ranks
            raise UserError(f"--lr {args.lr}: the gradient is no longer finite; lower --lr or, if "
                            "that does not help, give a --dtype that the target's values fit in")
        self.optimizer.step()
        return sums

    def after_update(self, sums, tokens):
        """Report; save; evaluate, after saving, so that nothing is lost if that fails."""
        args, step = self.args, self.state["step"]
        done = step == args.updates
        if self.rank == 0:
            self.progress.report(step, figures_of(sums), tokens)
            if step % args.save_every == 0 or done:
                save_checkpoint(self.checkpoint, self.adapter, [self.optimizer], self.state)
        self.evaluate_if_due()

    def evaluate_if_due(self):
        step = self.state["step"]
        if step and step % self.args.eval_every == 0 and step < self.args.updates:
            if self.rank == 0 and self.evaluated < step:
                self.evaluate()
            self.wait()

    def evaluate(self):
        """The held-out figures, reported."""
        self.evaluated = self.state["step"]
        figures = evaluate(self.adapter, self.target, self.held_out, self.prompts, self.args,
                           self.autocast)
        self.progress.write({"step": self.state["step"], "held_out": figures})
        shown = " · ".join(f"{name} {value:.3f}" for name, value in figures.items())
        self.progress.say(f"held out: {shown}")
        return figures

    def wait(self):
        """Until all processes are here. What rank 0 does alone may outlast the group's timeout."""
        if self.ranks > 1:
            dist.barrier(self.slow_group)

    def finish(self):
        """The adapter, with the facts of its training."""
        args, state, device = self.args, self.state, self.model.norm.weight.device
        held_out = {name: round(value, 4) for name, value in self.evaluate().items()}
        if args.architecture == "medusa":
            self.adapter.tree = self.target.tree(self.adapter, self.held_out)
        save_adapter(args.out, self.adapter, args, self.target, self.chat, {
            "data": [Path(path).name for path in args.data], "documents": len(self.documents),
            "held_out_documents": len(self.held), "updates": args.updates,
            "tokens": state["tokens"], "seconds": round(state["seconds"]), "device": str(device),
            "learn": args.learn, "loss": args.loss, "lr": args.lr, "init": self.begun_from,
            "vocabulary_coverage": round(self.coverage, 4), "held_out": held_out})


def join(args):
    """(rank, ranks, a group to wait in for long) of this process; a GPU a process."""
    slow_group = None
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        device, _ = pick_device_and_dtype(args.device, args.dtype)
        if device.type == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)  # before NCCL chooses one itself
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        slow_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    return rank, ranks, slow_group


def refuse_misfit(args, config, ranks):
    """UserError for options that this model or number of processes does not allow."""
    for fits, message in (
            (args.architecture == "medusa" or 0 <= args.exit_layer < config.num_hidden_layers,
             f"--exit-layer {args.exit_layer}: must be at least 0 and below the model's "
             f"{config.num_hidden_layers} layers"),
            (args.architecture != "medusa" or ranks == 1,
             "--architecture medusa: trains in one process"),
            (args.batches % ranks == 0,
             f"--batches {args.batches}: must be a multiple of the {ranks} processes"),
            (not args.vocabulary or args.vocabulary <= config.vocab_size,
             f"--vocabulary {args.vocabulary}: must be at most the model's vocab_size "
             f"{config.vocab_size}")):
        if not fits:
            raise UserError(message)


# --------------------------------------------------------------------------------------------------
# Command line

def make_parser():
    parser = Parser(prog="train_adapter.py", formatter_class=HELP,
                    usage="python train_adapter.py --model DIR --data FILE… --exit-layer ℓ --out "
                    "DIR", description="Train Kangaroo's adapter for a Llama. See "
                    "docs/training.md.")
    option, flag = options(parser), partial(parser.add_argument, action="store_true")
    option("--model", "DIR", "the target, a Hugging Face folder", type=Path, required=True)
    option("--data", "FILE", "ShareGPT conversations (JSON list, JSONL) or text, also .gz",
           nargs="+", required=True)
    option("--out", "DIR", "where the adapter, its log and checkpoint go", type=Path,
           required=True)
    option("--exit-layer", "ℓ", "layers that draft (default: none, only for medusa)", type=int)
    option("--architecture", "NAME", "attention, layer (attention and an MLP) or medusa (heads)",
           "attention")
    option("--heads", "K", "heads of medusa", 3, type=int)
    option("--init", "DIR", "begin from this adapter, with its architecture (default: from a new "
           "one)", type=Path)
    option("--vocabulary", "N", "draft from the N most frequent tokens alone (default: from all)",
           type=int)
    option("--learn", "NAME", "target, what the whole model says; or text, the next token of all "
           "that is said, for which the first ℓ layers suffice", "target")
    option("--loss", "NAME", "cross-entropy, reverse (KL of the adapter to the target), acceptance "
           "(-log Σ min(p, q)) or hard (the target's likeliest token alone); with --learn text "
           "only of the held-out figures", "cross-entropy")
    option("--updates", "N", "optimizer steps", 2000, type=int)
    option("--batch-tokens", "N", "the most tokens of a batch, padding included", 4096, type=int)
    option("--batches", "N", "batches of an update, over all processes", 4, type=int)
    option("--max-length", "N", "documents are cut here", 1024, type=int)
    option("--window", "N", "documents that are in memory at once", 128, type=int)
    option("--workers", "N", "processes that encode the next windows (default: up to 4 with a "
           "GPU, else none)", type=int)
    option("--passes", "N", "passes over a window while the target's states for it are in memory",
           1, type=int)
    option("--lr", "X", "peak learning rate; warm-up and a cosine to zero around it", 1e-3,
           type=float)
    option("--warmup", "N", "updates of warm-up", 50, type=int)
    option("--weight-decay", "X", "of AdamW", 0.0, type=float)
    option("--clip", "X", "the largest norm of a gradient", 1.0, type=float)
    option("--seed", "S", "of weights and order", 0, type=int)
    option("--eval-every", "N", "updates between evaluations on held-out data", 200, type=int)
    option("--eval-documents", "N", "documents of an evaluation", 32, type=int)
    option("--eval-prompts", "N", "prompts that an evaluation decodes", 4, type=int)
    option("--save-every", "N", "updates between checkpoints", 50, type=int)
    option("--chat", "NAME", "chat template (default: the model folder's)")
    option("--dtype", "TYPE", "of the target: float32, bfloat16, float16 (default: bfloat16 where "
           "the device is fast at it)")
    option("--device", "DEV", "cpu, cuda, … (default: cuda if there is one)")
    flag("--resume", help="go on from the checkpoint in --out")
    flag("--allow-truncated", help="take what is readable of a JSON list that breaks off")
    return parser


def parse_arguments(argv):
    args = make_parser().parse_args(argv)
    refuse_below_one(args, "updates", "batch_tokens", "batches", "max_length", "window", "passes",
                     "heads", "warmup", "eval_every", "eval_documents", "save_every")
    for name, fits, want in (
            ("vocabulary", args.vocabulary is None or args.vocabulary >= 1, "at least 1"),
            ("eval_prompts", args.eval_prompts >= 0, "at least 0"),
            ("workers", args.workers is None or args.workers >= 0, "at least 0"),
            ("lr", 0 < args.lr < math.inf, "above 0"), ("clip", args.clip > 0, "above 0"),
            ("weight_decay", 0 <= args.weight_decay < math.inf, "at least 0"),
            ("seed", -2 ** 63 <= args.seed < 2 ** 63, "an integer of 64 bits")):
        if not fits:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(args, name)}: must be {want}")
    for name, values in (("architecture", [*ADAPTERS, "medusa"]), ("learn", LEARN),
                         ("loss", LOSSES)):
        if getattr(args, name) not in values:
            raise UserError(f"--{name} {getattr(args, name)}: choose from {', '.join(values)}")
    medusa = args.architecture == "medusa"
    for fits, message in (
            (medusa or args.exit_layer is not None, "--exit-layer: is needed, see --help"),
            (not medusa or args.exit_layer is None, "--exit-layer: not for --architecture medusa, "
             "whose heads read the last layer"),
            (not medusa or args.init is None, "--init: not for --architecture medusa"),
            (not medusa or args.learn == "target", "--learn text: not for --architecture medusa, "
             "whose heads read the last layer")):
        if not fits:
            raise UserError(message)
    args.heads = args.heads if medusa else None
    if args.max_length > args.batch_tokens:
        raise UserError(f"--max-length {args.max_length}: must be at most --batch-tokens "
                        f"{args.batch_tokens}")
    checkpoint = args.out / "checkpoint.pt"
    if not args.resume and checkpoint.exists():
        raise UserError(f"--out {args.out}: holds a checkpoint, give --resume to go on from it or "
                        "another folder")
    if args.resume and not checkpoint.exists():
        raise UserError(f"--resume: {checkpoint} is not there, leave out --resume to begin")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {args.out}: cannot be made a folder ({e.strerror})") from None
    return args


def main(argv=None):
    def run():
        try:
            Training(parse_arguments(argv)).run()
        except RuntimeError as e:
            if "by peer" not in str(e):  # gloo's words for a process that has ended, and said why
                raise
            message = f"process {os.environ['RANK']} stops, because another one has"
            raise UserError(message) from None

    return run_program("train_adapter.py", run,
                       "interrupted, --resume goes on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
