"""Train Kangaroo's adapter for any Llama that `llama.py` loads, on a CPU, one GPU or several.

    text -> token ids -> one pass of the frozen target -> states at the exit layer, final distribution -> adapter

The adapter learns to make the target's own LM head say after ℓ layers what it says after all of them. Hidden states live in
memory for as long as a window of documents is trained on, and never on disk. A window may be passed over several times
(`--passes`), because on a CPU the target's pass costs several times what a step of the adapter does.

Nothing here can change what `kangaroo.py` decodes, only how fast. Output: adapter.safetensors, config.json and log.jsonl.
Left out on purpose: training the target. Read first `train`, then `Target.loss`; docs/training.md says how to choose options.
"""
import argparse
import contextlib
import copy
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import sys
import time
import warnings
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # PyTorch says so at import; nothing here needs it
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from kangaroo import (
    ADAPTERS,
    STEPS,
    THRESHOLD,
    KangarooDrafter,
    Parser,
    generate,
    load_adapter,
    pick_device_and_dtype,
    refuse_below_one,
    run_program,
)
from llama import UserError, load_llama, named_weights, write_atomically, write_safetensors
from tokenizer import Tokenizer, find_chat_template, render_chat

HELD_OUT = 64  # one document in so many is never trained on


# ---------------------------------------------------------------------------------------------------------------------
# Data: files -> documents -> (token ids, which of them to learn)

def read_documents(path, allow_truncated=False):
    """The documents of a file: lists of turns (user, assistant, user, …) of conversations, or plain texts.

    A JSON list or JSONL, of ShareGPT's {"conversations": [{"from", "value"}]} or of {"text"}, if the file is called so or begins
    so; else plain text, whose documents are separated by blank lines. .gz is unpacked. UserError names file and line.
    """
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: cannot be read as UTF-8 ({e.reason}), --data wants text, JSON or these packed as .gz") from None
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from None
    if text.lstrip().startswith("["):
        entries = json_list(path, text, allow_truncated)
    elif text.lstrip().startswith("{") or str(path).removesuffix(".gz").endswith((".json", ".jsonl")):
        entries = json_lines(path, text)
    else:
        return [document for document in re.split(r"\n\s*\n", text) if document.strip()]
    documents = [document_of(entry, f"{path}:{line}") for line, entry in entries]
    return [document for document in documents if document]


def json_lines(path, text):
    for line, source in enumerate(text.split("\n"), 1):
        if source.strip():
            try:
                yield line, json.loads(source)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}:{line}: not valid JSON ({str(e).replace('line 1 ', '')})") from None


def json_list(path, text, allow_truncated):
    """(line, element) of a JSON list; if it breaks off, what came before it, or UserError."""
    decoder, entries, end, line = json.JSONDecoder(), [], text.index("[") + 1, 1

    def skip(characters, i):
        while i < len(text) and text[i] in characters:
            i += 1
        return i

    counted = 0
    while True:
        start = skip(" \t\r\n", end)
        line, counted = line + text.count("\n", counted, start), start
        if text[start:start + 1] == "]":
            if text[start + 1:].strip():
                raise UserError(f"{path}:{line}: {len(entries)} entries are readable, then the JSON list ends, but not the file")
            return entries
        try:
            entry, end = decoder.raw_decode(text, start)
            end = skip(" \t\r\n", end)
            if text[end:end + 1] not in (",", "]"):
                raise ValueError("expected , or ]")
        except (ValueError, RecursionError) as e:
            what = f"{path}:{line}: {len(entries)} entries are readable, then the JSON list breaks ({e})"
            if not allow_truncated:
                raise UserError(f"{what}; --allow-truncated goes on with these") from None
            print(f"warning: {what}", file=sys.stderr)
            return entries
        entries.append((line, entry))
        end += text[end] == ","


ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1, "chatgpt": 1}


