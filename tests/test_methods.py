"""The other methods of drafters/: what each drafts, how many rounds it needs, what it refuses.

That they keep the bits of vanilla decoding is in test_lossless.py and test_tree.py.
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
from drafters.sps import SpsDrafter
from kangaroo import NoDrafter, generate
from llama import Sampler
from support import datastore as files
from support.decoder import load
from support.errors import UserError

import pytest
import torch
from helpers import (
    DEVICES,
    DTYPES,
    TINY,
    block,
    config_json,
    datastore,
    examples,
    hf_tensors,
    random_model,
    samplers,
    save_file,
    write_model,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cli import SCRIPT, cli, decode, model, refused  # noqa: F401
from test_drafter import CheckedDrafter


def perturbed(target, seed, noise=0.1):
    """A model that says what `target` says, but not always."""
    config, weight = target.config, target.norm.weight
    draft = random_model(config, 0, weight.dtype, weight.device)
    generator = torch.Generator().manual_seed(seed)
    for mine, its in zip(draft.parameters(), target.parameters(), strict=True):
        mine.copy_(its + noise * its.std() * torch.randn(its.shape, generator=generator).to(its))
    return draft


DRAFT_MODELS = {"itself": lambda target, seed: target, "perturbed": perturbed,
                "other": lambda target, seed: random_model(
                    replace(TINY, hidden_size=16, num_hidden_layers=1), seed,
                    target.norm.weight.dtype, target.norm.weight.device)}


# --------------------------------------------------------------------------------------------------
# Speculative sampling

@pytest.mark.parametrize("device", DEVICES)
@given(seed=st.integers(0, 999), kind=st.sampled_from([*DRAFT_MODELS]), sampler=samplers,
       steps=st.integers(0, 7), threshold=st.sampled_from([0.0, 0.1, 0.3]),
       prompt_length=st.integers(1, 20), width=st.sampled_from([2, 4, 8, 16]))
@examples(40)
def test_every_draft_is_that_of_a_fresh_draft_model(device, seed, kind, sampler, steps, threshold,
                                                    prompt_length, width):
    """Guards the draft model's cache: rejected rows kept, a row missing after a full accept."""
    with block(16):
        target = random_model(TINY, seed, torch.float64, device=device)
        small = DRAFT_MODELS[kind](target, seed + 1)
        checked = CheckedDrafter(lambda: SpsDrafter(target, small, threshold))
        prompt = [random.Random(seed).randrange(40) for _ in range(prompt_length)]
        rounds = list(generate(target, checked, prompt, 30, min(steps, width - 1), sampler,
                               width=width))
        assert sum(len(r.tokens) for r in rounds) == 30


class NeverRejected(SpsDrafter):
    """Asks in every round what a draft model says that has read the text and nothing else."""

    def prefill(self, ids, cache, sampler):
        self.prompt = ids
        return super().prefill(ids, cache, sampler)

    def draft(self, ids, n_max, cache):
        fresh = SpsDrafter(self.model, self.draft_model, self.threshold)
        fresh.prefill(self.prompt, cache, self.sampler)
        draft, expected = (who.draft(ids, n_max, cache) for who in (super(), fresh))
        assert (draft.tokens, draft.confidence) == (expected.tokens, expected.confidence)
        read = [who.cache.rows[:, :, :, :fresh.seen] for who in (self, fresh)]
        assert torch.equal(*read)
        return draft


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 999), sampler=samplers, steps=st.integers(1, 7),
       width=st.sampled_from([8, 16]))
@examples(15)
def test_a_draft_does_not_depend_on_what_was_rejected(device, dtype, seed, sampler, steps, width):
    """To the last bit, at every edge of a view: whatever was drafted before, the same draft."""
    config = replace(TINY, hidden_size=160, num_hidden_layers=2)
    with block(16):
        target = random_model(config, seed, dtype, device)
        drafter = NeverRejected(target, perturbed(target, seed), 0)
        list(generate(target, drafter, [1, seed % 40], 40, steps, sampler, width=width))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 999), n=st.integers(1, 40), steps=st.integers(0, 7), sampler=samplers,
       width=st.sampled_from([8, 16]))
@examples(15)
def test_the_target_as_its_own_draft_model(device, dtype, seed, n, steps, sampler, width):
    """N tokens in exactly ⌈N / (γ + 1)⌉ rounds: it has the target's bits, so the same choices."""
    target = random_model(TINY, seed, dtype, device)
    with block(64):
        rounds = list(generate(target, SpsDrafter(target, target), [seed % 40], n, steps, sampler,
                               width=width))
    assert len(rounds) == ceil(n / (steps + 1))
    assert all(r.accepted == len(r.draft.tokens) for r in rounds)


