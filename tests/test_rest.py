"""Retrieval from a datastore: what is found, in how many rounds, and its command lines.

That it keeps the bits of vanilla decoding is in test_lossless.py and test_tree.py.
"""
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from math import ceil

from drafters.rest import END, LONGEST, MATCHES, RestDrafter
from kangaroo import NoDrafter, generate
from llama import Sampler
from support import datastore as files
from support.decoder import load

import pytest
import torch
from helpers import (
    DEVICES,
    TINY,
    block,
    config_json,
    datastore,
    examples,
    hf_tensors,
    random_model,
    save_file,
    write_model,
)
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cli import SCRIPT, cli, decode, model, refused  # noqa: F401 (fixtures)

documents = st.lists(st.lists(st.integers(0, 2), max_size=24), min_size=1, max_size=5)


@given(texts=documents, ids=st.lists(st.integers(0, 3), min_size=1, max_size=30),
       longest=st.integers(0, 6))
def test_a_datastore_finds_what_a_search_finds(texts, ids, longest):
    """All continuations of the longest suffix that goes on in some document, and no others: none
    beyond a document's end."""
    store = datastore(texts)
    found = {}
    for n in range(1, min(LONGEST, len(ids)) + 1):
        at = [(text, i + n) for text in texts for i in range(len(text) - n)
              if text[i:i + n] == ids[-n:]]
        if at:
            found = Counter(tuple(text[i:i + longest]) for text, i in at)
    assert sum(found.values() if found else [0]) <= MATCHES
    assert Counter(store.continuations(ids, longest)) == found


@given(texts=documents)
@example(texts=[[0, 1] * 12])  # suffixes that are alike for long
def test_the_order_of_suffixes(texts):
    """As Python sorts them, by their first 32 tokens."""
    store = datastore(texts)
    tokens = list(store.tokens)
    assert sorted(store.order) == list(range(len(tokens)))
    words = [tokens[i:i + 32] for i in store.order]
    clipped = [word[:word.index(END) + 1] if END in word else word for word in words]
    assert clipped == sorted(clipped)


def test_of_many_matches_some_from_all_over():
    """A word that is everywhere costs no more than MATCHES look-ups."""
    store = datastore([[7, i] for i in range(1000)])
    found = [token for token, in store.continuations([7], 4)]
    assert MATCHES / 2 < len(found) <= MATCHES
    assert found[0] < 10 and found[-1] > 980 and found == sorted(found)


@pytest.mark.parametrize("width, nodes, tokens, parents", [
    (8, None, [2, 3, 4], [0, 1, 2]), (8, 2, [2, 3], [0, 1]),
    (16, None, [2, 3, 9, 4, 6, 7, 5], [0, 1, 0, 2, 1, 3, 2]), (16, 3, [2, 3, 9], [0, 1, 0])])
def test_the_heaviest_continuations(width, nodes, tokens, parents):
    """By how many places go on so; a narrow step has the most frequent token at every turn."""
    store = datastore([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [1, 9, 7], [1, 9], [1]])
    target = random_model()
    draft = RestDrafter(target, store, nodes).draft([8, 1], 3, target.new_cache(64, width))
    assert (draft.tokens, draft.parents) == (tokens, parents)


@pytest.mark.parametrize("device", DEVICES)
@given(seed=st.integers(0, 999), n=st.integers(1, 40), steps=st.integers(0, 7),
       width=st.sampled_from([8, 16]))
@examples(15)
def test_a_datastore_that_holds_the_answer(device, seed, n, steps, width):
    """N tokens in exactly ⌈N / (γ + 1)⌉ rounds, sampled so that no 16 tokens come twice."""
    target, sampler = random_model(TINY, seed, device=device), Sampler(1.5, seed=seed)
    prompt = [random.Random(seed).randrange(40) for _ in range(LONGEST)]
    with block(128):
        options = dict(steps=steps, sampler=sampler, width=width)
        answer = [r.tokens[0] for r in generate(target, NoDrafter(target), prompt, n, **options)]
        store = datastore([[1, 2, 3], prompt + answer, answer[::-1]])
        rounds = list(generate(target, RestDrafter(target, store), prompt, n, **options))
    assert [token for r in rounds for token in r.tokens] == answer
    assert len(rounds) == ceil(n / (steps + 1))


# --------------------------------------------------------------------------------------------------
# The command line, of a draft model too

