"""Training, end to end on a tiny model folder: what is learned, from which text, and that no run is
lost or mispaired."""
import copy
import errno
import gzip
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import kangaroo
import train_adapter
from drafters.adapters import ADAPTERS, load_adapter, new_adapter
from kangaroo import KangarooDrafter, generate
from llama import KVCache
from models import own_answers
from support import files, processes, progress, start, training_text
from support.chat import CHAT_TEMPLATES, render_chat
from support.checkpoint import load_llama, read_config
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
from support.processes import end_together
from support.tokenizer import Tokenizer
from train_adapter import (
    LOSSES,
    Distribution,
    NextTokens,
    States,
    Target,
    TextTarget,
    in_half,
    measure_batch,
    take_step,
)

import pytest
import torch
from helpers import (
    PROFILE,
    TEXT,
    TINY,
    random_model,
    random_weights,
    save_file,
    write_model,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

SCRIPT = Path(train_adapter.__file__).resolve()
PAIRS = list(zip([None, 20, 20, None], LOSSES))  # --vocabulary and --loss


def sentences(seed, n):
    return " ".join(random.Random(seed).choices(TEXT, k=n))


def share_gpt(i):
    turns = [("human", f"{i} {sentences(i, 1)}"), ("gpt", sentences(i, 2)),
             ("human", sentences(-i, 1)), ("gpt", sentences(i, 3))]
    return {"id": str(i), "conversations": [{"from": role, "value": text} for role, text in turns]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and 40 documents as ShareGPT and as plain text."""
    folder = tmp_path_factory.mktemp("train")
    write_model(folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    weights["lm_head.weight"] *= 4  # so that it is sure of something, which can be learned
    save_file(weights, folder / "model" / "model.safetensors")
    (folder / "chats.json").write_text(json.dumps([share_gpt(i) for i in range(40)]))
    (folder / "plain.txt").write_text("\n\n".join(f"{i} {sentences(i, 3)}" for i in range(40)))
    return folder


def words(folder, out, *args, data="chats.json"):
    """The words of a command line; later ones win, so `args` may name the defaults again."""
    common = [
        "--model", folder / "model", "--data", folder / data, "--out", out, "--exit-layer", 1,
        "--device", "cpu", "--dtype", "float32", "--chat", "zephyr", "--max-length", 150,
        "--batch-tokens", 600, "--batches", 2, "--window", 20, "--updates", 4, "--warmup", 2,
        "--lr", 0.01, "--eval-prompts", 1, "--eval-documents", 4
    ]
    return [str(word) for word in [*common, *args]]


@pytest.fixture
def train(folder, tmp_path, capfd):
    """Train in this process; returns (exit status, stderr)."""
    def run(*args, out="out", **kwargs):
        status = train_adapter.main(words(folder, tmp_path / out, *args, **kwargs))
        out, err = capfd.readouterr()
        assert out == ""
        return status, err
    return run


@pytest.fixture
def refused(train, recwarn):
    """Check that a command line is refused as a user should see it: status 2, one line that has all
    `parts`."""
    def run(parts, *args, **kwargs):
        status, err = train(*args, **kwargs)
        assert status == 2 and re.fullmatch(r"train_adapter\.py: [^\n]+\n", err), err
        assert not recwarn.list, "a warning would be a second line"
        for part in [parts] if isinstance(parts, str) else parts:
            assert part in err
    return run


def log_of(out):
    """The log's lines on updates, and those on held-out data."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines
            if "held_out" not in line], [line for line in lines if "held_out" in line]


def same_weights(a, b):
    a, b = load_file(a / "adapter.safetensors"), load_file(b / "adapter.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------
# What is learned

@pytest.mark.parametrize("vocabulary", [[], ["--vocabulary", 200]], ids=["all", "some"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("architecture, data", [("attention", "chats.json"),
                                                ("layer", "plain.txt")])
def test_the_loss_falls(train, tmp_path, architecture, data, loss, vocabulary):
    """Guards training as such: a gradient that is zero, of the wrong sign or cleared too early, or
    broken by an evaluation."""
    status, err = train("--architecture", architecture, "--loss", loss, *vocabulary, "--updates",
                        30, "--passes", 30, "--eval-every", 15, data=data)
    updates, held_out = log_of(tmp_path / "out")
    assert status == 0 and [line["step"] for line in updates] == list(range(1, 31)), err
    losses = [line["loss"] for line in updates]
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]
    assert updates[-1]["acceptance"] > 1.5 * updates[0]["acceptance"]
    before, after = (line["held_out"] for line in held_out)
    assert after["loss"] < before["loss"] and 1 <= after["compression_rate"] <= 7


def test_a_new_adapter_is_unsure():
    """Guards the first updates: wrong at first, it should not say so with a trained model's
    certainty."""
    model, x = random_model(), torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    said = model.lm_head(new_adapter(ADAPTERS["layer"], model)(x, torch.arange(5))).softmax(-1)
    sure = model.logits(x).softmax(-1)
    assert torch.equal(said.argmax(-1), sure.argmax(-1))  # of its own it adds nothing yet
    assert (said.amax(-1) < 0.5 * sure.amax(-1)).all()


def tiny_target(architecture="layer", n=None, seed=0, loss="cross-entropy"):
    """A Target in memory, an adapter that fits it, a batch whose every third position is padding or
    not to be learned."""
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    model = random_model(seed=seed)
    vocabulary = None if n is None else torch.randperm(TINY.vocab_size,
                                                       generator=generator)[:n].sort().values
    adapter = random_weights(ADAPTERS[architecture](replace(TINY, num_hidden_layers=1)), seed + 1)
    ids = torch.randint(TINY.vocab_size, (3, 17), generator=generator)
    learn = torch.rand(3, 17, generator=generator) < 0.6
    return Target(model, 1, vocabulary, loss), adapter, ids, learn


def gradients(adapter, target, states, scale=1.0, autocast=None):
    """(gradients by name, sums) of a step on one or more batches that changes no weight."""
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    batches = states if isinstance(states, list) else [states]
    sums = take_step([(adapter, batch, scale) for batch in batches], target, optimizer, autocast)
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}, sums


@pytest.fixture
def unclipped(monkeypatch):
    """`gradients` are whole, however large."""
    monkeypatch.setattr(train_adapter, "CLIP", math.inf)


@pytest.mark.parametrize("architecture", ADAPTERS)
@pytest.mark.parametrize("n, kind", PAIRS)
def test_gradients_reach_the_adapter_alone(architecture, n, kind):
    """Guards the frozen target: a parameter of its that is trained, or one of the adapter's that is
    not."""
    target, adapter, *batch = tiny_target(architecture, n, loss=kind)
    gradients(adapter, target, target.states(*batch), autocast=torch.bfloat16)
    for name, p in adapter.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    assert not any(p.requires_grad or p.grad is not None for p in target.model.parameters())
    assert not target.head.requires_grad


def test_training_leaves_the_target_as_it_is(train, folder, monkeypatch):
    """Guards the frozen target: weights that share memory with the adapter's, as its final norm
    might."""
    models = []
    monkeypatch.setattr(train_adapter, "load_llama",
                        lambda *args: models.append(load_llama(*args)) or models[0])
    assert train("--vocabulary", 50, "--architecture", "layer")[0] == 0
    before = dict(load_llama(folder / "model").named_parameters())
    assert models and all(torch.equal(before[name], p) for name, p in models[0].named_parameters())


def direct(target, adapter, ids, learn, kind):
    """(loss, Σ min(p, q), agreement, count) in float64, in one piece, by the definition;
    differentiable."""
    model = copy.deepcopy(target.model).double()
    positions = torch.arange(ids.shape[1])
    x = model.run_layers(model.embed_tokens(ids), positions, None, 0, target.exit_layer)
    subset = torch.arange(TINY.vocab_size) if target.vocabulary is None else target.vocabulary
    whole = model(ids)[learn].softmax(-1)
    p, q = whole[:, subset], model.lm_head(adapter(x, positions)[learn])[:, subset].softmax(-1)
    overlap, best = torch.minimum(p, q).sum(-1), p.argmax(-1, keepdim=True)
    loss = {"cross-entropy": -p * q.log(), "reverse": q * (q / p).log(),
            "acceptance": -overlap.log(), "hard": -q.gather(-1, best).log()}[kind].sum()
    return loss, overlap.sum(), (subset[q.argmax(-1)] == whole.argmax(-1)).sum(), learn.sum()


@pytest.mark.parametrize("chunk", [1, 5, 512])
@pytest.mark.parametrize("architecture", ADAPTERS)
@pytest.mark.parametrize("n", [None, 20])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_is_what_it_is_called(monkeypatch, unclipped, kind, n, architecture, chunk):
    """Guards the loss in chunks: a chunk left out or counted twice, p renormalised over the subset,
    a wrong gradient."""
    monkeypatch.setattr(Target, "CHUNK", {"cpu": chunk})
    target, adapter, *batch = tiny_target(architecture, n, seed=3, loss=kind)
    exact = copy.deepcopy(adapter).double()
    expected = direct(target, exact, *batch, kind)
    (0.25 * expected[0]).backward()
    states = target.states(*batch)
    found, sums = gradients(adapter, target, states, scale=0.25)
    assert torch.allclose(sums, torch.stack([e.detach().double() for e in expected]), rtol=1e-5)
    assert torch.equal(sums[2:], torch.stack(expected[2:]).double())
    assert_close_gradients(found, exact)
    assert torch.equal(measure_batch(adapter, target, states), sums)


def assert_close_gradients(found, exact):
    for name, p in exact.named_parameters():
        assert torch.allclose(found[name].double(), p.grad, rtol=1e-3,
                              atol=1e-5 * p.grad.abs().max().item()), name


@pytest.mark.parametrize("chunk", [5, 512])
@pytest.mark.parametrize("n", [None, 20])
def test_the_text_is_learned_as_it_stands(monkeypatch, unclipped, n, chunk):
    """Guards --learn text: a token learned at the wrong position, by its id in place of its number
    in the vocabulary, or a layer of the target run in vain."""
    monkeypatch.setattr(Target, "CHUNK", {"cpu": chunk})
    target, adapter, ids, learn = tiny_target(n=n, seed=3)
    subset = torch.arange(TINY.vocab_size) if n is None else target.vocabulary
    learn = torch.isin(ids.roll(-1, 1), subset) & learn
    learn[:, -1] = False
    exact, model = copy.deepcopy(adapter).double(), copy.deepcopy(target.model).double()
    x = model.run_layers(model.embed_tokens(ids), torch.arange(17), None, 0, 1)
    q = model.lm_head(exact(x, torch.arange(17)))[:, :, subset].softmax(-1)
    rows, columns = learn.nonzero().T
    following = ids[rows, columns + 1]
    said = q[rows, columns, (subset == following[:, None]).int().argmax(-1)]
    right = subset[q[learn].argmax(-1)] == following
    expected = -said.log().sum(), said.sum(), right.sum(), learn.sum()
    (0.25 * expected[0]).backward()
    run_layers, depths = target.model.run_layers, []
    monkeypatch.setattr(target.model, "run_layers", lambda *args: depths.append(args[3:])
                        or run_layers(*args))
    text = TextTarget(target.model, 1, target.vocabulary)
    found, sums = gradients(adapter, text, text.states(ids, learn), scale=0.25)
    assert depths == [(0, 1)] and learn.sum() > 5
    assert torch.allclose(sums, torch.stack([e.detach().double() for e in expected]), rtol=1e-5)
    assert_close_gradients(found, exact)


@pytest.mark.parametrize("architecture", ADAPTERS)
def test_kept_states_take_half_the_memory(architecture):
    """Guards --passes: float32 states kept whole, or figures that suffer from their rounding."""
    target, adapter, ids, learn = tiny_target(architecture)
    target.model.lm_head.weight.data *= 4  # so that it is sure of something
    states = target.states(ids, learn)
    kept = in_half(states)
    assert isinstance(kept.goal, Distribution)
    assert 2 * kept.x.nbytes == states.x.nbytes and 2 * kept.goal.y.nbytes == states.goal.y.nbytes
    assert kept.learn is states.learn and kept.goal[1:] == states.goal[1:]
    whole, half = (measure_batch(adapter, target, s) for s in (states, kept))
    assert torch.allclose(whole, half, rtol=0.02) and not torch.equal(whole, half)


@pytest.mark.parametrize("n", [None, 20])
def test_logits_exist_a_chunk_at_a_time(monkeypatch, n):
    """Guards large vocabularies: the logits of a whole batch in memory at once, for the target or
    for the adapter."""
    monkeypatch.setattr(Target, "CHUNK", {"cpu": 5})
    rows, linear = [], torch.nn.functional.linear

    def counted(x, weight, *bias):
        if len(weight) in (n, TINY.vocab_size):
            rows.append(x.numel() // x.shape[-1])
        return linear(x, weight, *bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    target, adapter, *batch = tiny_target(n=n)
    gradients(adapter, target, target.states(*batch))
    assert max(rows) == 5 and sum(rows) == 3 * batch[1].sum()  # the target's, and those of p and q


def test_gradients_add_up_over_batches(unclipped):
    """Guards an update of several batches: gradients that replace those of the batch before, or
    that are added to those of the update before."""
    target, adapter, ids, learn = tiny_target()
    whole, sums = gradients(adapter, target, target.states(ids, learn), scale=0.1)
    rows = [target.states(ids[row:row + 1], learn[row:row + 1]) for row in range(3)]
    for _ in range(2):
        found, their_sums = gradients(adapter, target, rows, scale=0.1)
        assert torch.allclose(their_sums, sums, rtol=1e-5)
        for name, gradient in whole.items():
            assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5), name


def test_a_large_gradient_is_cut():
    """Guards the first updates of a run: one step of a wrong size throws an adapter far away."""
    target, adapter, *batch = tiny_target()
    found, _ = gradients(adapter, target, target.states(*batch), scale=1e4)
    norm = torch.cat([g.flatten() for g in found.values()]).norm()
    assert abs(norm - train_adapter.CLIP) < 1e-3


def test_padding_teaches_nothing():
    """Guards batches of unequal lengths: what stands behind a document changes its loss."""
    target, adapter, ids, learn = tiny_target()
    learn[:, 10:] = False
    padded, cut = ids.index_fill(1, torch.arange(10, 17), 0), (ids[:, :10], learn[:, :10])
    sums = [measure_batch(adapter, target, target.states(*batch))
            for batch in ((ids, learn), (padded, learn), cut)]
    assert torch.equal(sums[0], sums[1]) and torch.allclose(sums[0], sums[2], rtol=1e-6)


@pytest.mark.parametrize("architecture", ADAPTERS)
@pytest.mark.parametrize("strides", [[1], [2, 1], [8, 3, 5, 20]])
def test_the_adapter_decodes_as_it_was_trained(architecture, strides):
    """Guards the two ways to run an adapter, whole and from a cache: other positions, masks or
    residuals teach another model."""
    adapter = random_weights(ADAPTERS[architecture](replace(TINY, num_hidden_layers=1)),
                             5).double().requires_grad_(False)
    x = torch.randn(1, 150, TINY.hidden_size, generator=torch.Generator().manual_seed(6),
                    dtype=torch.float64)
    drafter = KangarooDrafter(random_model(), adapter, 1)
    config = replace(TINY, num_hidden_layers=1)
    drafter.adapter_cache, drafter.states, drafter.seen = KVCache.zeros(config, 200, 8, x), x, 0
    whole, end, i = adapter(x, torch.arange(150))[0], 0, 0
    while (end := end + strides[i % len(strides)]) <= 150:
        i += 1
        assert (drafter.adapt(end) - whole[end - 1]).abs().max() < 1e-10
    assert i >= 15
    assert (adapter(x, 2 * torch.arange(150))[0]
            - whole).abs().amax(-1)[1:].min() > 1e-3, "positions make no difference"


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


@pytest.mark.parametrize("vocabulary", [[], ["--vocabulary", 60]], ids=["all", "some"])
def test_first_the_text_then_the_target(train, tmp_path, monkeypatch, vocabulary):
    """Guards scarce compute: updates on the text that run the whole target, held-out figures of the
    text, an adapter that distillation cannot go on from."""
    passes, distribution = [], Target.distribution
    monkeypatch.setattr(Target, "distribution",
                        lambda *args: passes.append(0) or distribution(*args))
    args = ["--architecture", "layer", "--updates", 30, "--passes", 10, *vocabulary]
    status, err = train(*args, "--learn", "text", "--eval-every", 30)
    updates, (held_out,) = log_of(tmp_path / "out")
    assert status == 0 and updates[-1]["loss"] < 0.7 * updates[0]["loss"], err
    assert len(passes) == 1, "the whole target runs for the held-out documents alone"
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["training"]
    assert facts["learn"] == "text"
    assert train(*args, "--init", tmp_path / "out", "--lr", 1e-12, out="same")[0] == 0
    same = log_of(tmp_path / "same")[1][0]["held_out"]  # but for the saved weights' bfloat16
    assert same == pytest.approx(held_out["held_out"], rel=0.02)
    assert train(*args, "--init", tmp_path / "out", out="then")[0] == 0
    after = log_of(tmp_path / "then")[1][0]["held_out"]
    assert after["loss"] < held_out["held_out"]["loss"]
    facts = json.loads((tmp_path / "then" / "config.json").read_text())["training"]
    assert facts["learn"] == "target" and facts["init"]["learn"] == "text"


def test_training_sees_no_held_out_document(train, folder, monkeypatch):
    """Guards the figures on held-out data: a document of theirs that is trained on."""
    path, seen = folder / "many.txt", []
    path.write_text("\n\n".join(f"{i} {TEXT[i % 4]}" for i in range(500)))
    real = training_text.Windows
    monkeypatch.setattr(training_text, "Windows",
                        lambda documents, *args: seen.append(documents) or real(documents, *args))
    assert train("--updates", 1, "--vocabulary", 20, data="many.txt")[0] == 0
    assert len(seen) == 2  # the vocabulary's and the training's
    assert all(480 < len(documents) < 500 and not any(map(is_held_out, documents))
               for documents in seen)


def test_too_few_documents_to_hold_one_out(train, tmp_path):
    """Guards the figures on held-out data: a document that was trained on, without a word."""
    path = tmp_path / "few.txt"
    path.write_text("\n\n".join(t for i in range(30)
                                if not is_held_out(t := f"{i} {sentences(i, 3)}")))
    status, err = train("--data", path)
    assert status == 0 and " 0 held out (too few" in err, err
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["training"]
    assert facts["held_out_documents"] == 0 and facts["documents"] == path.read_text().count(
        "\n\n") + 1


def test_a_window_of_too_few_batches_is_passed_over():
    """Guards a long run: it ends after hours, because the documents of one window are shorter than
    those of the others."""
    args = Namespace(window=2, batches=2, batch_tokens=9, passes=1, seed=0)
    documents = [6, 6, 2, 2]  # tokens; the two short ones share a batch
    windows = Windows(documents, 2, 0, lambda n: ([1] * n, [True] * n)).numbered(0, 0)
    stream = train_adapter.updates(windows, args, Namespace(states=lambda *_: 0))
    seen = [next(stream)[0][0] for _ in range(20)]
    assert seen == sorted(set(seen)) and 20 < seen[-1] < 40


def test_workers_encode_the_same_windows():
    """Guards --workers: windows out of order, left out or seen twice, or a document that cannot be
    encoded told with a worker's traceback."""
    def encode(document):
        if document == 10:
            raise UserError("chat_template.jinja: the chat template says: no")
        return [document], [True]

    for first, n in (0, 3), (2, 3), (0, 7):
        windows = [islice(Windows(range(n), 2, 5, encode).numbered(first, workers), 9)
                   for workers in (0, 2)]
        assert list(windows[0]) == list(windows[1])
    with pytest.raises(UserError, match="^chat_template.jinja: the chat template says: no$"):
        list(islice(Windows(range(11), 2, 5, encode).numbered(0, 2), 9))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_rank_alone_computes_the_states_of_a_batch(ranks):
    """Guards the time of several processes: the target's pass, by far the dearest part, made again
    by each process that meets a batch in a later pass. And what an update sees must not depend on
    their number."""
    args = Namespace(window=11, batches=4, batch_tokens=5, passes=3, seed=0)  # 2 groups, 3 left
    computed, updates = [], []

    def states(ids, learn):
        computed.append(ids[0, 0].item())
        return States(ids, learn, NextTokens(ids[0]))

    for rank in range(ranks):
        windows = Windows(range(11), 11, 0, lambda i: ([i] * 5, [True] * 5)).numbered(0, 0)
        stream = train_adapter.updates(windows, args, Namespace(states=states), rank=rank,
                                       ranks=ranks)
        updates.append([{s.x[0, 0].item() for s in next(stream)[1]} for _ in range(6)])
    assert len(computed) == len(set(computed)) > 8  # those left over in one pass come in another
    together = [set().union(*parts) for parts in zip(*updates)]
    assert all(len(update) == 4 for update in together)
    assert all(not together[i] & together[i + 1] for i in (0, 2, 4))
    assert together[:2] != together[2:4] != together[4:]


# --------------------------------------------------------------------------------------------------
# Resuming, several processes

LONG = ["--updates", 12, "--passes", 2, "--save-every", 3, "--window", 20, "--batch-tokens", 300]


@pytest.fixture(scope="module")
def killed(folder):
    """(the folder of an uninterrupted run, the folder of one that was killed after its first
    checkpoint)."""
    assert train_adapter.main(words(folder, folder / "one go", *LONG)) == 0
    out = folder / "killed"
    # Decoding many prompts after each update leaves seconds in which to kill it.
    args = words(folder, out, *LONG, "--eval-every", 1, "--eval-prompts", 40)
    command, env = [sys.executable, SCRIPT, *args], os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "stderr", "w") as err, subprocess.Popen(command, stderr=err,
                                                               env=env) as process:
        while not (out / "checkpoint.pt").exists():
            assert process.poll() is None, (folder / "stderr").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return folder / "one go", out


@pytest.fixture
def resumable(killed, tmp_path):
    """A copy of the killed run's folder where `train` writes."""
    return shutil.copytree(killed[1], tmp_path / "out")


def test_a_killed_run_resumes_exactly(train, killed, resumable):
    """Guards --resume: optimizer, order, place in a window or learning rate lost; a log with steps
    doubled or half written."""
    state = torch.load(resumable / "checkpoint.pt", weights_only=True)
    assert 3 <= state["step"] < 12 and state["update"] > 0, "not killed inside a window"
    assert not (resumable / "adapter.safetensors").exists()
    with open(resumable / "log.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 9}\n{"step": 6, "lo')
    status, err = train(*LONG, "--resume", "--eval-every", 1)
    assert status == 0, err
    assert same_weights(resumable, killed[0])
    updates, held_out = log_of(resumable)
    assert [line["step"] for line in updates] == [*range(1, 13)]
    assert [line["step"] for line in held_out] == [*range(1, 13)]  # none missing, none twice
    assert [line["loss"] for line in updates] == [line["loss"] for line in log_of(killed[0])[0]]
    assert not list(resumable.glob("*.tmp"))


def stop_at(last, train, monkeypatch, signals=(signal.SIGINT,)):
    """Train until signals come in update `last`, between two checkpoints; (exit status, stderr)."""
    step, seen = train_adapter.take_step, []

    def stop(*args):
        seen.append(0)
        if len(seen) == last:
            for number in signals:
                signal.raise_signal(number)
        return step(*args)

    before = {number: signal.signal(number, signal.default_int_handler) for number in signals}
    with monkeypatch.context() as patch:
        patch.setattr(train_adapter, "take_step", stop)
        result = train()
    for number, handler in before.items():
        assert signal.signal(number, handler) is signal.default_int_handler, "left behind"
    return result


def test_a_stopped_run_on_the_text_resumes_exactly(train, tmp_path, monkeypatch):
    """Guards --resume of --learn text: its place, its documents or its optimizer lost."""
    args = [*LONG, "--learn", "text", "--vocabulary", 60]
    assert train(*args, out="one go")[0] == 0
    assert stop_at(8, lambda: train(*args), monkeypatch)[0] == 130
    assert train(*args, "--resume")[0] == 0
    assert same_weights(tmp_path / "out", tmp_path / "one go")
    assert log_of(tmp_path / "out")[0][-1]["loss"] == log_of(tmp_path / "one go")[0][-1]["loss"]


def test_a_finished_run_resumes_to_the_same(train, killed, tmp_path):
    """Guards --resume of a run that was stopped between its last checkpoint and its adapter."""
    out = shutil.copytree(killed[0], tmp_path / "out")
    (out / "adapter.safetensors").unlink()
    status, err = train(*LONG, "--resume")
    assert status == 0 and same_weights(out, killed[0]), err


def test_another_seed_gives_another_adapter(train, killed, tmp_path):
    """Guards the comparisons here: adapters that are equal because nothing was trained."""
    assert train(*LONG, "--seed", 1)[0] == 0
    assert not same_weights(tmp_path / "out", killed[0])


@pytest.mark.parametrize("option, value", [("--lr", 0.02), ("--passes", 3),
                                           ("--loss", "acceptance"), ("--vocabulary", 60),
                                           ("--batches", 1), ("--architecture", "layer"),
                                           ("--seed", 7), ("--updates", 13), ("--chat", "chatml"),
                                           ("--dtype", "bfloat16"), ("--learn", "text")])
def test_other_options_are_refused_on_resuming(refused, resumable, option, value):
    """Guards --resume: a run that goes on with other options and equals neither run."""
    refused(["checkpoint.pt", option, str(value)], *LONG, option, value, "--resume")


def test_other_documents_are_refused_on_resuming(refused, resumable, tmp_path):
    """Guards --resume: a run that goes on with as many other documents, at a place that means
    nothing there."""
    (tmp_path / "chats.json").write_text(
        json.dumps([share_gpt(i + 1000 * (i == 7)) for i in range(40)]))
    refused(["checkpoint.pt", "--data"], *LONG, "--resume", "--data", tmp_path / "chats.json")


def test_another_beginning_is_refused_on_resuming(refused, resumable, adapter):
    """Guards config.json: an adapter that tells of another --init than the one it was begun
    from."""
    refused(["checkpoint.pt", "--init"], *LONG, "--resume", "--init", adapter)


def test_what_it_began_from_may_move(train, adapter, tmp_path, monkeypatch):
    """Guards --resume with --init: compared by its name, or needed though the checkpoint has it."""
    begin = shutil.copytree(adapter, tmp_path / "begin")
    monkeypatch.chdir(tmp_path)
    args = [*LONG, "--init", begin]
    assert train(*args, out="one go")[0] == 0
    assert stop_at(2, lambda: train(*args), monkeypatch)[0] == 130
    assert stop_at(2, lambda: train(*LONG, "--resume", "--init", "begin"), monkeypatch)[0] == 130
    shutil.rmtree(begin)
    assert train(*args, "--resume")[0] == 0 and same_weights(tmp_path / "out", tmp_path / "one go")
    facts = [json.loads((tmp_path / out / "config.json").read_text())["training"]["init"]
             for out in ("out", "one go")]
    assert facts[0] == facts[1] and facts[0]["updates"] == 30


def test_another_model_is_refused_on_resuming(refused, resumable, tmp_path):
    """Guards --resume: a half-trained adapter trained on for another model of the same shape."""
    write_model(tmp_path / "other", seed=1)
    refused(["checkpoint.pt", "--model"], *LONG, "--resume", "--model", tmp_path / "other")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing", "other"])
def test_a_damaged_checkpoint_is_refused(refused, resumable, damage):
    """Guards --resume: a traceback, or a new start without a word, where the checkpoint is not
    one."""
    path = resumable / "checkpoint.pt"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:len(data) // 2], "text": b"no checkpoint"}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    elif damage == "other":
        torch.save({"weights": {}}, path)
    refused("checkpoint.pt", *LONG, "--resume")


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json"])
def test_a_run_is_not_overwritten(refused, train, tmp_path, monkeypatch, name):
    """Guards a long run: lost because the same command line was given again without --resume; or
    an adapter, or any model, in the folder that is named. If it may be lost, --resume must not go
    on from it."""
    (tmp_path / "out").mkdir()
    for file in (name, "log.jsonl"):
        (tmp_path / "out" / file).write_text('{"step": 7}')
    refused([name, "--out", "--resume", "--overwrite"])
    assert all(file.read_text() == '{"step": 7}' for file in (tmp_path / "out").iterdir())
    monkeypatch.setattr(train_adapter, "take_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("--overwrite")
    assert (tmp_path / "out" / "log.jsonl").read_text() == ""
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_two_trainings_do_not_share_a_folder(refused, tmp_path, monkeypatch):
    """Guards --out: two runs that write one log and one checkpoint."""
    (tmp_path / "out").mkdir()
    other = os.open(tmp_path / "out", os.O_RDONLY)
    assert files.lock(other)
    refused(["--out", "another training"])
    os.close(other)


def test_a_full_disk_keeps_the_last_checkpoint(train, killed, tmp_path, monkeypatch):
    """Guards a long run: half a checkpoint that stays, and keeps the disk full, so that not even
    --resume begins; or that of a kill."""
    save = train_adapter.save_checkpoint

    def full(*args):
        if args[-1]["step"] == 6:
            monkeypatch.setattr(os, "fsync", no_space)
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_adapter, "save_checkpoint", full)
        status, err = train(*LONG)
    assert status == 2 and err.endswith("checkpoint.pt: cannot be written (No space left on "
                                        "device); the one before is kept\n")
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint.pt", "log.jsonl"}
    (tmp_path / "out" / "checkpoint.pt.0123abcd.tmp").touch()  # of a kill
    assert train(*LONG, "--resume")[0] == 0 and same_weights(tmp_path / "out", killed[0])
    assert not list((tmp_path / "out").glob("*.tmp"))


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_of_two_writers_the_later_wins(tmp_path, monkeypatch):
    """Guards two programs that write one file: one that fails, or half of each; and who may read
    the file."""
    path, fsync = tmp_path / "results.json", os.fsync

    def meanwhile(file):
        monkeypatch.setattr(os, "fsync", fsync)
        files.write_atomically(path, b"the other's")
        path.chmod(0o640)
        assert path.read_bytes() == b"the other's"

    monkeypatch.setattr(os, "fsync", meanwhile)
    files.write_atomically(path, b"mine")
    (tmp_path / "new").touch()
    assert path.read_bytes() == b"mine" and path.stat().st_mode == (tmp_path / "new").stat().st_mode
    path.chmod(0o640)
    files.write_atomically(path, b"mine")
    assert path.stat().st_mode & 0o777 == 0o640 and len(list(tmp_path.iterdir())) == 2


def torchrun(args, script=SCRIPT):
    """Run the script with torchrun, in two processes; returns its exit status and what each of them
    wrote to stderr."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    log = Path(args[args.index("--out") + 1]).with_name("ranks")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr",
        "127.0.0.1", "--master-port", port, "--log-dir", log, "--redirects", "3", script, *args
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                        "PYTHONPATH": str(SCRIPT.parent)}
    status = subprocess.run(command, capture_output=True, timeout=120, env=env).returncode
    return status, [path.read_text() for path in sorted(log.rglob("stderr.log"))]


def test_two_processes_train_the_same_adapter(train, folder, tmp_path):
    """Guards several GPUs: gradients averaged over batches instead of tokens, batches seen twice,
    files written by both."""
    args = "--updates", 6, "--batches", 4, "--batch-tokens", 300, "--passes", 2, "--save-every", 2
    status, errors = torchrun(words(folder, tmp_path / "two", *args))
    assert status == 0, errors
    assert train(*args)[0] == 0
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                for name in ("out", "two"))
    assert one["tokens"] == two["tokens"]
    for name, weight in one["weights"].items():
        assert torch.allclose(weight, two["weights"][name], rtol=1e-3, atol=1e-5), name
    assert [line["step"] for line in log_of(tmp_path / "two")[0]] == [*range(1, 7)]


STOPPED = """
import os, sys
import torch
torch.set_num_threads(1)
import train_adapter
save = train_adapter.save_checkpoint

def save_and_die(path, module, optimizers, state):
    save(path, module, optimizers, state)
    if state["step"] == 10:
        os._exit(9)

train_adapter.save_checkpoint = save_and_die
sys.exit(train_adapter.main(sys.argv[1:]))
"""


@pytest.mark.skipif(PROFILE != "thorough", reason="half a minute: HYPOTHESIS_PROFILE=thorough")
def test_two_processes_resume_in_a_later_epoch(folder, tmp_path):
    """Guards --resume: another order of documents in the second epoch, another batch for each
    process, a pass begun anew."""
    (tmp_path / "stopped.py").write_text(STOPPED)
    args = ["--updates", 14, "--batches", 2, "--batch-tokens", 300, "--passes", 3, "--window", 6,
            "--save-every", 5]
    assert torchrun(words(folder, tmp_path / "one go", *args))[0] == 0
    out = words(folder, tmp_path / "out", *args)
    assert torchrun(out, script=tmp_path / "stopped.py")[0] != 0
    state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 10 and state["window"] > 0
    status, errors = torchrun([*out, "--resume"])
    assert status == 0, errors
    assert same_weights(tmp_path / "out", tmp_path / "one go")


def test_if_one_process_fails_all_end(folder, tmp_path):
    """Guards several processes: one that waits for ever, or ends in a traceback, because another
    could not write."""
    (tmp_path / "out" / "log.jsonl").mkdir(parents=True)
    status, errors = torchrun(words(folder, tmp_path / "out", "--save-every", 1, "--updates", 500))
    assert status != 0 and len(errors) == 2 and not any("Traceback" in error
                                                        for error in errors), errors
    assert re.search(r"train_adapter\.py: [^\n]*Is a directory: '[^\n]*log\.jsonl'\n$", errors[0])
    assert not errors[1] or re.fullmatch(  # if it is empty, torchrun was faster
        r"train_adapter\.py: process 1 stops, because another one has \([^\n]+\)\n", errors[1])


@pytest.mark.parametrize("words", [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:9",
    "NCCL communicator was aborted on rank 1.",
    "NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network error\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely.",
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed.",
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(OpType=ALLREDUCE)"])
def test_a_dead_peer_is_told_in_one_line(monkeypatch, words):
    """Guards several GPUs: NCCL says it in other words than gloo, and they ended in a traceback;
    and any other RuntimeError is a bug, whose traceback is needed."""
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"^process 1 stops, because another one has \([^\n]+\)$"):
        with end_together():
            raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="shapes"), end_together():
        raise RuntimeError("shapes do not fit")


SLOW = """
import datetime, sys, time
import torch
torch.set_num_threads(1)
import train_adapter
from support import processes
processes.TIMEOUT = datetime.timedelta(seconds=3)
evaluate = train_adapter.Training.evaluate
train_adapter.Training.evaluate = lambda self: time.sleep(5) or evaluate(self)
sys.exit(train_adapter.main(sys.argv[1:]))
"""


def test_an_evaluation_may_outlast_the_timeout(folder, tmp_path):
    """Guards several processes: the others wait in a collective while the first evaluates, whose
    timeout then ends the run, with a traceback and without a checkpoint."""
    (tmp_path / "slow.py").write_text(SLOW)
    args = words(folder, tmp_path / "out", "--updates", 2, "--eval-every", 1)
    status, errors = torchrun(args, script=tmp_path / "slow.py")
    assert status == 0, errors
    assert (tmp_path / "out" / "adapter.safetensors").exists()
    assert [line["step"] for line in log_of(tmp_path / "out")[1]] == [1, 2]


def test_it_saves_before_it_evaluates(train, tmp_path, monkeypatch):
    """Guards hours of training against an evaluation that fails."""
    def fail(*args):
        raise UserError("the evaluation fails")
    monkeypatch.setattr(train_adapter.Training, "evaluate", fail)
    status, err = train("--updates", 3, "--eval-every", 2, "--save-every", 2)
    assert status == 2 and err.endswith("the evaluation fails\n")
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 2


@pytest.mark.filterwarnings("ignore:for .*no-op")
def test_a_resumed_optimizer_counts_on_the_cpu(tmp_path):
    """Guards a GPU against a sync for each weight in each update: AdamW's step counts there too if
    the checkpoint is read to the device."""
    module = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    train_adapter.save_checkpoint(tmp_path / "c.pt", module, [optimizer], {"options": {}})
    module = torch.nn.Linear(3, 3, device="meta")  # stands in for a GPU
    optimizer = torch.optim.AdamW(module.parameters())
    train_adapter.load_checkpoint(tmp_path / "c.pt", module, [optimizer], {})
    for state in optimizer.state.values():
        assert state["step"].device.type == "cpu" and state["step"].item() == 1
        assert state["exp_avg"].device.type == "meta"


@pytest.mark.parametrize("rank", "01")
@pytest.mark.parametrize("args, part", [(["--batches", 3], "--batches 3"),
                                        (["--max-length", 2], "--max-length 2"),
                                        (["--window", 1], "--window 1")])
def test_all_processes_find_the_same_fault(train, monkeypatch, tmp_path, rank, args, part):
    """Guards several processes: one that waits for another which has stopped, and says nothing."""
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(processes.dist, name, lambda *args, **more: None)
    status, err = train(*args)
    assert status == 2 and err.splitlines()[-1].startswith(
        f"train_adapter.py: {part}: ") and "Traceback" not in err
    assert not list((tmp_path / "out").iterdir())


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


# --------------------------------------------------------------------------------------------------
# The adapter

@pytest.fixture(scope="module", params=["attention", "layer"])
def adapter(request, folder):
    """The folder of a trained adapter, `layer` with a vocabulary of 60 tokens."""
    architecture, more = request.param, ["--vocabulary", 60] * (request.param == "layer")
    out = folder / f"adapter {architecture}"
    assert train_adapter.main(
        words(folder, out, "--architecture", architecture, *more, "--updates", 30, "--passes",
              10)) == 0
    return out


def decode(folder, adapter, *args):
    return start.main([
        str(word) for word in [
            "--model", folder / "model", "--adapter", adapter, "--device", "cpu", "--dtype",
            "float32", "--prompt", TEXT[0], "--max-new-tokens", 40, "--chat", "zephyr", *args
        ]
    ])


@pytest.mark.parametrize("sampling", [[], ["--temperature", 0.8, "--top-p", 0.9]],
                         ids=["greedy", "sampled"])
def test_a_trained_adapter_decodes_losslessly(folder, adapter, capfd, sampling):
    """Guards what training is for: an adapter that kangaroo.py cannot load, or that changes the
    text."""
    assert decode(folder, adapter, "--compare", "--threshold", 0, *sampling) == 0
    out, err = capfd.readouterr()
    assert "\nidentical to vanilla" in err and "drafted tokens accepted" in err
    assert "exit layer 1" in err


def test_the_saved_adapter_is_the_trained_one(folder, adapter):
    """Guards saving: weights under wrong names, of another step, or without the facts that decoding
    goes by."""
    data = json.loads((adapter / "config.json").read_text())
    trained = torch.load(adapter / "checkpoint.pt", weights_only=True)["weights"]
    loaded = load_adapter(adapter, load_llama(folder / "model"))
    for name, weight in trained.items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16().float()), name
    assert type(loaded) is ADAPTERS[data["architecture"]] and loaded.exit_layer == 1
    assert data["training"]["updates"] == 30 and data["chat_template"] == "zephyr"
    if loaded.head is not None:
        assert len(loaded.head.vocabulary) == 60 and 2 in loaded.head.vocabulary
        assert 0 < data["training"]["vocabulary_coverage"] <= 1


def test_training_begins_from_another_adapter(folder, adapter, tmp_path):
    """Guards --init: fresh weights all the same, another architecture, or where it came from
    forgotten."""
    assert train_adapter.main(
        words(folder, tmp_path, "--init", adapter, "--updates", 1, "--lr", 1e-12)) == 0
    started, ended = (load_file(out / "adapter.safetensors") for out in (adapter, tmp_path))
    assert all(torch.equal(started[name], weight) for name, weight in ended.items())
    before, after = (json.loads((out / "config.json").read_text()) for out in (adapter, tmp_path))
    assert after["architecture"] == before["architecture"] and after["training"]["init"] == before[
        "training"]
    assert before["training"]["init"] is None


def test_drafts_come_from_the_vocabulary(folder, tmp_path):
    """Guards a smaller vocabulary: drafts by their number in it instead of their id, from outside
    of it, or not the likeliest."""
    assert train_adapter.main(words(folder, tmp_path, "--vocabulary", 60)) == 0
    model = load_llama(folder / "model")
    adapter = load_adapter(tmp_path, model)
    head, vocabulary, drafted = adapter.head, adapter.head.vocabulary, 0

    def watched(x):
        logits, subset = head(x), model.lm_head(x)[:, vocabulary]
        assert logits.shape == (1, 340) and logits.argmax() == vocabulary[subset.argmax()]
        assert torch.equal(logits.isfinite().nonzero()[:, 1], vocabulary)
        assert torch.allclose(logits.softmax(-1).max(), subset.softmax(-1).max())
        return logits

    for prompt in ([1, 5, 9], [1, 300, 7, 320]):
        for round_ in generate(
                model, KangarooDrafter(model, adapter, 1, 0, watched), prompt, 40):
            drafted += len(round_.draft.tokens)
            assert set(round_.draft.tokens) <= set(vocabulary.tolist())
    assert drafted > 50


def test_training_begins_from_an_untrained_adapter(train, tmp_path):
    """Guards --init random, which has no config.json: found out after the last update, with nothing
    saved."""
    assert train("--init", "random", "--updates", 1)[0] == 0
    assert json.loads(
        (tmp_path / "out" / "config.json").read_text())["training"]["init"] == "random"


def test_an_adapter_of_another_model_is_refused(folder, adapter, tmp_path, capfd):
    """Guards against a slow mispairing: a model of the same shape with other weights, with which
    nothing would be accepted."""
    write_model(tmp_path / "model", seed=1)
    assert decode(tmp_path, adapter) == 2
    assert re.fullmatch(r"kangaroo\.py: [^\n]*another model[^\n]*\n", capfd.readouterr().err)


@pytest.mark.parametrize("architecture", ["mamba", ["layer"], 1])
def test_an_unknown_architecture_is_refused(folder, adapter, tmp_path, capfd, architecture):
    """Guards an adapter of a later version: run as another architecture, or a traceback."""
    copied = shutil.copytree(adapter, tmp_path / "adapter")
    data = json.loads((copied / "config.json").read_text()) | {"architecture": architecture}
    (copied / "config.json").write_text(json.dumps(data))
    assert decode(folder, copied) == 2
    assert re.fullmatch(r"kangaroo\.py: [^\n]*architecture = [^\n]*attention, layer\n",
                        capfd.readouterr().err)


@pytest.mark.parametrize("vocabulary", [[0, 340], [-1, 5], [], [[1, 2]], [0.5, 1]])
def test_a_damaged_vocabulary_is_refused(folder, adapter, tmp_path, capfd, vocabulary):
    """Guards --vocabulary's tensor: ids that no row of the LM head belongs to, or none."""
    copied = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(copied / "adapter.safetensors")
    tensors["vocabulary"] = torch.tensor(vocabulary)
    save_file({name: t.float() for name, t in tensors.items()}, copied / "adapter.safetensors")
    assert decode(folder, copied) == 2
    assert re.fullmatch(r"kangaroo\.py: [^\n]*vocabulary must be [^\n]*\n", capfd.readouterr().err)


def test_a_model_answers_by_itself(folder, tmp_path, capsys):
    """Guards models/own_answers.py: answers unlike those that decoding gives, to other prompts, or
    in a form nobody reads."""
    model, eos = load_llama(folder / "model"), (
        2, *range(3, 120))  # so many that answers end at different lengths
    model.config = replace(model.config, eos_token_ids=eos)
    prompts = torch.randint(130, 340, (6, 9), generator=torch.Generator().manual_seed(0)).tolist()
    found = own_answers.answers(model, prompts, 30)
    assert found == [[
        token
        for round_ in generate(model, kangaroo.NoDrafter(model), prompt, 30, eos=eos)
        for token in round_.tokens
    ]
                     for prompt in prompts]
    assert len(set(map(len, found))) > 2
    model.config = replace(model.config, max_position_embeddings=20, eos_token_ids=())
    assert own_answers.answers(model, prompts[:1], 30) == [[
        token for round_ in generate(model, kangaroo.NoDrafter(model), prompts[0], 30)
        for token in round_.tokens
    ]], "beyond the context"
    own_answers.main([
        str(word) for word in [
            "--model", folder / "model", "--data", folder / "chats.json", "--out", tmp_path
            / "own.jsonl", "--batch", 2, "--max-new-tokens", 20, "--device", "cpu", "--dtype",
            "float32"
        ]
    ])
    asked = {document[0] for document in read_documents(folder / "chats.json")}
    answered = {document[0] for document in read_documents(tmp_path / "own.jsonl")}
    assert answered and answered <= asked


# --------------------------------------------------------------------------------------------------
# Errors a user makes

@pytest.mark.parametrize("args, parts",
                         [(["--model", "nowhere"], ["nowhere", "--model"]),
                          (["--exit-layer", 4], ["--exit-layer 4", "4 layers"]),
                          (["--exit-layer", -1], "--exit-layer -1"),
                          (["--exit-layer", "two"], "--exit-layer"),
                          (["--updates", 0], "--updates 0"),
                          (["--loss", "mse"], ["--loss mse", *LOSSES]),
                          (["--learn", "all"], ["--learn all", "target, text"]),
                          (["--architecture", "mlp"], ["mlp", "layer"]),
                          (["--max-length", 601], ["--max-length 601", "--batch-tokens 600"]),
                          (["--passes", 0], "--passes 0"), (["--window", 1], "--window 1"),
                          (["--workers", -1], "--workers -1"),
                          (["--vocabulary", 0], "--vocabulary 0"),
                          (["--vocabulary", -5], "--vocabulary -5"),
                          (["--vocabulary", 341], ["--vocabulary 341", "340"]),
                          (["--eval-documents", 0], "--eval-documents 0"),
                          (["--eval-prompts", -1], "--eval-prompts -1"), (["--lr", -1], "--lr -1"),
                          (["--lr", "nan"], "--lr nan"),
                          (["--architecture", "medusa"], ["--architecture medusa",
                                                          "drafters/train_medusa.py"]),
                          (["--learn", "text", "--loss", "hard"], ["--loss hard", "--learn text"]),
                          (["--chat", "alpaca"], ["--chat alpaca", "chatml"]),
                          (["--init", "nowhere"], "nowhere"), (["--dtype", "int8"], "--dtype int8"),
                          (["--device", "tpu"], "--device tpu"), (["--colour"], "--colour"),
                          (["--max-length", 2], "--max-length 2"),
                          (["--seed", 2 ** 64], "--seed 18446744073709551616"),
                          (["--resume"], ["--resume", "checkpoint.pt"]),
                          (["--lr", 1e30], ["--lr 1e+30", "--dtype"])])
def test_a_wrong_option_is_refused(train, args, parts):
    """Guards a user's mistake: a traceback, a line that does not name the option, or hours of
    training for something else."""
    status, err = train(*args)
    lines = err.splitlines()
    assert status == 2 and lines[-1].startswith(
        "train_adapter.py: ") and "Traceback" not in err, err
    assert all(part in lines[-1] for part in ([parts] if isinstance(parts, str) else parts)), err


def test_weights_that_are_not_finite_are_not_saved(train, tmp_path):
    """Guards a run that diverges: hours more of NaN, and an adapter of NaN in place of the last
    good checkpoint."""
    status, err = train("--lr", 1e30, "--save-every", 1)
    weights = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["weights"]
    assert status == 2 and not (tmp_path / "out" / "adapter.safetensors").exists(), err
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_saves_and_says_how_to_go_on(train, killed, tmp_path, monkeypatch, number):
    """Guards Ctrl-C and SIGTERM: a traceback, or a promise of a checkpoint where there is none. A
    closed terminal ends nothing; torchrun may send a signal twice."""
    status, err = stop_at(2, lambda: train(*LONG), monkeypatch, [signal.SIGHUP, number, number])
    assert status == 128 + number and err.endswith(
        "\ninterrupted after update 2, --resume goes on from there\n")
    if number == signal.SIGTERM:
        assert train(*LONG, "--resume")[0] == 0
        assert same_weights(tmp_path / "out", killed[0])


def test_nobody_need_read_the_progress(train, tmp_path, monkeypatch):
    """Guards hours of training: ended by a closed terminal, `| head` or a full disk."""
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    assert train()[0] == 0 and (tmp_path / "out" / "adapter.safetensors").exists()


def test_a_second_interruption_does_not_wait(train, tmp_path, monkeypatch):
    """Guards Ctrl-C: a user who waits for an update of minutes; a promise of what is not there."""
    monkeypatch.setattr(progress.Interruption, "PATIENCE", -1)
    status, err = stop_at(2, train, monkeypatch, [signal.SIGINT] * 2)
    assert status == 130 and err.endswith("\ninterrupted\n")
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_progress_stays_on_one_line_of_a_terminal(tmp_path, monkeypatch):
    """Guards the progress line: wider than the terminal it cannot be rewritten, and each update
    leaves a line behind."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = train_adapter.Progress(tmp_path / "log.jsonl", 3)
    for step in (1, 2, 3):
        progress.report(step, {"loss": 1.0, "acceptance": 0.5, "agreement": 0.5}, 100)
    _, *live, last = sys.stderr.getvalue().split("\r\033[K")
    bars = ["█" * n + "░" * (10 - n) for n in (3, 6, 10)]
    assert [line[:10] for line in live] == bars[:2] and all(len(line) == 49 for line in live)
    assert last.startswith(bars[2]) and last.count("\n") == 1


@pytest.mark.parametrize("name", ["out", "out/deeper"])
def test_a_file_in_place_of_the_folder_is_refused(refused, tmp_path, name):
    """Guards --out: a traceback where a file is in the way."""
    (tmp_path / "out").write_text("a file")
    refused(["--out", "out"], out=name)


def test_a_required_option_is_missed(capfd):
    """Guards the parser: its usage text and SystemExit in place of one line."""
    assert train_adapter.main(["--model", "m"]) == 2
    err = capfd.readouterr().err
    assert re.fullmatch(r"train_adapter\.py: [^\n]+\n", err) and "--data" in err


def test_prompts_beyond_the_context_are_no_crash(train, tmp_path):
    """Guards evaluations: prompts longer than the context leave nothing to decode, or to divide
    by."""
    prompt = next(p for i in range(1000) if is_held_out(p := f"{i} {sentences(0, 90)}"))
    chats = [share_gpt(i) for i in range(40)]
    kept = [chat for chat in chats if not is_held_out(chat["conversations"][0]["value"])]
    long = {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": "Yes."}]}
    (tmp_path / "data.json").write_text(json.dumps([long, *kept]))
    status, err = train("--data", tmp_path / "data.json")
    assert status == 0 or status == 2 and "held-out" in err.splitlines()[-1], err
