"""Lookahead decoding: it wins where it must, on toys; its window and its pool; its flags.

That it keeps the bits of vanilla decoding is in test_lossless_methods.py.
"""
import json
from dataclasses import replace
from math import ceil

from drafters.lookahead import CANDIDATES, NGRAM, WINDOW, LookaheadDrafter
from kangaroo import NoDrafter, generate
from llama import Sampler
from support.decoder import Settings
from support.errors import UserError

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, block, random_model
from test_cli import cli, decode, model, refused  # noqa: F401 (fixtures)


def rule(following, hidden_size=None):
    """A Llama whose next token is following[token]: states are one-hot, attention adds nothing."""
    size = len(following)
    config = replace(TINY, vocab_size=size, hidden_size=size, num_hidden_layers=2)
    model = random_model(config, 1)
    for layer in model.layers:
        layer.self_attn.o_proj.weight.data.zero_(), layer.mlp.down_proj.weight.data.zero_()
    model.norm.weight.data.fill_(1)
    model.embed_tokens.weight.data.copy_(torch.eye(size))
    model.lm_head.weight.data.copy_(steps_ahead(following, 1))
    return model


def steps_ahead(following, k):
    """A projection (V, V) that says from a one-hot state which token comes k steps later."""
    weight = torch.zeros(len(following), len(following))
    for token in range(len(following)):
        later = token
        for _ in range(k):
            later = following[later]
        weight[later, token] = 1
    return weight


CIRCLE = [(t + 1) % 12 for t in range(12)]  # a text that repeats itself every 12 tokens


def run(model, drafter, prompt, n, steps=15, sampler=None, width=16):
    """Rounds, whose text is checked against vanilla decoding; no block's edge cuts a draft."""
    with block(256):
        rounds, vanilla = (list(generate(model, who, prompt, n, steps, sampler, width=width))
                           for who in (drafter, NoDrafter(model)))
    assert sum((r.tokens for r in rounds), []) == sum((r.tokens for r in vanilla), [])
    return rounds


@pytest.mark.parametrize("window, ngram, n", [(6, 3, 70), (4, 4, 61), (2, 5, 33), (8, 2, 90)])
def test_lookahead_on_a_periodic_text(window, ngram, n):
    """A prompt of two periods fills the pool; then the window's longest path is right in every
    round: W + N − 3 tokens and the target's own. A pool keyed by the wrong token costs rounds."""
    model = rule(CIRCLE)
    drafter = LookaheadDrafter(model, window, ngram)
    rounds = run(model, drafter, 2 * list(range(12)) + [0], n)
    assert len(rounds) == ceil(n / (window + ngram - 2))


@pytest.mark.parametrize("candidates", [2, 4])
def test_the_n_grams_of_the_pool_are_accepted(candidates):
    """A window of one column guesses nothing: what is accepted are the pool's n-grams, N − 1 tokens
    a round."""
    model = rule(CIRCLE)
    drafter = LookaheadDrafter(model, 1, 4, candidates)
    drafter.guess = lambda ids, token: ids[-1]  # wrong
    rounds = run(model, drafter, 2 * list(range(12)) + [0], 40)
    assert len(rounds) == 10 and all(r.accepted == 3 for r in rounds[:-1])


def test_lookahead_learns_without_a_prompt():
    """From one token on, the window alone finds what follows what; vanilla needs 96 rounds."""
    model = rule(CIRCLE)
    assert len(run(model, LookaheadDrafter(model), [0], 96)) < 48


class Clock:
    """A target whose next token is the position: only what stands at its own place is right."""

    def __init__(self, size=128):
        self.model = rule([(t + 1) % size for t in range(size)])
        self.model.run_layers = self.run_layers

    def run_layers(self, x, positions, cache, first, last):
        return F.one_hot(positions, x.shape[-1])[None].to(x.dtype)


@pytest.mark.parametrize("window, ngram", [(6, 3), (4, 4), (3, 5)])
def test_the_window_moves_by_the_accepted_length(window, ngram):
    """After each round the columns that were run end with what the target says at their position,
    and no guess stands where a word of the target's was. Guards against a window that moves by the
    drafted length, or by one."""
    model, checked, accepted = Clock().model, 0, set()
    drafter = LookaheadDrafter(model, window, ngram, 0)
    drafter.guess = lambda ids, token: 0  # the token of position 0, wrong everywhere else
    ids = [0]
    for r in generate(model, drafter, ids, 36, 15, width=16):
        ids += r.tokens
        accepted.add(r.accepted)
        kept = drafter.columns[:]
        assert len(kept) == max(0, window - r.accepted) or len(ids) > 36 - 15
        for j, column in enumerate(kept[:len(drafter.ends) - r.accepted]):
            assert column[-1] == len(ids) - 1 + j + ngram - 2
            checked += 1
        for j, column in enumerate(kept):
            assert all(token in (0, len(ids) - 1 + j + i) for i, token in enumerate(column))
    assert ids == list(range(37)) and checked > 20 and len(accepted) > 1