TEXTS = "Once upon a time a small kangaroo lived by the river.\n\nOnce upon a time she jumped."


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A smaller model with a padded vocabulary, one of another tokenizer, and datastores."""
    folder = tmp_path_factory.mktemp("methods")
    small = replace(TINY, hidden_size=16, num_hidden_layers=1, vocab_size=344)
    shutil.copytree(model, folder / "small")
    save_file(hf_tensors(random_model(small)), folder / "small" / "model.safetensors")
    (folder / "small" / "config.json").write_text(json.dumps(config_json(small)))
    write_model(folder / "other")
    path = folder / "other" / "tokenizer.model"
    path.write_bytes(path.read_bytes().replace(b"liked", b"loved"))
    (folder / "texts.txt").write_text(TEXTS)
    for name in ("model", "other"):
        make(model if name == "model" else folder / "other", folder / "texts.txt",
             folder / f"{name}.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-9])
    (folder / "wild.safetensors").write_bytes(whole[:-4] + b"\xff\xff\xff\x7f")
    return folder


def make(model, data, out):
    words = ["--model", model, "--data", data, "--out", out]
    return files.main([str(word) for word in words])


def test_a_draft_model_on_the_command_line(decode, model, folder):
    """Another model of the same tokenizer, with a padded vocabulary; and the target itself."""
    vanilla = decode("--drafter", "none")
    for draft_model, accepted in ((folder / "small", False), (model, True)):
        result = decode("--drafter", "sps", "--draft-model", draft_model, "--compare")
        assert result["identical"] and result["ids"] == vanilla["ids"]
        assert "trees" not in result and sum(result["drafted"]) > 0
        assert (result["drafted"] == result["accepted"]) == accepted


def test_a_datastore_on_the_command_line(cli, decode, folder):
    """A chain, and at a width for trees a tree of at most --nodes."""
    vanilla, args = decode("--drafter", "none"), ["--drafter", "rest", "--datastore",
                                                  folder / "model.safetensors"]
    for more in ([], ["--width", 16, "--nodes", 9]):
        result = decode(*args, *more, "--compare")
        assert result["identical"] and result["ids"] == vanilla["ids"]
        assert ("trees" in result) == bool(more) and 0 < max(result["drafted"]) <= 9
    assert "with model.safetensors, γ 10, tree of 9 nodes" in cli(*args, *more)[2]
    assert "tree" not in cli(*args)[2]


def test_the_python_interface(model, folder):
    """load(draft_model=, datastore=), and decoder.rounds by the drafter's name."""
    decoder = load(model, device="cpu", dtype="float32", draft_model=folder / "small",
                   datastore=folder / "model.safetensors")
    ids = decoder.encode("Once upon a time")
    texts = [[token for r in decoder.rounds(ids, name, 20) for token in r.tokens]
             for name in ("sps", "rest", "none")]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("line, words", [
    ("sps", ["no draft model for ", "give --draft-model DIR"]),
    ("rest", ["no datastore for ", "give --datastore FILE"]),
    ("lookup --draft-model {}/small", ["--draft-model", "--drafter sps"]),
    ("sps --draft-model {}/small --datastore x", ["--datastore x", "--drafter rest"]),
    ("sps --draft-model {}/absent", ["absent: no such folder", "--draft-model"]),
    ("sps --draft-model {}/other", ["other", "another tokenizer", "▁liked"]),
    ("sps --draft-model {}/small --threshold 2", "--threshold 2"),
    ("sps --draft-model {}/small --nodes 3", "--nodes"),
    ("rest --datastore {}/absent", ["absent", "No such file"]),
    ("rest --datastore {}/texts.txt", "texts.txt"),
    ("rest --datastore {}/cut.safetensors", "cut.safetensors"),
    ("rest --datastore {}/wild.safetensors", ["wild.safetensors", "damaged, tokens"]),
    ("rest --datastore {}/small/model.safetensors", ["model.safetensors", "no datastore"]),
    ("rest --datastore {}/other.safetensors", ["other.safetensors", "another tokenizer"]),
    ("rest --datastore {}/model.safetensors --width 16 --nodes 16", "--nodes 16"),
    ("rest --datastore {}/model.safetensors --tree", "--tree")])
def test_what_a_method_needs(refused, folder, line, words):
    """A flag that is missing or belongs to another drafter, and files that do not fit."""
    refused(words, "--drafter", *line.format(folder).split())


@pytest.mark.parametrize("line, words", [
    ("--model absent", ["--data", "--out"]),
    ("--model absent --data texts.txt --out x", ["absent", "config.json"]),
    ("--model small --data absent --out x", ["absent", "No such file"]),
    ("--model small --data texts.txt --out no/x", "--out no/x"),
    ("--model small --data texts.txt --out x --chat none --width 3", "--width"),
    ("--model small --data texts.txt --out x --chat what", "--chat what")])
def test_a_datastore_that_cannot_be_made(folder, monkeypatch, capsys, line, words):
    """One line and status 2, before anything is written."""
    monkeypatch.chdir(folder)
    assert files.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"rest\.py: [^\n]+\n", err), err
    assert all(word in err for word in ([words] if isinstance(words, str) else words)), err
    assert not (folder / "x").exists()


def test_rest_is_a_program(folder, model, tmp_path):
    """From any folder; it says what it has made, and makes the same again."""
    words = [SCRIPT.parent / "drafters" / "rest.py", "--model", model, "--data",
             folder / "texts.txt", "--out", "again.safetensors"]
    result = subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout.startswith("again.safetensors: 2 documents, ")
    first, again = (load_file(path) for path in (folder / "model.safetensors",
                                                 tmp_path / "again.safetensors"))
    assert all(torch.equal(first[name], again[name]) for name in ("tokens", "order"))
