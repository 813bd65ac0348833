"""Medusa: heads that are right by construction win, what is drafted, which files are read.

That it keeps the bits of vanilla decoding is in test_lossless_methods.py.
"""
import json
import pickle
import random
from dataclasses import replace
from math import ceil

from drafters.adapters import PartialHead, load_adapter
from drafters.medusa import TREE, Heads, MedusaDrafter, load_heads
from kangaroo import generate
from llama import Sampler
from support import start
from support.checkpoint import build, load_llama, named_weights
from support.decoder import load
from support.errors import UserError
from support.graphs import direct_recorder
from support.replay import read_page

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TINY,
    config_json,
    examples,
    random_model,
    random_weights,
    samplers,
    save_file,
    write_model,
)
from hypothesis import given
from hypothesis import strategies as st
from test_lookahead import CIRCLE, rule, run, steps_ahead


def random_heads(model, heads=3, own=False, seed=0, blocks=1):
    config, weight = model.config, model.norm.weight
    shape = heads, blocks, config.hidden_size, own and config.vocab_size
    return random_weights(build(Heads, shape, weight.device, weight.dtype), seed)


# --------------------------------------------------------------------------------------------------
# Heads that must win

def perfect_heads(model, following, heads=3):
    """Heads that are right about a `rule`: blocks that add nothing, and a projection k + 1 on."""
    found = random_heads(model, heads, own=True)
    for k, head in enumerate(found.heads):
        head[0].linear.weight.data.zero_(), head[0].linear.bias.data.zero_()
        head[-1].weight.data.copy_(steps_ahead(following, k + 2))
    return found


@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("heads", [1, 3, 5])
@pytest.mark.parametrize("n", [1, 8, 33])
def test_heads_that_are_right_by_construction(tree, heads, n):
    """Each round has K tokens and the target's own: ⌈N / (K + 1)⌉ rounds. A head that is off by a
    position, or the state of another token, has nothing accepted."""
    model = rule([(5 * t + 3) % 16 for t in range(16)])
    found = perfect_heads(model, [(5 * t + 3) % 16 for t in range(16)], heads)
    rounds = run(model, MedusaDrafter(model, found, tree), [3, 2], n)
    depth = min(heads, 3) if tree else heads
    assert len(rounds) == ceil(n / (depth + 1))
    alone = run(model, MedusaDrafter(model, found, tree), [2], n)
    assert not alone[0].draft.tokens  # nothing has been run yet
    assert len(alone) == 1 + ceil((n - 1) / (depth + 1))


@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1.0, seed=3), Sampler(5.0, seed=4),
                                     Sampler(1.0, 2, 0.9, 5)],
                         ids=["greedy", "T 1", "T 5", "top-k"])
def test_heads_use_the_noise_of_the_position(tree, sampler):
    """A target that says the same everywhere is foreseen by heads that add nothing, at any
    temperature: with the same noise they choose the same tokens."""
    model = rule(CIRCLE)
    model.embed_tokens.weight.data.fill_(3)
    model.lm_head.weight.data.copy_(torch.randn(12, 12, generator=torch.manual_seed(0)))
    heads = random_heads(model)
    for head in heads.heads:
        head[0].linear.weight.data.zero_(), head[0].linear.bias.data.zero_()
    rounds = run(model, MedusaDrafter(model, heads, tree), [3, 2], 40, 15, sampler)
    assert len(rounds) == 10 and all(r.accepted == 3 for r in rounds[:-1])


# --------------------------------------------------------------------------------------------------
# The second oracle: what Medusa drafts

@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
@given(seed=st.integers(0, 999), sampler=samplers, prompt_length=st.integers(2, 20),
       own=st.booleans(), vocabulary=st.booleans())
