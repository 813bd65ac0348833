"""From files to batches: which documents are read or refused, and which tokens are learned."""
import contextlib
import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from itertools import islice

import train_adapter
from support import files, training_text
from support.chat import CHAT_TEMPLATES, render_chat
from support.checkpoint import read_config
from support.data import (
    Windows,
    batches_of,
    digest,
    document_of,
    documents_of,
    encode,
    every_token,
    is_held_out,
    most_frequent,
    read_documents,
    split,
    system_of,
)
from support.errors import UserError
from support.tokenizer import Tokenizer

import pytest
import torch
from helpers import TEXT
from hypothesis import given
from hypothesis import strategies as st
from training import sentences, share_gpt

# --------------------------------------------------------------------------------------------------
# Which tokens are learned

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def tokenizer(folder):
    """The model's tokenizer with the special tokens of all templates."""
    copied = shutil.copytree(folder / "model", folder / "special")
    added = {340 + i: {"content": token, "special": True} for i, token in enumerate(SPECIAL)}
    (copied / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return Tokenizer(copied, replace(read_config(copied), vocab_size=352))


EOS = 2, 341, 344  # </s>, <|im_end|>, <|eot_id|>


class Characters:
    """A tokenizer that keeps every character, blanks too; a special token is one id, and decodes to
    nothing."""
    specials = dict(zip(["<s>", "</s>", *SPECIAL], [1, 2, *range(340, 345)]))

    def encode(self, text):
        return self.with_bos(self.encode_part(text))

    def with_bos(self, ids):
        return [1, *ids]

    def encode_part(self, text, after=None):
        parts = re.split(f"({'|'.join(map(re.escape, self.specials))})", text)
        return [i for part in parts for i in (
            [self.specials[part]] if part in self.specials else map(self.id, part))]

    def text_of(self, i):
        return next((text for text, special in self.specials.items() if special == i), None)

    def id(self, character):
        return ord(character) + 1000

    def decode(self, ids):
        return "".join(chr(i - 1000) for i in ids if i >= 1000)


def marked(ids, learn):
    """The runs of ids that are to be learned."""
    runs = [[]]
    for i, wanted in zip(ids, learn):
        runs[-1].append(i) if wanted else runs.append([])
    return [run for run in runs if run]


def assert_answers_are_marked(document, tokenizer, name):
    template, answers = CHAT_TEMPLATES[name], document[1::2]
    ids, learn = encode(document, tokenizer, template, EOS, 10 ** 6)
    runs = marked(ids, learn)
    assert len(ids) == len(learn) and [tokenizer.decode(run).strip() for run in runs] == answers
    for run in runs:
        assert [i in EOS for i in run] == [False] * (len(run) - 1) + [name != "none"]
    for i in range(1, len(document), 2):
        prompt = tokenizer.encode(render_chat(template, document[:i]))
        assert ids[:len(prompt)] == prompt and learn[len(prompt) - 1:len(prompt)
                                                     + 1] == [False, True]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("turns", [2, 4, 6])
def test_answers_are_learned_and_nothing_else(tokenizer, name, turns):
    """Guards the mask: prompts or the template's own words learned, answers or their ends not, a
    prompt unlike in decoding."""
    document = [TEXT[(turns + i) % 3] for i in range(turns)]
    assert_answers_are_marked(document, tokenizer, name)


def holds_no_special(text):
    """Special tokens are recognised in a text: an answer that spells one is other tokens, and
    "</s>" would end it."""
    return not any(special in text for special in Characters.specials)


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1,
               max_size=8).filter(holds_no_special)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@given(pairs=st.lists(st.tuples(text, text.map(str.strip).filter(bool)), min_size=1, max_size=4))
def test_any_answers_are_learned_and_nothing_else(name, pairs):
    """Guards the mask against text that looks like the template's, has braces or blanks."""
    assert_answers_are_marked([turn for pair in pairs for turn in pair], Characters(), name)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_blanks_around_an_answer_move_no_mark(name):
    """Guards several turns: an answer with blanks around it, as ShareGPT has them, shifts what is
    learned against the tokens."""
    document = ["one", " two \n\n", "three", "\n four "]
    ids, learn = encode(document, Characters(), CHAT_TEMPLATES[name], EOS, 1000)
    assert [Characters().decode(run).strip() for run in marked(ids, learn)] == ["two", "four"]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("first, learned", [("a</s>b", "a"), ("</s>", ""), ("a<|im_end|>", "a"),
                                            ("<|im_start|>a", "a"), ("a<s>b", "ab"), ("<s>", "")])