@pytest.mark.parametrize("threshold, length", [(0.0, 7), (1.0, 1)])
def test_the_threshold_of_a_draft_model(threshold, length):
    """η = 0 stops no draft; at η = 1 each stops behind its first token, which is verified."""
    target = random_model()
    drafter = SpsDrafter(target, target, threshold)
    rounds = list(generate(target, drafter, [1, 2, 3], 32, 7))
    assert {len(r.draft.tokens) for r in rounds} == {length}


def resized(target, vocab_size):
    """The same weights with rows more or less for ids that no text has; the ones more are loud."""
    draft = random_model(replace(target.config, vocab_size=vocab_size))
    both = min(vocab_size, target.config.vocab_size)
    for (name, mine), its in zip(draft.named_parameters(), target.parameters(), strict=True):
        if name.startswith(("embed_tokens", "lm_head")):
            mine.fill_(9)
            mine[:both] = its[:both]
        else:
            mine.copy_(its)
    return draft


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1.0, seed=2), Sampler(2.0, 50, 0.9)])
def test_padded_vocabularies(sampler):
    """Padding is never drafted, and the choice is the target's in spite of it; ids that the draft
    model has not are read all the same."""
    target = random_model()
    drafter = SpsDrafter(target, resized(target, 48))
    assert len(list(generate(target, drafter, [1, 2], 30, 4, sampler))) == 6
    drafter = SpsDrafter(target, resized(target, 9))
    drafted = [token for r in generate(target, drafter, [39, 38], 30, 4, sampler)
               for token in r.draft.tokens]
    assert drafted and max(drafted) < 9


def test_a_draft_model_with_a_shorter_context():
    """Beyond its context it was never trained: nothing is drafted there."""
    target = random_model()
    small = random_model(replace(TINY, max_position_embeddings=20))
    rounds = list(generate(target, SpsDrafter(target, small), [1, 2, 3], 60))
    ends = 3
    for r in rounds:
        assert ends + len(r.draft.tokens) <= max(20, ends)
        ends += len(r.tokens)
    assert ends == 63 and any(r.draft.tokens for r in rounds)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_draft_model_full_of_nan_is_an_error(temperature):
    """It would draft nonsense in silence."""
    target, small, sampler = random_model(), random_model(), Sampler(temperature)
    small.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="draft model: what it drafts with is not finite"):
        list(generate(target, SpsDrafter(target, small), [1, 2], 9, sampler=sampler))


# --------------------------------------------------------------------------------------------------
# Retrieval

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
# The command line

TEXTS = "Once upon a time a small kangaroo lived by the river.\n\nOnce upon a time she jumped."


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):  # noqa: F811
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


def make(model, data, out):  # noqa: F811
    words = ["--model", model, "--data", data, "--out", out]
    return files.main([str(word) for word in words])


def test_a_draft_model_on_the_command_line(decode, model, folder):  # noqa: F811
    """Another model of the same tokenizer, with a padded vocabulary; and the target itself."""
    vanilla = decode("--drafter", "none")
    for draft_model, accepted in ((folder / "small", False), (model, True)):
        result = decode("--drafter", "sps", "--draft-model", draft_model, "--compare")
        assert result["identical"] and result["ids"] == vanilla["ids"]
        assert "trees" not in result and sum(result["drafted"]) > 0
        assert (result["drafted"] == result["accepted"]) == accepted


def test_a_datastore_on_the_command_line(cli, decode, folder):  # noqa: F811
    """A chain, and at a width for trees a tree of at most --nodes."""
    vanilla, args = decode("--drafter", "none"), ["--drafter", "rest", "--datastore",
                                                  folder / "model.safetensors"]
    for more in ([], ["--width", 16, "--nodes", 9]):
        result = decode(*args, *more, "--compare")
        assert result["identical"] and result["ids"] == vanilla["ids"]
        assert ("trees" in result) == bool(more) and 0 < max(result["drafted"]) <= 9
    assert "with model.safetensors, γ 10, tree of 9 nodes" in cli(*args, *more)[2]
    assert "tree" not in cli(*args)[2]


def test_the_python_interface(model, folder):  # noqa: F811
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
def test_what_a_method_needs(refused, folder, line, words):  # noqa: F811
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


def test_rest_is_a_program(folder, model, tmp_path):  # noqa: F811
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
