"""Speculative sampling by a draft model: what is drafted, and in how many rounds.

That it keeps the bits of vanilla decoding is in test_lossless.py; its flags are in test_rest.py.
"""
import random
from dataclasses import replace
from math import ceil

from drafters.sps import SpsDrafter
from kangaroo import generate
from llama import Sampler
from support.errors import UserError

import pytest
import torch
from helpers import DEVICES, DTYPES, TINY, block, examples, random_model, samplers
from hypothesis import given
from hypothesis import strategies as st
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