def test_an_answer_that_spells_a_special_token(name, first, learned):
    """Guards the mask's edges: such an answer is learned from its first token to where decoding
    would end, and moves no other."""
    ids, learn = encode(["Why?", first, "So?", "yes"], Characters(), CHAT_TEMPLATES[name], EOS,
                        1000)
    runs = marked(ids, learn)
    assert [Characters().decode(run).strip() for run in runs] == [learned, "yes"]
    for run, answer in zip(runs, (first, "yes")):
        assert [i in EOS for i in run[:-1]] == [False] * (len(run) - 1)
        assert (run[-1] in EOS) == (name != "none" or "</s>" in answer or "<|im_end|>" in answer)
        begin = Characters().encode(answer)[1:2]
        assert run[:1] == begin or run[1:2] == begin and run[0] == Characters().id(" ")


@pytest.mark.parametrize("wanted", [range(400), range(0, 400, 3)], ids=["all", "some"])
@pytest.mark.parametrize("document", [TEXT[0], TEXT], ids=["text", "two answers"])
def test_every_token_is_learned_with_learn_text(tokenizer, document, wanted):
    """Guards --learn text: questions left out, or tokens learned that can never be drafted."""
    ordinary = partial(encode, tokenizer=tokenizer, template=CHAT_TEMPLATES["chatml"], eos=EOS,
                       max_length=100)
    ids, learn = every_token(document, ordinary, wanted)
    assert ids == ordinary(document)[0] and learn == [i in wanted for i in ids] and any(learn)


def test_a_plain_text_is_learned_whole(tokenizer):
    """Guards plain text: a token lost, the end of sequence missing, or the first token learned,
    which nothing predicts."""
    ids, learn = encode(TEXT[0], tokenizer, CHAT_TEMPLATES["chatml"], (2,), 1000)
    assert ids == tokenizer.encode(TEXT[0]) + [2] and learn == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize("document", [TEXT[0], TEXT[:2], [*TEXT, *TEXT]],
                         ids=["text", "one answer", "four answers"])
@pytest.mark.parametrize("eos", [(), EOS], ids=["no eos", "eos"])
def test_documents_are_cut(tokenizer, document, eos):
    """Guards --max-length: longer rows than it allows, a mask of another length, or a cut that
    changes what is before it."""
    template = CHAT_TEMPLATES["chatml"]
    ids, learn = encode(document, tokenizer, template, eos, 1000)
    for length in range(1, len(ids) + 2):
        cut_ids, cut_learn = encode(document, tokenizer, template, eos, length)
        assert (cut_ids, cut_learn) == (ids[:length], learn[:length])


examples = st.lists(st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=12),
                    max_size=20)


@given(examples=examples, batch_tokens=st.integers(12, 60))
def test_batches_hold_every_example_once(examples, batch_tokens):
    """Guards batching: an example lost or doubled, a mask not moved by one, padding learned, B·T
    too large."""
    examples = [tuple(map(list, zip(*example))) for example in examples]
    found = []
    for ids, learn in batches_of(examples, batch_tokens):
        assert ids.shape == learn.shape and 0 < ids.numel(
        ) <= batch_tokens and learn.dtype == torch.bool
        assert not ids[:, -1].eq(0).all(), "longer than its longest row"
        for row, wanted in zip(ids.tolist(), learn.tolist()):
            n = next((i for i, token in enumerate(row) if token == 0),
                     len(row))  # no token is 0 here
            assert not any(row[n:]) and not any(wanted[n - 1:])
            found.append((row[:n], wanted[:n - 1]))
    assert sorted(found) == sorted((ids, learn[1:]) for ids, learn in examples if any(learn[1:]))


def test_the_vocabulary_is_the_most_frequent_learned_tokens():
    """Guards --vocabulary: counted over prompts too, without the end of sequence, unsorted, or with
    a wrong share of the text."""
    documents = [([9, 9, 9, 5, 5, 7, 2], [False] * 3 + [True] * 4),
                 ([9, 9, 5, 7, 6, 2], [False] * 2 + [True] * 4)]
    ids, coverage = most_frequent(documents, 3, 12, (2,))
    assert ids.tolist() == [2, 5, 7] and coverage == pytest.approx(7 / 8)
    ids, coverage = most_frequent(documents, 12, 12, (2,))
    assert ids.tolist() == list(range(12)) and coverage == 1


