"""Sampling: the law, the noise, the filters, ties."""
import copy
from dataclasses import replace

from drafters.lookup import PromptLookupDrafter
from kangaroo import KangarooDrafter, NoDrafter, generate
from llama import Sampler, gumbel_noise
from support.errors import UserError

import pytest
import torch
from helpers import DEVICES, TINY, NoisyAdapter, examples, random_adapter, random_model
from hypothesis import given
from hypothesis import strategies as st


def critical_chi_square(freedom, z=3.72):
    """The value that chi-square exceeds with probability 1e-4 (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3


LAWS = [(1.0, 0, 1.0), (0.7, 4, 0.9), (1.0, 3, 1.0), (1.5, 0, 0.8)]  # temperature, top-k, top-p


class Biased(Sampler):
    """Its noise is a little too small, so likely tokens come too often."""

    def __init__(self, *args):
        super().__init__(*args)
        unbiased = self.noise
        self.noise = lambda *args: 0.4 * unbiased(*args)


def misfit(counts, probabilities):
    """Chi-square of counts against probabilities ÷ the value that it exceeds once in 10,000."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0, "an excluded token was drawn"
    expected = probabilities[possible].double() * counts.sum()
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum().item()
    return chi_square / critical_chi_square(int(possible.sum()) - 1)


@pytest.mark.parametrize("temperature, top_k, top_p", LAWS)
def test_the_law_of_a_choice(temperature, top_k, top_p):
    """4,000 choices of one token of 12 against the filtered distribution, by chi-square; the
    biased sampler shows that the test can fail. The seed is 3: a red run stays red."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    fits = {}
    for cls in (Sampler, Biased):
        sampler = cls(temperature, top_k, top_p, 3)
        counts = sampler.choose(logits.expand(4000, 12), 0).bincount(minlength=12).double()
        fits[cls] = misfit(counts, sampler.scores(logits).softmax(-1))
    assert fits[Sampler] < 1 < fits[Biased], fits


@pytest.mark.parametrize("temperature, top_k, top_p", LAWS[:2])
def test_the_coupling_is_lossless_in_law(temperature, top_k, top_p):
    """Pairs of tokens that Kangaroo writes, over 500 seeds, against the model's own distribution,
    enumerated. Shared noise with the rule "accept with probability min(1, p/q)" would fail here.
    Seeds are 0 … 499: a red run stays red."""
    model, prompt = random_model(replace(TINY, vocab_size=5, num_hidden_layers=2), 2), [1, 2, 3]
    law, adapter = Sampler(temperature, top_k, top_p), random_adapter(model)
    first = law.scores(model(torch.tensor([prompt]))[0, -1]).softmax(-1)
    second = torch.stack([law.scores(model(torch.tensor([[*prompt, t]]))[0, -1]).softmax(-1)
                          for t in range(5)])
    counts, accepted, n = torch.zeros(5, 5, dtype=torch.double), 0, 500
    for seed in range(n):
        sampler = Sampler(temperature, top_k, top_p, seed)
        drafter = KangarooDrafter(model, adapter, 1, 0)
        rounds = list(generate(model, drafter, prompt, 2, sampler=sampler))
        a, b = (token for r in rounds for token in r.tokens)
        counts[a, b] += 1
        accepted += sum(r.accepted for r in rounds)
    assert misfit(counts.flatten(), (first[:, None] * second).flatten()) < 1
    assert n / 15 < accepted < n  # both branches of the rule were taken


@pytest.mark.parametrize("device", DEVICES)
@given(seed=st.integers(0, 2 ** 40), exit_layer=st.integers(0, 3), steps=st.integers(0, 7),
       threshold=st.floats(0, 1), temperature=st.sampled_from([0.5, 1.0, 2.0]))
@examples(30)
def test_the_seed_alone_decides(device, seed, exit_layer, steps, threshold, temperature):
    """The same seed gives the same text whatever drafter, γ, η and exit layer; noise by position,
    never by call."""
    model, sampler = random_model(device=device), Sampler(temperature, seed=seed)
    drafters = (NoDrafter(model), PromptLookupDrafter(model),
                KangarooDrafter(model, random_adapter(model), exit_layer, threshold),
                KangarooDrafter(model, NoisyAdapter(model, exit_layer), exit_layer, threshold))
    texts = [[t for r in generate(model, drafter, [1, 2, 1, 2], 20, steps, sampler)
              for t in r.tokens] for drafter in drafters]
    assert texts[1:] == texts[:-1]


def test_other_seeds_and_positions_have_other_noise():
    """A generator seeded with too few bits, or with seed + position, would repeat itself."""
    noise = [Sampler(1, seed=seed).noise(position, 50, torch.device("cpu"))
             for seed in (0, 1, 2, 2**32, -1) for position in (0, 1, 2, 2**20)]
    assert len({tuple(row.tolist()) for row in noise}) == len(noise)


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_a_function_of_seed_and_position(device):
    """Asked in another order, by another sampler, for another device: the same bits. Its law is
    Gumbel's."""
    a, b = Sampler(1, seed=7), Sampler(0.5, 3, 0.5, seed=7)
    expected = {t: a.noise(t, 1000, torch.device("cpu")) for t in (5, 6, 100)}
    for t in (100, 5, 6):
        assert torch.equal(b.noise(t, 1000, torch.device(device)).cpu(), expected[t])
    gumbel = torch.cat([a.noise(t, 1000, torch.device("cpu")) for t in range(100)])
    assert gumbel.isfinite().all()
    # P(noise ≤ x) = exp(−exp(−x)); of 100,000 draws 6 sigma is below 0.01.
    for x in (-1.0, 0.0, 1.0, 3.0):
        assert (gumbel <= x).double().mean().item() == pytest.approx(
            torch.tensor(-x).exp().neg().exp().item(), abs=0.01)


