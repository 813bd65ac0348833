"""Lookahead and Medusa keep the bits of vanilla decoding, and wait for a GPU seldom."""
import random
from itertools import product

from drafters.lookahead import NGRAM, WINDOW, LookaheadDrafter
from drafters.medusa import TREE, MedusaDrafter
from kangaroo import NoDrafter, generate
from llama import Sampler

import pytest
import torch
from helpers import DEVICES, DTYPES, block, examples, random_model, samplers, some
from hypothesis import given
from hypothesis import strategies as st
from test_lossless import assert_equal_bits, configs, decode
from test_medusa import random_heads


def make_drafter(kind, model, width, heads=None):
    if kind == "lookahead":
        return LookaheadDrafter(model, min(WINDOW, width // (NGRAM - 1)))
    heads = heads or random_heads(model)
    return MedusaDrafter(model, heads, TREE if kind == "medusa tree" else None)


KINDS = "lookahead", "medusa", "medusa tree"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, dtype", some(product(KINDS, DTYPES), 2), ids=str)
@given(config=configs(), seed=st.integers(0, 999), sampler=samplers,
       prompt_length=st.integers(1, 40), n=st.integers(1, 40),
       width=st.sampled_from([2, 8, 9, 12, 16, 32]), data=st.data(), packed=st.booleans(),
       own=st.booleans(), eos=st.sets(st.integers(0, 39), max_size=2))
@examples(24)
def test_any_method_gives_the_bits_of_vanilla(kind, device, dtype, config, seed, sampler,
                                              prompt_length, n, width, data, packed, own, eos):
    """Guards everything: depth at block edges and the end, rows moved after acceptance, EOS on a
    branch, a tree that is wider than the step."""
    width = width if kind == "medusa" else max(9, width)
    steps = data.draw(st.integers(0, width - 1), "γ")
    with block(data.draw(st.sampled_from([32, 64]), "block")):
        model = random_model(config, seed, dtype, device, packed_for=width if packed else None)
        # Heads of zeros say what the target said: right now and then, where a text repeats itself.
        heads = random_heads(random_model(config, seed, dtype, device), own=own)
        source = random.Random(seed)
        prompt = [source.randrange(config.vocab_size) for _ in range(prompt_length)]
        options = dict(steps=steps, sampler=sampler, eos=eos, width=width)
        vanilla = decode(model, NoDrafter(model), prompt, n, **options)
        drafted = decode(model, make_drafter(kind, model, width, heads), prompt, n, garbage=7e3,
                         **options)
        assert_equal_bits(model, prompt, vanilla, drafted)
        for r in drafted[3]:
            edges = list(zip(r.draft.parents, r.draft.tokens))
            assert len(edges) < width and max(r.draft.levels()) <= steps
            assert len(set(edges)) == len(edges)  # the second of equals could not be accepted


@pytest.mark.parametrize("kind", KINDS)
def test_host_syncs(kind, monkeypatch):
    """One a round, and for Medusa's heads one more: each more costs a GPU its queue."""
    model, sampler, syncs = random_model(), Sampler(0.7, 5, 0.9), []
    drafter = make_drafter(kind, model, 16)
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu",
                 "nonzero"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, original=original:
                            (syncs.append(original), original(*args))[1])
    rounds = list(generate(model, drafter, [1, 2, 3, 2, 3], 30, 5, sampler, width=16))
    drafted = sum(bool(r.draft.tokens) for r in rounds)
    assert len(syncs) == len(rounds) + (drafted if kind != "lookahead" else 0)