def test_a_document_is_on_one_side_everywhere(folder):
    """Guards held-out data: a prompt trained on from one file and held out from another, or split()
    overlapping."""
    for i in range(300):
        prompt = f"{i} {TEXT[0]}"
        sides = {
            is_held_out(d)
            for d in (prompt, [prompt, "one answer"], [prompt, "another", "And then?", "no more"],
                      prompt + "\n", ["\n" + prompt, "one answer"])
        }  # as the last of a file has it
        assert len(sides) == 1
    held = sum(is_held_out(f"{i}") for i in range(64 * 100))
    assert 60 < held < 140
    path = folder / "many.txt"
    path.write_text("\n\n".join(f"{i} {TEXT[i % 4]}" for i in range(500)))
    rest, held = split([path, path])
    assert held and not any(map(is_held_out, rest)) and all(map(
        is_held_out, held)) and len(rest) + len(held) == 1000


def test_a_window_of_too_few_batches_is_passed_over():
    """Guards a long run: it ends after hours, because the documents of one window are shorter than
    those of the others."""
    args = Namespace(window=2, batches=2, passes=1, seed=0)
    documents = [6, 6, 2, 2]  # tokens; the two short ones share a batch
    windows = Windows(documents, 2, 0, lambda window: batches_of(
        [([1] * n, [True] * n) for n in window], 9)).numbered(0, 0)
    stream = train_adapter.updates(windows, args, Namespace(states=lambda *_: 0))
    seen = [next(stream)[0][0] for _ in range(20)]
    assert seen == sorted(set(seen)) and 20 < seen[-1] < 40


def test_workers_encode_the_same_windows():
    """Guards --workers: windows out of order, left out or seen twice, or a document that cannot be
    encoded told with a worker's traceback."""
    def make(documents):
        if 10 in documents:
            raise UserError("chat_template.jinja: the chat template says: no")
        return torch.tensor(documents)

    for first, n in (0, 3), (2, 3), (0, 7):
        alone, ahead = ([(i, made.tolist()) for i, made in islice(
            Windows(range(n), 2, 5, make).numbered(first, workers), 9)] for workers in (0, 2))
        assert alone == ahead
    with pytest.raises(UserError, match="^chat_template.jinja: the chat template says: no$"):
        list(islice(Windows(range(11), 2, 5, make).numbered(0, 2), 9))


def test_workers_end_with_a_killed_training(tmp_path):
    """Guards --resume after kill -9: workers that wait for ever for someone to read what they have
    made, in a pipe that is full, and keep --out locked."""
    child = os.fork()
    if child == 0:
        try:
            os.setpgrp()
            assert files.lock(os.open(tmp_path, os.O_RDONLY), wait=False)
            windows = Windows(range(9), 2, 5, lambda documents: bytes(10 ** 6)).numbered(0, 2)
            next(windows)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    folder, until = os.open(tmp_path, os.O_RDONLY), time.monotonic() + 20
    try:
        while not files.lock(folder, wait=False):
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        os.close(folder)
        with contextlib.suppress(ProcessLookupError):  # workers that live on
            os.killpg(child, signal.SIGKILL)


@pytest.mark.parametrize("more", [[], ["--learn", "text"]], ids=["target", "text"])
def test_workers_make_the_batches(train, monkeypatch, more):
    """Guards a GPU's time: batches made by the trainer, for which the GPU waits meanwhile."""
    made, batches = [], training_text.batches_of
    monkeypatch.setattr(training_text, "batches_of",
                        lambda *args: made.append(0) or batches(*args))
    assert train("--workers", 1, "--updates", 1, *more)[0] == 0
    assert len(made) == 1, "the held-out documents', before the workers are there"


# --------------------------------------------------------------------------------------------------
# Data files

ENTRIES = [share_gpt(i)
           for i in range(3)] + [{"text": "A \u201ctext\u201d,\nof two lines and [brackets] {}."}]