@pytest.mark.parametrize("u, value", [(0.0, 37.4), (2 ** -53, 36.7), (1 - 2 ** -53, -3.6)])
def test_noise_is_finite_at_both_ends(monkeypatch, u, value):
    """A uniform number that is 0, or that float32 rounds to 1: a token that could never, or would
    always, be drawn."""
    monkeypatch.setattr(torch, "rand", lambda n, **more: torch.full((n,), u, dtype=more["dtype"]))
    noise = gumbel_noise.__wrapped__(0, 0, 3, torch.device("cpu"))  # not to be kept
    assert noise.tolist() == pytest.approx([value] * 3, abs=0.1)


def test_a_copy_with_another_seed_has_other_noise():
    """A copy that shares a cache with its original would draw the original's text again."""
    sampler, logits = Sampler(1, seed=7), torch.zeros(20, 50)
    before = sampler.choose(logits, 3)
    for how in (copy.copy, copy.deepcopy):
        other = how(sampler)
        assert torch.equal(other.choose(logits, 3), before)
        other.seed = 8
        assert torch.equal(other.choose(logits, 3), Sampler(1, seed=8).choose(logits, 3))
        assert not torch.equal(other.choose(logits, 3), before)
    assert torch.equal(sampler.choose(logits, 3), before)


def test_the_noise_that_is_kept_is_bounded():
    """A long text, another model, a sampler a text: memory for some positions, not for all."""
    most = gumbel_noise.cache_info().maxsize
    assert most and most <= 64
    for vocab_size in (40, 50):
        model = random_model(replace(TINY, vocab_size=vocab_size))
        for seed in (0, 1):
            drafter = KangarooDrafter(model, random_adapter(model), 1, 0)
            rounds = list(generate(model, drafter, [1], 90, sampler=Sampler(1, seed=seed)))
            assert sum(len(r.tokens) for r in rounds) == 90
            assert gumbel_noise.cache_info().currsize <= most
    # What a drafter asked for, the verification asks for again.
    before = gumbel_noise.cache_info()
    rounds = list(generate(model, drafter, [1], 90, sampler=Sampler(1, seed=2)))
    after = gumbel_noise.cache_info()
    assert after.misses - before.misses == 90  # a position each
    assert after.hits - before.hits >= sum(len(r.draft.tokens) for r in rounds) > 90


def test_an_excluded_token_is_never_chosen():
    """Where the noise of the only token that is left was −∞, the choice fell on token 0."""
    logits = torch.zeros(1, 49152)
    logits[0, 17365] = 50
    for sampler in (Sampler(1, 1), Sampler(1, 0, 0.5)):
        assert all(sampler.choose(logits, t).item() == 17365 for t in (78, 79, 80))


