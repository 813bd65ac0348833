"""Text files -> documents -> token ids, and which of them an adapter shall learn.

    read_documents -> encode -> batches_of, both by Windows

Nothing of the algorithm. UserError names file and line.
"""
import gzip
import hashlib
import json
import os
import pickle
import random
import re
import threading
import time
import zlib
from collections import Counter
from functools import partial
from itertools import chain, count
from os.path import commonprefix

from support.chat import encode_chat, encode_rendered, render_chat, takes_system
from support.errors import UserError
from support.terminal import say

import torch
from torch.utils.data import DataLoader

HELD_OUT = 64  # one document in 64 is never trained on


# --------------------------------------------------------------------------------------------------
# Documents

class Conversation(list):
    """Turns of user, assistant, …; `system`: the message before them; `stopped`: why no more turns
    are taken."""
    system = stopped = None


def system_of(document):
    return getattr(document, "system", None)


def read_documents(path, allow_truncated=False):
    """The documents of a file: Conversations or plain texts, none of them empty."""
    return list(filter(None, read_file(path, allow_truncated)))


def read_file(path, allow_truncated):
    """The documents of a file, and empty ones.

    A JSON list or JSONL, of ShareGPT's {"conversations": [{"from", "value"}]} or of {"text"}, if
    the file is called so or begins so; else plain text, whose documents are separated by blank
    lines. .gz is unpacked. UserError names file and line.
    """
    try:
        opened = gzip.open if str(path).endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8-sig") as file:
            return list(documents_of(file, path, allow_truncated))
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: cannot be read as UTF-8 ({e.reason}), --data wants text, JSON or "
                        "these packed as .gz") from None
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from None


def documents_of(file, path, allow_truncated):
    """The documents of an open file, and empty ones. JSONL is read line by line, because all of a
    large file at once takes several times its size."""
    head = []  # up to the first line that is not blank
    while not (head and head[-1].strip()) and (line := file.readline()):
        head.append(line)
    begin, lines = "".join(head).lstrip(), chain(head, file)
    is_json = str(path).removesuffix(".gz").endswith((".json", ".jsonl"))
    if begin.startswith("["):
        entries = json_list(path, "".join(lines), allow_truncated)
    elif begin.startswith("{") or is_json:
        entries = json_lines(path, lines)
    else:
        yield from filter(str.strip, re.split(r"\n\s*\n", "".join(lines)))
        return
    for line, entry in entries:
        yield document_of(entry, f"{path}:{line}")


def json_lines(path, lines):
    for line, source in enumerate(lines, 1):
        if source.strip():
            try:
                yield line, json.loads(source)
            except (ValueError, RecursionError) as e:
                what = str(e).replace("line 1 ", "")
                raise UserError(f"{path}:{line}: not valid JSON ({what})") from None


def json_list(path, text, allow_truncated):
    """(line, element) of a JSON list; if it breaks off, what came before it, or UserError."""
    decoder, found, end, line = json.JSONDecoder(), 0, text.index("[") + 1, 1

    def skip(characters, i):
        while i < len(text) and text[i] in characters:
            i += 1
        return i

    counted, readable = 0, f"{path}:{{}}: {{}} entries are readable, then the JSON list"
    while True:
        start = skip(" \t\r\n", end)
        line, counted = line + text.count("\n", counted, start), start
        if text[start:start + 1] == "]":
            if text[start + 1:].strip():
                what = readable.format(line, found)
                raise UserError(f"{what} ends, but not the file")
            return
        try:
            entry, end = decoder.raw_decode(text, start)
            end = skip(" \t\r\n", end)
            if text[end:end + 1] not in (",", "]"):
                raise ValueError("expected , or ]")
        except (ValueError, RecursionError) as e:
            what = f"{readable.format(line, found)} breaks ({e})"
            if not allow_truncated:
                raise UserError(f"{what}; --allow-truncated goes on with these") from None
            say(f"warning: {what}")
            return
        yield line, entry
        found += 1
        end += text[end] == ","


SYSTEM, TOOLS, NO_TURN = "a further system message", "tool calls", "a turn is missing"
ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1, "chatgpt": 1, "system": SYSTEM,
         "tool": TOOLS, "function": TOOLS, "function_call": TOOLS, "observation": TOOLS}