DOCUMENTS = [[m["value"]
              for m in entry["conversations"]] if "text" not in entry else entry["text"]
             for entry in ENTRIES]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", [
    json.dumps(ENTRIES),
    json.dumps(ENTRIES, indent=2, ensure_ascii=False), "\n".join(map(json.dumps, ENTRIES)) + "\n\n",
    "\ufeff" + json.dumps(ENTRIES, ensure_ascii=False),
    "\n \n" + "\r\n".join(map(json.dumps, ENTRIES))
])
def test_all_forms_read_alike(tmp_path, form, packed):
    """Guards reading: an entry lost or changed by the form of the file, its line ends, its
    byte-order mark or gzip."""
    path = tmp_path / ("data.json" + ".gz" * packed)
    (gzip.open if packed else open)(path, "wb").write(form.encode())
    assert read_documents(path) == DOCUMENTS


def test_jsonl_is_read_line_by_line():
    """Guards memory: a file that is read at once takes several times its size."""
    class Lines(io.StringIO):
        def read(self, *size):
            raise AssertionError("read at once")

    file = Lines("\n" + "\n".join(map(json.dumps, ENTRIES)))
    assert list(documents_of(file, "data.jsonl", False)) == DOCUMENTS
    file.seek(0)
    next(documents_of(file, "data.jsonl", False))
    assert file.readline(), "the first document, and all are read"


def test_plain_text_is_split_at_blank_lines(tmp_path):
    """Guards plain text: documents joined, split at a line end, or empty."""
    path = tmp_path / "data.txt"
    path.write_text("\nOne\nand more\n\n\n\nTwo\n \t\n\n  Three\n\n")
    assert [document.strip("\n")
            for document in read_documents(path)] == ["One\nand more", "Two", "  Three"]


@pytest.mark.parametrize("turns, kept", [("system:s human:a gpt:b", "a b"),
                                         ("gpt:b human:a gpt:b", "a b"),
                                         ("human:a gpt:b human:c", "a b"), ("human:a", ""),
                                         ("human:a gpt:b human:c human:d gpt:e", "a b"),
                                         ("human:a gpt:b gpt:c human:d gpt:e", "a b"), ("", ""),
                                         ("gpt:b", ""), ("human:a gpt:b human:c gpt:", "a b"),
                                         ("human: human:a gpt:b", "a b"),
                                         ("human:a tool:x gpt:b", ""),
                                         ("human:a gpt:b tool:x gpt:c", "a b"),
                                         ("tool:x human:a gpt:b", ""),
                                         ("human:a system:s gpt:b", ""),
                                         ("user:a assistant:b", "a b"),
                                         ("User:a ASSISTANT:b", "a b"),
                                         ("user:a chatgpt:b bing:c", "a b"), ("human:a gpt:", "")])
def test_odd_conversations(turns, kept):
    """Guards real ShareGPT: an answer learned behind a turn that is not its prompt, or a crash."""
    messages = [dict(zip(("from", "value"), turn.split(":"))) for turn in turns.split()]
    assert document_of({"conversations": messages}, "here") == kept.split()
    messages = [{"role": m["from"], "content": m["value"] or None} for m in messages]
    assert document_of({"messages": messages}, "here") == kept.split()
    messages = [m | {"content": [{"type": "text", "text": m["content"] or ""}]} for m in messages]
    assert document_of({"messages": messages}, "here") == kept.split()