@examples(20)
def test_every_draft_is_that_of_a_fresh_drafter(tree, seed, sampler, prompt_length, own,
                                                vocabulary):
    """Its state is that of the last committed token that was run, whatever was rejected: a drafter
    that was given the text as its prompt drafts the same."""
    model = random_model(TINY, seed, torch.float64)
    heads = random_heads(model, own=own, seed=seed)
    if vocabulary and not own:
        heads.head = PartialHead(model.lm_head, torch.arange(0, 40, 3))
    ids = [random.Random(seed).randrange(40) for _ in range(prompt_length)]
    drafter, inner = MedusaDrafter(model, heads, tree), None

    def draft(ids, n_max, cache):
        fresh = MedusaDrafter(model, heads, tree)
        empty = model.new_cache(len(ids), 16)
        states = fresh.prefill(ids[:-1], empty, sampler)
        states = model.run_layers(states, torch.arange(len(ids) - 1), empty, 0, 4)
        fresh.observe(states, ids[1:], list(range(1, len(ids) - 1)))
        found, expected = inner(ids, n_max, cache), fresh.draft(ids, n_max, cache)
        assert found.tokens == expected.tokens and found.parents == expected.parents
        assert found.confidence == pytest.approx(expected.confidence, abs=1e-9)
        assert not vocabulary or own or not any(token % 3 for token in found.tokens)
        return found

    inner, drafter.draft = drafter.draft, draft
    rounds = list(generate(model, drafter, ids, 20, 7, sampler, width=16))
    assert sum(len(r.tokens) for r in rounds) == 20


def test_heads_full_of_nan_are_an_error():
    """They would draft nonsense in silence."""
    model = random_model()
    heads = random_heads(model)
    heads.source = "the damaged ones"
    heads.heads[1][0].linear.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the damaged ones: what it drafts with is not finite"):
        list(generate(model, MedusaDrafter(model, heads), [1, 2], 9))


# --------------------------------------------------------------------------------------------------
# Files and flags

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder without an end-of-sequence token."""
    folder = tmp_path_factory.mktemp("methods") / "model"
    config = write_model(folder)
    (folder / "config.json").write_text(json.dumps(config_json(replace(config, eos_token_ids=()))))
    return folder


def write_heads(folder, model, form="pt", heads=3, own=True, blocks=1, **config):
    """A folder of heads as the authors' code saves them, or with own=False as ours does."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name.removeprefix("heads."): weight.detach().clone() for name, weight in
               named_weights(random_heads(model, heads, own, 5, blocks)).items()}
    if form == "pt":
        torch.save(tensors, folder / "medusa_lm_head.pt")
    else:
        save_file(tensors, folder / "medusa_lm_head.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "medusa_num_heads": heads, "medusa_num_layers": blocks,
        "base_model_name_or_path": "a/model", "transformers_version": "4.31.0"} | config))
    return tensors


@pytest.fixture
def cli(folder, capfd):
    """Run the program; returns (exit status, stdout, stderr)."""
    def run(*args):
        words = ["--model", folder, "--device", "cpu", "--dtype", "float32", "--prompt",
                 "Once upon a time", "--max-new-tokens", 24, *args]
        return start.main([str(word) for word in words]), *capfd.readouterr()
    return run


@pytest.mark.parametrize("own, blocks", [(True, 1), (True, 2), (False, 1)])
def test_both_forms_hold_the_same_heads(tmp_path, own, blocks):
    """Names as the authors write them; a published config.json may count fewer heads than the file
    holds."""
    model = random_model()
    for form in ("pt", "safetensors"):
        tensors = write_heads(tmp_path / form, model, form, own=own, blocks=blocks,
                              medusa_num_heads=2)
        assert "0.0.linear.bias" in tensors and own == (f"2.{blocks}.weight" in tensors)
        heads = load_heads(tmp_path / form, model)
        assert len(heads.heads) == 3 and heads.own == own and heads.tree == list(TREE)
        x, parts = torch.randn(1, 32), []
        for k in range(3):
            y = x
            for i in range(blocks):
                name = f"{k}.{i}.linear"
                y = y + F.silu(y @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"])
            parts.append(y @ (tensors[f"{k}.{blocks}.weight"] if own else model.lm_head.weight).T)
        assert torch.allclose(heads(x, 3, model.lm_head), torch.cat(parts), atol=1e-5)
        assert torch.allclose(heads(x, 2, model.lm_head), torch.cat(parts[:2]), atol=1e-5)


def test_our_own_form_has_a_vocabulary(tmp_path):
    """Rows of the target's LM head, and the tree that config.json names; another target is
    refused."""
    model = random_model()
    tensors = write_heads(tmp_path, model, "safetensors", own=False, architecture="medusa",
                          medusa_choices=[[0], [1], [1, 0]])
    save_file(tensors | {"vocabulary": torch.tensor([5, 9, 2], dtype=torch.int8)},
              tmp_path / "medusa_lm_head.safetensors")
    heads = load_heads(tmp_path, model)
    assert heads.tree == [(0,), (1,), (1, 0)]
    assert heads.head.vocabulary.tolist() == [5, 9, 2]
    rounds = run(model, MedusaDrafter(model, heads, heads.tree), [1, 2], 20)
    assert {token for r in rounds for token in r.draft.tokens} <= {5, 9, 2}
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 3, "target": "another"}')
    model.fingerprint = "this"
    with pytest.raises(UserError, match="trained for another model"):
        load_heads(tmp_path, model)


