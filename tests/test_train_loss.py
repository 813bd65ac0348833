"""What an adapter learns from a batch, in memory: the losses, their gradients, and that it decodes
as it was trained."""
import copy
import math
from dataclasses import replace

import train_adapter
from drafters.adapters import ADAPTERS, new_adapter
from kangaroo import KangarooDrafter
from llama import KVCache
from train_adapter import (
    LOSSES,
    Distribution,
    Target,
    TextTarget,
    in_half,
    measure_batch,
    take_step,
)

import pytest
import torch
from helpers import TINY, random_model, random_weights


def test_a_new_adapter_is_unsure():
    """Guards the first updates: wrong at first, it should not say so with a trained model's
    certainty."""
    model, x = random_model(), torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    said = model.lm_head(new_adapter(ADAPTERS["layer"], model)(x, torch.arange(5))).softmax(-1)
    sure = model.logits(x).softmax(-1)
    assert torch.equal(said.argmax(-1), sure.argmax(-1))  # of its own it adds nothing yet
    assert (said.amax(-1) < 0.5 * sure.amax(-1)).all()


PAIRS = list(zip([None, 20, 20, None], LOSSES))  # --vocabulary and --loss


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