def test_columns_that_are_not_run_keep_their_place():
    """Near a block's edge and the end there is no room for the deep ones: they stay where they
    stand, and go on later."""
    model = Clock().model
    drafter = LookaheadDrafter(model, 6, 3, 0)
    drafter.guess = lambda ids, token: 0
    ids, seen = [0], 0
    with block(32):
        for r in generate(model, drafter, ids, 50, 3, width=16):
            ids += r.tokens
            for j, column in enumerate(drafter.columns):
                assert all(token in (0, len(ids) - 1 + j + i) for i, token in enumerate(column))
                seen += len(column) - column.count(0)
    assert seen > 50


def test_the_pool_keeps_the_latest_n_grams():
    """At most G a token, the last learned first; one that comes again is not kept twice."""
    model = random_model()
    drafter, cache = LookaheadDrafter(model, 1, 3, 2), model.new_cache(64, 16)
    drafter.prefill([1, 2, 3, 1, 4, 5, 1, 2, 3, 1], cache, Sampler())
    assert drafter.pool[1] == [[4, 5], [2, 3]]
    draft = drafter.draft([1, 2, 3, 1, 4, 5, 1, 2, 3, 1], 9, cache)
    paths = [p for p in zip(draft.parents, draft.tokens)]
    assert draft.child(0, 4) and draft.child(draft.child(0, 4), 5)
    assert paths.index((0, 2)) < paths.index((0, 4))  # the window's guess is the latest too
    drafter.learn([1, 7, 7])
    assert drafter.pool[1] == [[2, 3], [7, 7]]


# --------------------------------------------------------------------------------------------------
# Settings and flags

@pytest.mark.parametrize("kwargs, words", [
    ({"window": 0}, "window 0"), ({"ngram": 1}, "ngram 1"), ({"candidates": -1}, "-1")])
def test_a_window_that_cannot_be(kwargs, words):
    """Guards against a failed assertion in the middle of a text."""
    assert WINDOW * (NGRAM - 1) + CANDIDATES * (NGRAM - 1) == 16  # the rows of its width
    with pytest.raises(UserError, match=words):
        LookaheadDrafter(random_model(), **kwargs)


@pytest.mark.parametrize("width, words", [
    (8, "--width 8: must be above 8 for a tree of drafts"), (9, "must be at least 12"),
    (11, "--width 11: must be at least 12, the rows of a window of 6 columns of 2 tokens")])
def test_a_window_that_does_not_fit(width, words):
    """Before any text."""
    settings = Settings(steps=5, window=WINDOW, ngram=NGRAM, candidates=CANDIDATES)
    with pytest.raises(UserError, match=words):
        LookaheadDrafter.check(settings, width)
    LookaheadDrafter.check(settings, 12)


@pytest.mark.parametrize("args", [[], ["--steps", 3], ["--width", 32], ["--temperature", 0.9]],
                         ids=lambda args: " ".join(map(str, args)) or "default")
def test_lookahead_gives_vanilla_ids(cli, args):
    """From flags to ids, at the width of its own."""
    args = ["--drafter", "lookahead", "--compare", *args]
    status, out, err = cli("--json", *args)
    result = json.loads(out)
    assert status == 0 and result["identical"] and sum(result["drafted"])
    assert [len(t["tokens"]) for t in result["trees"]] == result["drafted"]
    status, out, err = cli(*args)
    drafted, accepted = (sum(result[name]) for name in ("drafted", "accepted"))
    assert f"{accepted} of {drafted} drafted tokens accepted" in err
    assert f"drafter lookahead · width {32 if 32 in args else 16}" in err


@pytest.mark.parametrize("args, words", [
    (["--width", 8], ["--width 8", "above 8", "tree"]),
    (["--width", 10], ["--width 10", "at least 12"]), (["--tree"], ["--tree", "lookahead"]),
    (["--nodes", 4], ["--nodes 4", "lookahead has none"])])
def test_flags_that_do_not_fit(refused, args, words):
    """One line that names the flag, before any output."""
    refused(words, "--drafter", "lookahead", *args)