@pytest.mark.parametrize("form, args", [
    ("pt", []), ("safetensors", ["--tree"]), ("pt", ["--tree", "--nodes", 5]),
    ("safetensors", ["--steps", 1]), ("safetensors", ["--tree", "--width", 32]),
    ("pt", ["--temperature", 0.9])], ids=str)
def test_medusa_gives_vanilla_ids(cli, folder, tmp_path, form, args):
    """From flags to ids, and what is told of it."""
    write_heads(tmp_path, load(folder, device="cpu", dtype="float32", adapter=False).model, form)
    args = ["--drafter", "medusa", "--adapter", tmp_path, "--compare", *args]
    status, out, err = cli("--json", *args)
    assert status == 0, err
    result = json.loads(out)
    assert result["identical"] and len(result["ids"]) == 24 and sum(result["drafted"])
    text = cli(*args)[2]
    nodes = 5 if "--nodes" in args else 15
    assert "drafter medusa, 3 heads, γ " + ("1" if "--steps" in args else "3") in text
    assert ("--tree" in args) == ("trees" in result) == (f"tree of {nodes} nodes" in text)
    assert all(len(t["tokens"]) == len(t["confidence"]) <= nodes for t in result.get("trees", []))


def test_the_folder_medusa_is_the_default(cli, folder, tmp_path, monkeypatch):
    """As `adapter` is for Kangaroo."""
    write_heads(folder / "medusa", load(folder, device="cpu", dtype="float32", adapter=False).model)
    try:
        assert "3 heads" in cli("--drafter", "medusa")[2]
    finally:
        for path in (folder / "medusa").iterdir():
            path.unlink()
        (folder / "medusa").rmdir()


def refused(cli, words, *args):
    status, out, err = cli(*args)
    assert (status, out) == (2, "") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


@pytest.mark.parametrize("args, words", [
    (["--drafter", "medusa"], ["no Medusa heads for ", "give --adapter DIR"]),
    (["--drafter", "medusa-tree"], ["--drafter medusa-tree"]),
    (["--drafter", "medusa", "--adapter", "absent"], ["absent", "medusa_lm_head.pt"]),
    (["--drafter", "medusa", "--adapter", "HEADS", "--tree", "--width", 8], ["--width 8"]),
    (["--drafter", "medusa", "--adapter", "HEADS", "--tree", "--nodes", 64], ["--nodes 64"]),
    (["--drafter", "medusa", "--adapter", "HEADS", "--tree", "--top-candidates", 3],
     ["--top-candidates", "kangaroo"]),
    (["--drafter", "medusa", "--adapter", "HEADS", "--steps", 8], ["--steps 8"]),
    (["--adapter", "HEADS"], ["config.json", "Medusa heads", "--drafter medusa"])],
                         ids=lambda value: " ".join(map(str, value)) if "--" in value[0] else None)