def document_of(entry, where):
    """A text, or a Conversation that begins with the user's turn and ends with the assistant's.

    Empty if nothing can be learned.
    """
    entry = entry if isinstance(entry, dict) else {}
    if isinstance(entry.get("text"), str):
        return whole_characters(entry["text"]) if entry["text"].strip() else ""
    messages, turns = entry.get("conversations") or entry.get("messages"), Conversation()
    if messages == [] or entry.get("conversations") == []:
        return turns
    try:
        said = [turn_of(m) for m in [{"from": "system", "value": entry.get("system")}, *messages]]
    except (TypeError, AttributeError):
        raise UserError(f"{where}: wants an object with `text`, or with `conversations`, a list of "
                        "objects with `from` (human, gpt) and `value`") from None
    for role, text in said:
        if role == SYSTEM and not turns and not turns.system:
            turns.system = whole_characters(text) if text.strip() else None
        elif role == len(turns) % 2 and text.strip():
            turns.append(whole_characters(text))
        elif turns or isinstance(role, str):
            turns.stopped = role if isinstance(role, str) else NO_TURN
            break  # what follows belongs to another
    del turns[len(turns) // 2 * 2:]
    return turns


def turn_of(message):
    """(0 for the user, 1 for the assistant, a text for what else it is; what is said)."""
    role = message.get("from") or message.get("role")
    text = message.get("value") or message.get("content") or ""
    role = ROLES.get(role.lower(), f"role {role}")
    if message.get("tool_calls") or message.get("function_call"):
        role = TOOLS
    if isinstance(text, list):  # of parts
        parts = [part.get("text") for part in text]
        if not all(isinstance(part, str) for part in parts):
            return "contents that are not text", ""
        text = "".join(parts)
    if not isinstance(text, str):
        raise TypeError
    return role, text


def whole_characters(text):
    """The text with a ? for each half of a character: JSON can escape it, no tokenizer takes it."""
    return text.encode("utf-8", "replace").decode()


def is_held_out(document):
    """Decided by the first turn or text itself: a prompt is on one side in every file."""
    first = document if isinstance(document, str) else document[0]
    key = hashlib.sha256(first.strip().encode("utf-8", "replace")).digest()[:4]
    return int.from_bytes(key, "big") % HELD_OUT == 0


def leave_out(documents, template):
    """Empty the conversations whose system message the template does not take. Returns how many are
    empty or cut short, and why; nothing if none is."""
    if template and any(map(system_of, documents)) and not takes_system(template):
        for document in filter(system_of, documents):
            document.clear()
            document.stopped = "a system message, which the chat template does not take"
    chats = [d for d in documents if isinstance(d, Conversation)]
    lost = Counter(f"{'cut short' if chat else 'left out'}: {chat.stopped or NO_TURN}"
                   for chat in chats if chat.stopped or not chat)
    return lost and f"of {len(chats)} conversations " + ", ".join(
        f"{n} {what}" for what, n in lost.most_common())


def split(paths, template=None, allow_truncated=False):
    """All documents of the data files -> (to train on, at least one; held out, perhaps none).

    A line says what is left out."""
    documents = [d for path in paths for d in read_file(path, allow_truncated)]
    lost = leave_out(documents, template)
    held = [d for d in documents if d and is_held_out(d)]
    rest = [d for d in documents if d and not is_held_out(d)]
    if not rest:
        raise UserError(f"--data {' '.join(map(str, paths))}: holds no document to train on"
                        + (f", {lost}" if lost else ""))
    if lost:
        say(f"--data: {lost}")
    random.Random(0).shuffle(held)
    return rest, held


def digest(documents):
    """16 hex digits that tell one list of documents from another."""
    state = hashlib.sha256()
    for document in documents:
        state.update((repr(document) + (system_of(document) or "")).encode())
    return state.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# Ids, and which of them to learn

def encode(document, tokenizer, template, eos, max_length):
    """A document -> (ids, learn): learn[t] says whether the token at position t is to be predicted.

    Of a conversation these are the assistant's tokens with the end-of-sequence token that closes
    each answer, or that the answer itself spells, for there decoding ends. The text is rendered,
    cut where answers begin and end, and each piece encoded once, so that what comes before an
    answer is encoded as decoding would encode it.
    """
    if isinstance(document, str):
        ids = tokenizer.encode(document)
        ids = (ids + [i for i in eos[:1] if ids[-1:] != [i]])[:max_length]
        return ids, [False] + [True] * (len(ids) - 1)
    template = template.with_system(system_of(document))
    document = [turn.strip() if i % 2 else turn
                for i, turn in enumerate(document)]  # templates put no blanks round an answer
    text = render_chat(template, document, answer=False)
    spans = answers(template, document, text, [tokenizer.text_of(i) for i in eos])
    ids, learn, done = [], [], 0
    for begin, end in chain(spans, [(len(text), len(text))]):
        for piece, wanted in ((text[done:begin], False), (text[begin:end], True)):
            ids += tokenizer.encode_part(piece, ids[-1]) if ids else encode_rendered(
                tokenizer, template, piece)
            learn += [wanted] * (len(ids) - len(learn))
        done = end
        if len(ids) >= max_length:
            break
    return ids[:max_length], learn[:max_length]


def every_token(document, encode, wanted):
    """As `encode`, but learned are all tokens that are among `wanted`, questions too."""
    ids, _ = encode(document)
    return ids, [i in wanted for i in ids]


def answers(template, turns, text, eos):
    """Where in the text of all turns the assistant's answers stand: (begin, end) of each, with what
    closes it. Answers that the text shows in another way than their own prompt are left out.

    An answer begins where the prompt for it ends, and ends with the first of the texts in `eos`;
    without one, where the text of the turns up to it ends.
    """
    closing = re.compile(rf"\s*(?:{'|'.join(map(re.escape, filter(None, eos))) or '(?!)'})")
    for i in range(1, len(turns), 2):
        before = render_chat(template, turns[:i])
        if not text.startswith(before):
            continue
        begin = len(before)
        first = begin + text.startswith(" ", begin)
        said = first + len(turns[i]) if text.startswith(turns[i], first) else None
        closed = said and closing.match(text, said)
        if not closed:  # what else the template writes, it writes where this turn is the last too
            alone = render_chat(template, turns[:i + 1], answer=False)
            same = text.startswith(alone)
            shared = len(alone) if same else begin + len(commonprefix([text[begin:],
                                                                       alone[begin:]]))
            said = len(alone.rstrip()) if same else said
            closed = closing.search(text, begin, shared)
        if closed:
            yield begin, closing.search(text, begin).end()
        elif said:
            yield begin, said


def prompt_of(document, tokenizer, template):
    """What decoding starts from: the user's first turn, or the first 16 tokens of a text."""
    if isinstance(document, str):
        return tokenizer.encode(document)[:16]
    return encode_chat(tokenizer, template.with_system(system_of(document)), document[:1])


class Windows:
    """What `make` makes of a window of documents, by its number; shuffled anew in each epoch."""

    def __init__(self, documents, size, seed, make):
        self.documents, self.seed, self.make = documents, seed, make
        self.size, self.epoch = min(size, len(documents)), None

    def __getitem__(self, window):
        n = len(self.documents)  # those that do not fill an epoch's last window come in another
        epoch, place = divmod(window * self.size, n // self.size * self.size)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = random.Random(f"{self.seed} {epoch}").sample(range(n), n)
        try:
            return self.make([self.documents[i] for i in self.order[place:place + self.size]])
        except UserError as e:  # a worker's own would be told with its traceback
            return e

    def numbered(self, first, workers):
        """Endless: (number, what is made of it) from window `first` on, made ahead by workers."""
        forked = "fork" if workers and hasattr(os, "fork") else None
        # As bytes: tensors would travel in /dev/shm, of which a container has little.
        loader = DataLoader(self, None, sampler=count(first), num_workers=workers,
                            collate_fn=pickle.dumps, multiprocessing_context=forked,
                            worker_init_fn=partial(end_with, os.getpid()))
        for window, made in zip(count(first), map(pickle.loads, loader)):
            if isinstance(made, UserError):
                raise made
            yield window, made


def end_with(parent, _=0):
    """End this worker when its training has been killed. PyTorch's worker does not: it waits for
    ever for a reader of what it has made, and holds the lock of --out."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def batches_of(examples, batch_tokens):
    """Encoded documents -> [(ids (B, T), learn (B, T) bool)], B × T ≤ batch_tokens.

    Those of a batch are of similar lengths, padded with zeros. learn[:, t] is moved one to the
    left: it says whether the prediction made *at* position t counts.
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


def most_frequent(examples, size, vocab_size, eos):
    """The ids (size,), ascending, of the tokens most often to be predicted in encoded documents,
    and their share. The ends of sequence are among them."""
    learned = torch.cat([torch.tensor(ids)[torch.tensor(learn)] for ids, learn in examples])
    counts = learned.bincount(minlength=vocab_size)  # once: PyTorch's threads spin between many
    ranked = counts.clone()
    ranked[list(eos)] = counts.max() + 1
    ids = ranked.argsort(descending=True, stable=True)[:size].sort().values
    return ids, counts[ids].sum().item() / max(1, counts.sum().item())
