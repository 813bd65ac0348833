"""Sampling: the law, the noise, the filters, ties."""
from dataclasses import replace

import pytest
import torch
from helpers import DEVICES, TINY, NoisyAdapter, random_adapter, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters.lookup import PromptLookupDrafter
from kangaroo import KangarooDrafter, NoDrafter, generate
from llama import Sampler, UserError


def critical_chi_square(freedom, z=3.72):
    """The value that chi-square exceeds with probability 1e-4 (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("kind", ["vanilla", "kangaroo"])
@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 4, 0.9)])
def test_the_coupling_is_lossless_in_law(kind, temperature, top_k, top_p):
    """Pairs of tokens over 1,500 seeds against the model's own distribution, enumerated. Shared
    noise with the rule "accept with probability min(1, p/q)" would fail here. Seeds are 0 … 1499: a
    red run stays red."""
    model, prompt, n = random_model(replace(TINY, vocab_size=5, num_hidden_layers=2), 2), [1, 2,
                                                                                           3], 1500
    law = Sampler(temperature, top_k, top_p)
    first = law.scores(model(torch.tensor([prompt]))[0, -1]).softmax(-1)
    second = torch.stack(
        [law.scores(model(torch.tensor([[*prompt, t]]))[0, -1]).softmax(-1) for t in range(5)])
    expected = (first[:, None] * second).double() * n
    counts, accepted = torch.zeros(5, 5, dtype=torch.double), 0
    for seed in range(n):
        sampler = Sampler(temperature, top_k, top_p, seed)
        drafter = KangarooDrafter(model, random_adapter(model), 1, 0,
                                  sampler) if kind == "kangaroo" else NoDrafter(model)
        rounds = list(generate(model, drafter, prompt, 2, sampler=sampler))
        a, b = (token for r in rounds for token in r.tokens)
        counts[a, b] += 1
        accepted += sum(r.accepted for r in rounds)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    assert chi_square < critical_chi_square(int(possible.sum()) - 1)
    assert kind == "vanilla" or 100 < accepted < n  # both branches of the rule were taken


@pytest.mark.parametrize("device", DEVICES)
@given(seed=st.integers(0, 2 ** 40), exit_layer=st.integers(0, 3), steps=st.integers(0, 7),
       threshold=st.floats(0, 1), temperature=st.sampled_from([0.5, 1.0, 2.0]))
@settings(max_examples=30)
def test_the_seed_alone_decides(device, seed, exit_layer, steps, threshold, temperature):
    """The same seed gives the same text whatever drafter, γ, η and exit layer; noise by position,
    never by call."""
    model, sampler = random_model(device=device), Sampler(temperature, seed=seed)
    drafters = (NoDrafter(model), PromptLookupDrafter(model),
                KangarooDrafter(model, random_adapter(model), exit_layer, threshold, sampler),
                KangarooDrafter(model, NoisyAdapter(model, exit_layer), exit_layer, threshold,
                                sampler))
    texts = [[
        t for r in generate(model, drafter, [1, 2, 1, 2], 20, steps, sampler) for t in r.tokens
    ] for drafter in drafters]
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
    for x in (-1.0, 0.0, 1.0,
              3.0):  # P(noise ≤ x) = exp(−exp(−x)); 100,000 draws: 6 sigma is below 0.01
        assert (gumbel <= x).double().mean().item() == pytest.approx(
            torch.tensor(-x).exp().neg().exp().item(), abs=0.01)


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


@given(logits=st.lists(st.floats(-20, 20, width=32), min_size=2,
                       max_size=60), top_k=st.integers(0, 70),
       top_p=st.floats(0.01, 1, exclude_max=True), temperature=st.sampled_from([0.3, 1.0, 5.0]))
def test_top_k_and_top_p_keep_what_they_should(logits, top_k, top_p, temperature):
    """Against a plain definition in Python: the k likeliest, then the fewest of these whose
    probability reaches p."""
    kept = Sampler(temperature, top_k,
                   top_p).scores(torch.tensor(logits)).isfinite().nonzero().flatten().tolist()
    scaled = (torch.tensor(logits) / temperature).tolist()
    floor = sorted(scaled, reverse=True)[top_k - 1] if 0 < top_k < len(scaled) else min(scaled)
    weight = [
        torch.tensor(x - max(scaled), dtype=torch.double).exp().item() if x >= floor else 0.0
        for x in scaled
    ]
    order, mass = sorted(range(len(scaled)), key=lambda i: -weight[i]), 0.0
    needed, total = [], sum(weight)
    for i in order:
        if mass >= top_p + 1e-6:  # float32 sums may err by a little at the boundary, either way
            break
        needed.append(i)
        mass += weight[i] / total
    sure, mass = [], 0.0
    for i in order:
        if mass >= top_p - 1e-6:
            break
        sure.append(i)
        mass += weight[i] / total
    last = weight[needed[-1]] * (1 - 1e-6)  # equals of the last one are kept as well
    assert set(sure) <= set(kept) <= {i for i in order if weight[i] >= last}
    assert kept


@pytest.mark.parametrize("arguments, flag", [((-1,), "--temperature"),
                                             ((float("nan"),), "--temperature"),
                                             ((float("inf"),), "--temperature"),
                                             ((1, -1), "--top-k"), ((1, 0, 0.0), "--top-p"),
                                             ((1, 0, 1.1), "--top-p"),
                                             ((1, 0, float("nan")), "--top-p")])
def test_impossible_settings_are_refused(arguments, flag):
    with pytest.raises(UserError, match=flag):
        Sampler(*arguments)