def test_flags_that_do_not_fit(cli, folder, tmp_path, args, words):
    """One line that names the flag, before any output."""
    write_heads(tmp_path, load(folder, device="cpu", dtype="float32", adapter=False).model)
    refused(cli, words, *(tmp_path if word == "HEADS" else word for word in args))


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "config.json").unlink(), ["config.json", "cannot be read"]),
    (lambda f: change(f / "config.json", medusa_num_heads="three"), ["medusa_num_heads", "three"]),
    (lambda f: change(f / "config.json", medusa_num_layers=0), ["medusa_num_layers = 0"]),
    (lambda f: change(f / "config.json", medusa_num_heads=4), ["3.0.linear.weight", "missing"]),
    (lambda f: change(f / "config.json", medusa_choices=[[0], [1, 0]]), ["medusa_choices",
                                                                         "[1, 0]"]),
    (lambda f: change(f / "config.json", medusa_choices=7), ["medusa_choices"]),
    (lambda f: write_heads(f, random_model(replace(TINY, hidden_size=48))), ["hidden_size = 48",
                                                                             "32"]),
    (lambda f: write_heads(f, random_model()), ["misshapen", "0.1.weight"]),  # 40 tokens, not 340
    (lambda f: (f / "medusa_lm_head.pt").write_bytes(b"PK"), ["medusa_lm_head.pt", "truncated"]),
    (lambda f: (f / "medusa_lm_head.pt").unlink(), ["medusa_lm_head.safetensors or"]),
    (lambda f: torch.save({"0.1.weight": torch.ones(9, 9), "vocabulary": torch.arange(9)},
                          f / "medusa_lm_head.pt"), ["projections", "vocabulary"]),
    (lambda f: torch.save({"0.0.linear.weight": 1}, f / "medusa_lm_head.pt"), ["more than"])])
def test_heads_that_do_not_fit(cli, folder, tmp_path, damage, words):
    """One line that names the file and the field."""
    write_heads(tmp_path, load(folder, device="cpu", dtype="float32", adapter=False).model)
    damage(tmp_path)
    refused(cli, words, "--drafter", "medusa", "--adapter", tmp_path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [
    lambda x, path: path.write_bytes(pickle.dumps(x)), torch.save], ids=["pickle", "torch"])
def test_code_among_the_heads_does_not_run(cli, folder, tmp_path, save):
    """Heads come from strangers: weights and nothing else."""
    write_heads(tmp_path, load(folder, device="cpu", dtype="float32", adapter=False).model)
    save({"0.0.linear.weight": Malicious(tmp_path / "ran")}, tmp_path / "medusa_lm_head.pt")
    refused(cli, ["medusa_lm_head.pt", "more than tensors"], "--drafter", "medusa", "--adapter",
            tmp_path)
    assert not (tmp_path / "ran").exists()


def test_heads_are_no_adapter(tmp_path):
    """Guards the message: the folder is whole, but for another drafter."""
    model = random_model()
    write_heads(tmp_path, model)
    with pytest.raises(UserError, match="--drafter medusa"):
        load_adapter(tmp_path, model)


@pytest.mark.parametrize("drafter", ["lookahead", "medusa", "medusa-tree"])
def test_graphs_and_the_page_take_any_method(cli, folder, tmp_path, drafter):
    """Replayed steps give the same rounds; --trace records what it finds."""
    write_heads(tmp_path, load_llama(folder))
    decoder = load(folder, device="cpu", dtype="float32", width=16, adapter=False, heads=tmp_path)
    ids = decoder.encode("Once upon a time")
    plain = [r.tokens for r in decoder.rounds(ids, drafter, 24)]
    decoder.use_graphs(direct_recorder)
    assert [r.tokens for r in decoder.rounds(ids, drafter, 24)] == plain
    flags = ["--drafter", drafter.removesuffix("-tree"), *(["--tree"] if "-" in drafter else [])]
    heads = ["--adapter", tmp_path] if drafter != "lookahead" else []
    assert cli(*flags, *heads, "--trace", tmp_path / "page.html")[0] == 0
    assert len(read_page(tmp_path / "page.html")[0]["rounds"]) == len(plain)