def test_what_is_left_out_is_said(tmp_path, capsys):
    """Guards conversations that vanish without a word, or that go on from what is not there."""
    def chat(answer, *before, **entry):
        return {"messages": [*before, {"role": "user", "content": "Hello"},
                             {"role": "assistant", "content": "Bonjour"} | answer]} | entry

    french = {"role": "system", "content": "Speak French."}
    entries = [chat({}, french), chat({}, system="Speak French."), chat({}),
               chat({"tool_calls": [{"name": "f"}]}), chat({"content": [{"type": "image"}]}),
               {"messages": [*chat({})["messages"], french]}, {"messages": []}, {"text": "plain"}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    documents, held = split([path])
    assert not held and documents == read_documents(path) == [["Hello", "Bonjour"]] * 4 + ["plain"]
    assert [*map(system_of, documents)] == ["Speak French."] * 2 + [None] * 3
    assert digest(documents[:1]) == digest(documents[1:2]) != digest(documents[2:3]) == digest(
        [["Hello", "Bonjour"]])
    assert capsys.readouterr().err == (
        "--data: of 7 conversations 1 left out: tool calls, 1 left out: contents that are not text,"
        " 1 cut short: a further system message, 1 left out: a turn is missing\n")
    assert split([path], CHAT_TEMPLATES["llama2"])[0] == documents
    path.write_text(json.dumps(entries[0]))
    with pytest.raises(UserError, match="no document to train on, of 1 conversations 1 left out: a "
                       "system message, which the chat template does not take"):
        split([path], CHAT_TEMPLATES["none"])


ONE = json.dumps({"text": TEXT[0]})


@pytest.mark.parametrize(
    "name, data, parts",
    [("bad.jsonl", f"{ONE}\n\n{ONE[:-5]}\n{ONE}", ["bad.jsonl:3", "not valid JSON"]),
     ("bad.jsonl", f"{ONE}\n[1]", ["bad.jsonl:2", "conversations"]),
     ("bad.jsonl", f"{ONE}\n" + '{"text": 5}', ["bad.jsonl:2", "conversations"]),
     ("bad.json", f"[{ONE},\n{ONE},\n{ONE[:-5]}", ["bad.json:3", "2 entries", "--allow-truncated"]),
     ("bad.json", f"[{ONE},\n{ONE},\n", ["bad.json:3", "2 entries", "--allow-truncated"]),
     ("bad.json", f"[{ONE}\n{ONE}]", ["bad.json:1", "--allow-truncated"]),
     ("bad.json", "[", ["bad.json:1", "0 entries"]),
     ("bad.json", f"[{ONE},\n 1]", ["bad.json:2", "conversations"]),
     ("bad.json", f"[{ONE}]\n[{ONE}]", ["bad.json:1", "1 entries", "ends"]),
     ("bad.jsonl", f"{ONE[5:]}\n{ONE}", ["bad.jsonl:1", "not valid JSON"]),
     ("bad.jsonl", '{"text": " \\n"}\n' * 9, "no document"),
     ("bad.json", "[" * 100_000, ["bad.json:1", "0 entries"]),
     ("bad.jsonl", '{"text":' * 100_000, ["bad.jsonl:1", "not valid JSON"]),
     ("bad.json", "[]", "no document"), ("bad.txt", "", "no document"),
     ("bad.txt", " \n\n\n ", "no document"),
     ("bad.json", json.dumps([{"conversations": "human"}]), "bad.json:1"),
     ("bad.json", json.dumps([{"conversations": [1]}]), "bad.json:1"),
     ("bad.json", json.dumps([{"conversations": [{"from": "human", "value": 5}]}]), "bad.json:1"),
     ("bad.json", json.dumps([{"conversations": [{"from": ["human"], "value": "a"}]}
                              ]), "bad.json:1"),
     ("bad.json", json.dumps([{"conversations": []}]), "no document"),
     ("bad.txt", TEXT[3].encode("latin-1", "replace"), ["bad.txt", "cannot be read as UTF-8"]),
     ("bad.bin", random.Random(0).randbytes(999), ["bad.bin", "cannot be read as UTF-8"]),
     ("bad.json.gz", ONE, ["bad.json.gz", "cannot be read"]),
     ("bad.json.gz", gzip.compress(ONE.encode() * 50, mtime=0)[:-20],
      ["bad.json.gz", "cannot be read"]),
     ("bad.json.gz", gzip.compress(random.Random(0).randbytes(999), mtime=0)[:10] + b"\xff" * 500,
      ["bad.json.gz", "cannot be read"]),
     ("missing.json", None, ["missing.json", "cannot be read"])])
def test_damaged_data_is_refused(refused, folder, tmp_path, name, data, parts):
    """Guards a user's data: a traceback, a line that does not say where, or half a file learned
    without a word."""
    if data is not None:
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    refused(parts, "--data",
            folder / "plain.txt" if "no document" not in parts else tmp_path / name,
            tmp_path / name)


def test_a_truncated_list_is_taken_when_asked_to(train, folder, tmp_path):
    """Guards --allow-truncated: refused all the same, without a warning, or with entries lost."""
    path = tmp_path / "cut.json"
    path.write_text(json.dumps([share_gpt(i) for i in range(30)], indent=1)[:-200])
    status, err = train("--data", path, "--allow-truncated")
    assert status == 0
    assert all(part in err for part in ("warning: ", "cut.json", " 29 entries", "29 documents"))


def test_half_a_character_is_no_crash(train, tmp_path):
    """Guards JSON's escapes: a lone surrogate, which web data has, ends in a traceback of the
    tokenizer."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(
        json.dumps({"text": f"{i} {sentences(i, 2)} \ud83e"}) + "\n" for i in range(40)))
    status, err = train("--data", path)
    assert status == 0, err