def test_the_tails_of_the_noise():
    """8 million draws in bins of both tails against Gumbel's law, by chi-square. Uniform numbers of
    few bits have steps there: the same bins must refuse 16 bits."""
    noise = torch.cat([Sampler(1, seed=5).noise(t, 2 ** 20, torch.device("cpu")) for t in range(8)])
    edges = torch.tensor([-2.4, -2.2, -2.0, 6, 7, 8, 9, 10, 11, 12], dtype=torch.double)
    below = torch.cat((torch.zeros(1), (-(-edges).exp()).exp(), torch.ones(1)))
    coarse = torch.rand(2 ** 23, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    coarse = ((coarse * 2 ** 16).floor() + 0.5) / 2 ** 16
    fits = [misfit(torch.bucketize(x.double(), edges).bincount(minlength=11).double(), below.diff())
            for x in (noise, -(-torch.log1p(-coarse)).log())]
    assert fits[0] < 1 < fits[1], fits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64],
                         ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_greedy_ties_go_to_the_lowest_id(dtype, device):
    """Whatever the dtype and however many columns: vectorised reductions are free to return any of
    equals."""
    for size in (3, 17, 1000, 49152):
        logits = torch.zeros(2, size, dtype=dtype, device=device)
        logits[0, [size // 2, size - 1]] = 1
        assert Sampler().choose(logits, 0).tolist() == [size // 2, 0]


def kept(sampler, logits):
    return sampler.scores(torch.tensor(logits)).isfinite().nonzero().flatten().tolist()


# Few different values, as bfloat16 has them, so that there are ties at every boundary.
coarse_logits = st.lists(st.integers(-80, 80).map(lambda n: n / 4), min_size=2, max_size=60)


@given(logits=coarse_logits, top_k=st.integers(0, 70),
       temperature=st.sampled_from([0.3, 1.0, 5.0]))
def test_top_k_keeps_exactly_k(logits, top_k, temperature):
    """The k likeliest; of equals the lowest ids. With k = 1 that is greedy, ties and all."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    expected = sorted(order[:top_k] if top_k else order)
    assert kept(Sampler(temperature, top_k), logits) == expected
    if top_k == 1:
        chosen = Sampler(temperature, 1).choose(torch.tensor([logits]), 7)
        assert chosen.tolist() == Sampler().choose(torch.tensor([logits]), 7).tolist()


def test_top_k_1_is_greedy_on_ties():
    """Either of two equals was chosen, by the noise of the position."""
    logits = torch.full((1, 9), -5.0)
    logits[0, [2, 7]] = 21
    for t in range(20):
        assert Sampler(1, 1).choose(logits, t).item() == 2


@given(logits=coarse_logits, top_k=st.integers(0, 70),
       top_p=st.floats(0.01, 1, exclude_max=True), temperature=st.sampled_from([0.3, 1.0, 5.0]))
def test_top_p_keeps_what_it_should(logits, top_k, top_p, temperature):
    """Against a plain definition in Python: of the k likeliest, the fewest whose probability
    reaches p, ties to the lowest id. float32 sums may err by a little at the boundary, either
    way."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k or None]
    weights = (torch.tensor([logits[i] for i in order]).double() / temperature).softmax(0)
    before = (weights.cumsum(0) - weights).tolist()
    found = kept(Sampler(temperature, top_k, top_p), logits)
    fewest, most = (sum(mass < top_p + error for mass in before) for error in (-1e-6, 1e-6))
    assert max(1, fewest) <= len(found) <= most and found == sorted(order[:len(found)])


@pytest.mark.parametrize("arguments, message", [
    ((-1,), "--temperature -1: must be 0 (greedy) or from 1e-6 on"),
    ((float("nan"),), "--temperature nan: must be"),
    ((float("inf"),), "--temperature inf: must be"),
    ((1, -1), "--top-k -1: must be at least 0"), ((1, 0, 0.0), "--top-p 0.0: must be in (0, 1]"),
    ((1, 0, 1.1), "--top-p 1.1: must be"), ((1, 0, float("nan")), "--top-p nan: must be")])
def test_impossible_settings_are_refused(arguments, message):
    """By the names of the arguments: who calls this has no flags."""
    with pytest.raises(UserError) as error:
        Sampler(*arguments)
    assert str(error.value).startswith(message)