def document_of(entry, where):
    """A text, or a list of turns that begins with the user's and ends with the assistant's; empty if nothing can be learned."""
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        return whole_characters(entry["text"]) if entry["text"].strip() else ""
    messages = (entry.get("conversations") or entry.get("messages")) if isinstance(entry, dict) else None
    if messages == [] or isinstance(entry, dict) and entry.get("conversations") == []:
        return []
    try:
        said = [(m.get("from") or m.get("role"), m.get("value") or m.get("content") or "") for m in messages]
        if not all(isinstance(part, str) for turn in said for part in turn):
            raise TypeError
    except (TypeError, AttributeError):
        raise UserError(f"{where}: wants an object with `text`, or with `conversations`, a list of objects with `from` "
                        "(human, gpt) and `value`") from None
    turns = []
    for role, text in said:
        if ROLES.get(role) == len(turns) % 2 and text.strip():
            turns.append(whole_characters(text))
        elif turns:
            break  # two turns of one role, or a role unknown here: what follows is another conversation
    return turns[:len(turns) // 2 * 2]


def whole_characters(text):
    """The text with a ? for each half of a character that JSON's escapes left alone: no tokenizer takes these."""
    return text.encode("utf-8", "replace").decode()


def encode(document, tokenizer, template, eos, max_length):
    """A document -> (ids, learn): learn[t] says whether the token at position t is to be predicted.

    Of a conversation these are the assistant's tokens with the end-of-sequence token that closes each answer, or that the answer
    itself spells, for there decoding ends; what comes before an answer is encoded as decoding would encode it.
    """
    if isinstance(document, str):
        ids = (tokenizer.encode(document) + list(eos[:1]))[:max_length]
        return ids, [False] + [True] * (len(ids) - 1)
    document = [turn.strip() if i % 2 else turn for i, turn in enumerate(document)]  # templates put no blanks round an answer
    ids, learn = [], []
    for i in range(1, len(document), 2):
        if len(ids) >= max_length:
            break
        text = render_chat(template, document[:i])
        before, after = tokenizer.encode(text), tokenizer.encode(text + template.assistant.format(document[i]))
        start = next((k for k, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
        end = next((k + 1 for k in range(start, len(after)) if after[k] in eos), len(after))
        # Earlier turns are encoded alike in this text, up to the tokens that the next turn may merge with.
        learn = learn[:start] + [False] * (start - len(learn)) + [True] * (end - start) + [False] * (len(after) - end)
        ids = after
    return ids[:max_length], learn[:max_length]


def is_held_out(document):
    """Decided by the first turn or text itself, so that a prompt is on one side in every file that it occurs in."""
    first = document if isinstance(document, str) else document[0]
    return int.from_bytes(hashlib.sha256(first.strip().encode("utf-8", "replace")).digest()[:4], "big") % HELD_OUT == 0


def batches_of(examples, batch_tokens):
    """Encoded documents -> [(ids (B, T), learn (B, T) bool)], of similar lengths, B × T ≤ batch_tokens, padded with zeros.

    learn[:, t] is moved one to the left: it says whether the prediction made *at* position t counts.
    """
    examples = sorted((e for e in examples if any(e[1][1:])), key=lambda e: len(e[0]))
    batches, rows = [], []
    for i, example in enumerate(examples):
        rows.append(example)
        if i + 1 == len(examples) or (len(rows) + 1) * len(examples[i + 1][0]) > batch_tokens:
            ids = torch.zeros(len(rows), len(example[0]), dtype=torch.long)
            learn = torch.zeros(ids.shape, dtype=torch.bool)
            for row, (tokens, wanted) in enumerate(rows):
                ids[row, :len(tokens)] = torch.tensor(tokens)
                learn[row, :len(tokens) - 1] = torch.tensor(wanted[1:])
            batches.append((ids, learn))
            rows = []
    return batches


def most_frequent(documents, size, encode, vocab_size, eos, sample=4000):
    """The ids (size,), ascending, of the tokens most often to be predicted, end of sequence included, and their share."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for document in random.Random(0).sample(documents, min(sample, len(documents))):
        ids, learn = encode(document)
        counts += torch.tensor(ids)[torch.tensor(learn)].bincount(minlength=vocab_size)
    ranked = counts.clone()
    ranked[list(eos)] = counts.max() + 1
    ids = ranked.argsort(descending=True, stable=True)[:size].sort().values
    return ids, counts[ids].sum().item() / max(1, counts.sum().item())


# ---------------------------------------------------------------------------------------------------------------------
# The target's pass and the loss

class Target:
    """The frozen model: what it knows at the exit layer, what it says in the end, and how far an adapter is from that."""
    CHUNK = 512  # positions whose logits exist at once

    def __init__(self, model, exit_layer, vocabulary=None):
        self.model, self.exit_layer, self.vocabulary = model, exit_layer, vocabulary
        self.head = model.lm_head.weight if vocabulary is None else model.lm_head.weight[vocabulary]

    @torch.no_grad()
    def states(self, ids, learn):
        """One pass over ids (B, T): the exit layer's states x (B, T, d) for the adapter, and for the n positions that
        `learn` marks the final states y (n, d), log Σ exp of the logits (n,) float32 and the top-1 token (n,)."""
        model, device = self.model, self.head.device
        ids, learn = ids.to(device), learn.to(device)
        positions = torch.arange(ids.shape[1], device=device)
        x = model.run_layers(model.embed_tokens(ids), positions, None, 0, self.exit_layer)
        return x, learn, *self.final(model.run_layers(x, positions, None, self.exit_layer, len(model.layers))[learn])

    @torch.no_grad()
    def final(self, y):
        """The last layer's output (n, d) -> the final states and what the target says there, as `states` returns them."""
        y = self.model.norm(y)
        whole = [(logits.float().logsumexp(-1), logits.max(-1).indices)
                 for logits in map(self.model.lm_head, y.split(self.CHUNK))]
        return y, torch.cat([a for a, _ in whole]), torch.cat([b for _, b in whole])

    def draft_logits(self, x):
        """What the adapter's output (n, d) says."""
        return F.linear(x.to(self.head.dtype), self.head)

    def loss(self, adapter, states, kind, scale=None, autocast=torch.bfloat16):
        """Sums over the batch: loss, acceptance Σ min(p, q), agreement of the top-1 tokens, number of tokens.

        p is the target's distribution, q the adapter's, over `vocabulary` if there is one: p then sums to less than 1.
        With `scale`, the gradients of scale × loss are added to the adapter's. Logits are formed CHUNK positions at a time:
        the loss's gradient at the adapter's output is gathered first, then goes through the adapter once.
        """
        x, learn, y, whole, best = states
        mixed = torch.autocast(x.device.type, autocast) if autocast else contextlib.nullcontext()
        with torch.set_grad_enabled(scale is not None):
            with mixed:
                out = adapter(x.float(), torch.arange(x.shape[1], device=x.device))[learn]
            leaf = out.detach().requires_grad_(scale is not None)
            sums = torch.zeros(4, dtype=torch.float64, device=x.device)
            for part, final, log_sum, token in zip(*(t.split(self.CHUNK) for t in (leaf, y, whole, best))):
                p = (F.linear(final, self.head).float() - log_sum[:, None]).exp()
                log_q = self.draft_logits(part).float().log_softmax(-1)
                acceptance = torch.minimum(p, log_q.exp()).sum(-1)
                loss = {"cross-entropy": -(p * log_q).sum(-1), "acceptance": -acceptance.clamp(min=1e-6).log()}[kind].sum()
                if scale is not None:
                    (scale * loss).backward()
                top = log_q.argmax(-1)
                top = top if self.vocabulary is None else self.vocabulary[top]
                sums += torch.stack((loss.detach(), acceptance.detach().sum(), (top == token).sum(), torch.ones_like(top).sum()))
            if scale is not None:
                out.backward(leaf.grad)
        return sums


# ---------------------------------------------------------------------------------------------------------------------
# Training

def learning_rate(step, total, warmup):
    """The share of the peak at this step: a linear rise over `warmup` steps, then half a cosine down to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class Progress:
    """One line on standard error, rewritten in place on a terminal, and a line of JSON in a log for each report."""

    def __init__(self, log, total, done=0):
        self.log, self.total, self.first, self.begin = log, total, done, time.perf_counter()
        self.tokens, self.live = 0, sys.stderr.isatty()

    def report(self, step, figures, tokens):
        self.tokens += tokens
        seconds = time.perf_counter() - self.begin
        left = seconds / max(1, step - self.first) * (self.total - step)
        shown = " · ".join(f"{name} {figures[name]:.3f}" for name in ("loss", "agreement") if name in figures)
        bar = "█" * (10 * step // self.total)
        line = f"{bar:░<10} {step}/{self.total} · {shown} · {self.tokens / seconds:,.0f} tokens/s · {left / 60:.0f} min left"
        if self.live:  # a line that the terminal wraps could not be rewritten: 80 columns take this one
            line = line[:shutil.get_terminal_size().columns - 1] + "\033[K"
        print(line, end="\r" if self.live and step < self.total else "\n", file=sys.stderr, flush=True)
        self.write({"step": step, **figures, "tokens_per_second": self.tokens / seconds})

    def say(self, text):
        """A line that stays, in the place of the progress line."""
        print(text + "\033[K" * self.live, file=sys.stderr)

    def write(self, record):
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def windows(documents, args, encode, window):
    """Endless: (number, batches) of the window-th and later `args.window` documents, shuffled anew in each epoch."""
    size = min(args.window, len(documents))
    while True:  # documents that do not fill an epoch's last window come in another epoch
        epoch, place = divmod(window * size, len(documents) // size * size)
        order = random.Random(f"{args.seed} {epoch}").sample(range(len(documents)), len(documents))
        yield window, batches_of([encode(documents[i]) for i in order[place:place + size]], args.batch_tokens)
        window += 1


def updates(documents, args, encode, target, position=(0, 0), rank=0, ranks=1):
    """Endless: (position after it, this rank's states, tokens in all) of each update, from `position` = (window, update) on.

    Each update takes `args.batches` batches, dealt to the ranks in turn; so the number of processes does not change which
    batches it sees. All of it follows from the seed and the position, which is what makes resuming exact.
    """
    for window, batches in windows(documents, args, encode, position[0]):
        if window == 0 and len(batches) < args.batches:  # a later window that falls short is passed over
            raise UserError(f"--window {args.window}: its documents fill {len(batches)} batches, --batches wants {args.batches}; "
                            "lower that or --batch-tokens, or raise --window if there are more documents")
        order = []
        for k in range(args.passes):
            shuffled = random.Random(f"{args.seed} {window} {k}").sample(range(len(batches)), len(batches))
            order += grouped(shuffled, args.batches)
        states = {}
        for update in range(position[1] if window == position[0] else 0, len(order)):
            mine = order[update][rank::ranks]
            for i in mine:
                if i not in states:
                    states[i] = target.states(*batches[i])
            tokens = sum(batches[i][1].sum().item() for i in order[update])
            last = update + 1 == len(order)
            yield (window + 1, 0) if last else (window, update + 1), [states[i] for i in mine], tokens
            if args.passes == 1:
                states.clear()


def grouped(items, size):
    """Lists of `size` items; what is left over at the end waits for another pass."""
    return [items[i:i + size] for i in range(0, len(items) - size + 1, size)]


def new_adapter(cls, model):
    """An adapter in float32 that begins as the target's final norm alone: its residual branches start at zero."""
    adapter = cls(replace(model.config, num_hidden_layers=1))
    for name, weight in named_weights(adapter).items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.zero_()
        elif weight.dim() > 1:
            weight.data.normal_(std=weight.shape[1] ** -0.5)
    adapter.norm.weight.data.copy_(model.norm.weight)
    return adapter.to(model.norm.weight.device)


def first_adapter(args, model):
    """What training begins from, in float32: a new adapter, or the one in --init with its architecture; and how that was made."""
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


def evaluate(adapter, target, held_out, prompts, args):
    """Loss, acceptance and agreement on the held-out states, and the compression rate of decoding the prompts greedily."""
    sums = sum(target.loss(adapter, states, args.loss, autocast=args.autocast) for states in held_out)
    figures = dict(zip(("loss", "acceptance", "agreement"), (sums[:3] / sums[3]).tolist()))
    if prompts:
        copied = for_decoding(adapter, target)
        rounds = [round_ for ids in prompts for round_ in generate(
            target.model, KangarooDrafter(target.model, copied, args.exit_layer), ids, 64, eos=target.model.config.eos_token_ids)]
        figures["compression_rate"] = sum(len(r.tokens) for r in rounds) / len(rounds)
    return figures


def save_checkpoint(path, module, optimizers, state):
    """All that a resumed run needs, in one file that is replaced at once."""
    buffer = io.BytesIO()
    torch.save({"weights": module.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                "rng": torch.get_rng_state(), **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path, module, optimizers, options, device):
    """Fill module and optimizers; returns the rest of the state. UserError unless made with the same options."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        made_with = state["options"]
    except Exception as e:  # torch.load raises whatever a damaged file leads it to
        raise UserError(f"{path}: no checkpoint that --resume could go on from ({type(e).__name__})") from None
    for name, value in options.items():
        if made_with.get(name) != value:
            raise UserError(f"{path}: was made with --{name.replace('_', '-')} {made_with.get(name)}, --resume needs the same, "
                            f"not {value}")
    module.load_state_dict(state.pop("weights"))
    for optimizer, saved in zip(optimizers, state.pop("optimizers")):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state.pop("rng").cpu())
    return state


def one_update(adapter, optimizer, target, batches, tokens, ranks, args):
    """A step of the optimizer on this process's batches of states; returns the sums of `Target.loss` over them."""
    optimizer.zero_grad()
    sums = 0
    for i, states in enumerate(batches):
        # DDP averages over the ranks, in the last batch of an update; the loss is a mean over the tokens of all ranks.
        with adapter.no_sync() if ranks > 1 and i + 1 < len(batches) else contextlib.nullcontext():
            sums += target.loss(adapter, states, args.loss, ranks / max(1, tokens), args.autocast)
    if not torch.nn.utils.clip_grad_norm_(adapter.parameters(), args.clip).isfinite():  # the same in all ranks
        raise UserError(f"--lr {args.lr}: the gradient is no longer finite; lower --lr or, if that does not help, give a --dtype "
                        "that the target's values fit in")
    optimizer.step()
    return sums


def train(args):
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, dtype = pick_device_and_dtype(args)
    if ranks > 1:
        if device.type == "cuda":  # a GPU a process
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            device, dtype = pick_device_and_dtype(args)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    args.autocast = None if dtype == torch.float32 else torch.bfloat16
    model = load_llama(args.model, device, dtype)
    config, eos, dtype = model.config, model.config.eos_token_ids, str(dtype).removeprefix("torch.")
    if not 0 <= args.exit_layer < config.num_hidden_layers:
        raise UserError(f"--exit-layer {args.exit_layer}: must be at least 0 and below the model's "
                        f"{config.num_hidden_layers} layers")
    if args.batches % ranks:
        raise UserError(f"--batches {args.batches}: must be a multiple of the {ranks} processes")
    if args.vocabulary and args.vocabulary > config.vocab_size:
        raise UserError(f"--vocabulary {args.vocabulary}: must be at most the model's vocab_size {config.vocab_size}")
    tokenizer, (chat, template) = Tokenizer(args.model, config), find_chat_template(args.model, args.chat)
    max_length = min(args.max_length, config.max_position_embeddings)
    encoded = partial(encode, tokenizer=tokenizer, template=template, eos=eos, max_length=max_length)
    documents, held = split(args)
    tested = held or documents[:1]
    held_batches = batches_of([encoded(document) for document in tested[:args.eval_documents]], args.batch_tokens)
    if not held_batches:
        raise UserError(f"--max-length {args.max_length}: leaves nothing to learn of the {len(tested)} held-out documents")
    vocabulary, coverage = None, 1.0
    if args.vocabulary:
        vocabulary, coverage = most_frequent(documents, args.vocabulary, encoded, config.vocab_size, eos)
        vocabulary = vocabulary.to(device)
    target = Target(model, args.exit_layer, vocabulary)
    torch.manual_seed(args.seed)
    adapter, begun_from = first_adapter(args, model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    options = {"init": args.init and str(args.init), "chat": chat, "dtype": dtype,
               "model": f"of fingerprint {model.fingerprint}", "data": f"of digest {digest(documents)}"}
    options |= {name: getattr(args, name) for name in EXACT}
    state = {"step": 0, "window": 0, "update": 0, "tokens": 0, "seconds": 0.0, "options": options}
    checkpoint, log = args.out / "checkpoint.pt", args.out / "log.jsonl"
    if args.resume:
        state = load_checkpoint(checkpoint, adapter, [optimizer], options, device)
    stream = updates(documents, args, encoded, target, (state["window"], state["update"]), rank, ranks)
    wrapped = DistributedDataParallel(adapter) if ranks > 1 else adapter
    first = rank == 0
    if first:
        parameters = sum(p.numel() for p in adapter.parameters())
        print(f"{args.model} · {device} · {dtype} · exit layer {args.exit_layer} · adapter "
              f"{args.architecture}, {parameters / 1e6:.2f} M parameters · {len(documents)} documents, {len(held)} held out"
              + ("" if held else " (too few: figures are of one that is trained on)")
              + (f" · drafts from {args.vocabulary} tokens, {coverage:.1%} of the text" if args.vocabulary else ""),
              file=sys.stderr)
        trim_log(log, state["step"])
        held_out = [target.states(*batch) for batch in held_batches]
        prompts = [prompt_of(document, tokenizer, template) for document in tested[:args.eval_prompts]]
        prompts = [ids for ids in prompts if 0 < len(ids) < config.max_position_embeddings]
        progress = Progress(log, args.updates, state["step"])
    elapsed, begin = state["seconds"], time.perf_counter()
    while state["step"] < args.updates:
        (state["window"], state["update"]), mine, tokens = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(state["step"], args.updates, args.warmup)
        sums = one_update(wrapped, optimizer, target, mine, tokens, ranks, args)
        state["step"] += 1
        state["tokens"] += tokens
        state["seconds"] = elapsed + time.perf_counter() - begin
        step, done = state["step"], state["step"] == args.updates
        if first:
            progress.report(step, dict(zip(("loss", "acceptance", "agreement"), (sums[:3] / sums[3]).tolist())), tokens)
            if step % args.eval_every == 0 or done:
                state["held_out"] = figures = evaluate(adapter, target, held_out, prompts, args)
                progress.write({"step": step, "held_out": figures})
                progress.say("held out: " + " · ".join(f"{name} {value:.3f}" for name, value in figures.items()))
            if step % args.save_every == 0 or done:
                save_checkpoint(checkpoint, adapter, [optimizer], state)
    if first:
        facts = {"data": [Path(p).name for p in args.data], "documents": len(documents), "held_out_documents": len(held),
                 "updates": args.updates, "tokens": state["tokens"], "seconds": round(state["seconds"]), "device": str(device),
                 "loss": args.loss, "lr": args.lr, "init": begun_from, "vocabulary_coverage": round(coverage, 4),
                 "held_out": {name: round(value, 4) for name, value in state["held_out"].items()}}
        save_adapter(args.out, adapter, args, model, vocabulary, chat, facts)
    if ranks > 1:
        dist.destroy_process_group()


def split(args):
    """All documents of the data files -> (to train on, at least one; held out, perhaps none)."""
    documents = [d for path in args.data for d in read_documents(path, args.allow_truncated)]
    held = [d for d in documents if is_held_out(d)]
    rest = [d for d in documents if not is_held_out(d)]
    if not rest:
        raise UserError(f"--data {' '.join(map(str, args.data))}: holds no document to train on")
    random.Random(0).shuffle(held)
    return rest, held


def digest(documents):
    """16 hex digits that tell one list of documents from another."""
    state = hashlib.sha256()
    for document in documents:
        state.update(repr(document).encode())
    return state.hexdigest()[:16]


def prompt_of(document, tokenizer, template):
    """What decoding starts from: the user's first turn, or the first 16 tokens of a text."""
    return tokenizer.encode(document)[:16] if isinstance(document, str) else tokenizer.encode(render_chat(template, document[:1]))


def trim_log(path, step):
    """Drop what a killed run logged after its last checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(True):
        with contextlib.suppress(ValueError):  # the last line may be half written
            if json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomically(path, "".join(kept).encode())


def save_adapter(folder, adapter, args, model, vocabulary, chat, facts):
    """adapter.safetensors (bfloat16) and config.json, which `kangaroo.py --adapter` takes."""
    tensors = {name: weight.detach().bfloat16() for name, weight in named_weights(adapter).items()}
    if vocabulary is not None:
        tensors["vocabulary"] = vocabulary.int()
    write_safetensors(folder / "adapter.safetensors", tensors)
    data = adapter.config.as_json() | {
        "architecture": args.architecture, "exit_layer": args.exit_layer, "steps": STEPS, "threshold": THRESHOLD,
        "target": model.fingerprint, "chat_template": chat, "training": facts}
    write_atomically(folder / "config.json", (json.dumps(data, indent=2) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------------------
# Command line

# Options that a resumed run must share with the one that it goes on from.
EXACT = ("exit_layer", "architecture", "vocabulary", "loss", "lr", "weight_decay", "warmup", "clip", "updates", "batches",
         "batch_tokens", "max_length", "window", "passes", "seed")


def parse_arguments(argv):
    parser = Parser(prog="train_adapter.py", usage="python train_adapter.py --model DIR --data FILE… --exit-layer ℓ --out DIR",
                    formatter_class=partial(argparse.HelpFormatter, max_help_position=23, width=110),
                    description="Train Kangaroo's adapter for a Llama. See docs/training.md.")

    def option(name, metavar, text, default=None, **more):
        text += "" if default is None else f" (default: {default})"
        parser.add_argument(name, metavar=metavar, default=default, help=text, **more)

    option("--model", "DIR", "the target, a Hugging Face folder", type=Path, required=True)
    option("--data", "FILE", "ShareGPT conversations (JSON list, JSONL) or text, also .gz", nargs="+", required=True)
    option("--out", "DIR", "where the adapter, its log and checkpoint go", type=Path, required=True)
    option("--exit-layer", "ℓ", "layers that draft", type=int, required=True)
    option("--architecture", "NAME", f"{' or '.join(ADAPTERS)} (attention and an MLP)", "attention")
    option("--init", "DIR", "begin from this adapter, with its architecture (default: from a new one)", type=Path)
    option("--vocabulary", "N", "draft from the N most frequent tokens alone (default: from all)", type=int)
    option("--loss", "NAME", "cross-entropy, or acceptance: -log Σ min(p, q)", "cross-entropy")
    option("--updates", "N", "optimizer steps", 2000, type=int)
    option("--batch-tokens", "N", "the most tokens of a batch, padding included", 4096, type=int)
    option("--batches", "N", "batches of an update, over all processes", 4, type=int)
    option("--max-length", "N", "documents are cut here", 1024, type=int)
    option("--window", "N", "documents that are in memory at once", 128, type=int)
    option("--passes", "N", "passes over a window while the target's states for it are in memory", 1, type=int)
    option("--lr", "X", "peak learning rate; warm-up and a cosine to zero around it", 1e-3, type=float)
    option("--warmup", "N", "updates of warm-up", 50, type=int)
    option("--weight-decay", "X", "of AdamW", 0.0, type=float)
    option("--clip", "X", "the largest norm of a gradient", 1.0, type=float)
    option("--seed", "S", "of weights and order", 0, type=int)
    option("--eval-every", "N", "updates between evaluations on held-out data", 200, type=int)
    option("--eval-documents", "N", "documents of an evaluation", 32, type=int)
    option("--eval-prompts", "N", "prompts that an evaluation decodes", 4, type=int)
    option("--save-every", "N", "updates between checkpoints", 50, type=int)
    option("--chat", "NAME", "chat template (default: the model folder's)")
    option("--dtype", "TYPE", "of the target: float32, bfloat16, float16 (default: bfloat16 where the device is fast at it)")
    option("--device", "DEV", "cpu, cuda, … (default: cuda if there is one)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--allow-truncated", action="store_true", help="take what is readable of a JSON list that breaks off")
    args = parser.parse_args(argv)
    refuse_below_one(args, "updates", "batch_tokens", "batches", "max_length", "window", "passes", "warmup", "eval_every",
                     "eval_documents", "save_every")
    for name, fits, want in (("vocabulary", args.vocabulary is None or args.vocabulary >= 1, "at least 1"),
                             ("eval_prompts", args.eval_prompts >= 0, "at least 0"),
                             ("lr", 0 < args.lr < math.inf, "above 0"), ("clip", args.clip > 0, "above 0"),
                             ("weight_decay", 0 <= args.weight_decay < math.inf, "at least 0"),
                             ("seed", -2 ** 63 <= args.seed < 2 ** 63, "an integer of 64 bits")):
        if not fits:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {want}")
    for name, values in (("architecture", ADAPTERS), ("loss", ("cross-entropy", "acceptance"))):
        if getattr(args, name) not in values:
            raise UserError(f"--{name} {getattr(args, name)}: choose from {', '.join(values)}")
    if args.max_length > args.batch_tokens:
        raise UserError(f"--max-length {args.max_length}: must be at most --batch-tokens {args.batch_tokens}")
    if not args.resume and (args.out / "checkpoint.pt").exists():
        raise UserError(f"--out {args.out}: holds a checkpoint, give --resume to go on from it or another folder")
    if args.resume and not (args.out / "checkpoint.pt").exists():
        raise UserError(f"--resume: {args.out / 'checkpoint.pt'} is not there, leave out --resume to begin")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {args.out}: cannot be made a folder ({e.strerror})") from None
    return args


def main(argv=None):
    def run():
        try:
            train(parse_arguments(argv))
        except RuntimeError as e:
            if "by peer" not in str(e):  # gloo's words for a process that has ended, which has said why
                raise
            raise UserError(f"process {os.environ['RANK']} stops, because another one has") from None

    return run_program("train_adapter.py", run, "interrupted, --resume goes on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
