"""The first oracle: with any drafter, ids, logits and KV cache equal vanilla decoding's, bit for
bit (torch.equal).

A falsifying example is printed by hypothesis with all its numbers, the seeds among them; weights
and prompts follow from these.
"""
import copy
import random
from dataclasses import replace

from drafters.lookup import PromptLookupDrafter
from drafters.rest import RestDrafter
from drafters.sps import SpsDrafter
from kangaroo import Draft, KangarooDrafter, NoDrafter, generate
from llama import KVCache, Sampler, generate_naive, one_shape
from support.self_check import rows_are_alike

import pytest
import torch
from helpers import (
    DEVICES,
    DTYPES,
    TINY,
    NoisyAdapter,
    PerfectAdapter,
    block,
    datastore,
    examples,
    random_adapter,
    random_model,
    samplers,
    some,
)
from hypothesis import example, given
from hypothesis import strategies as st


class RandomDrafter(NoDrafter):
    """Proposes any tokens at all, so many as it may."""

    def __init__(self, model, seed):
        super().__init__(model)
        self.random = random.Random(seed)

    def draft(self, ids, n_max, cache):
        tokens = [self.random.randrange(self.model.config.vocab_size) for _ in range(n_max)]
        return Draft(tokens, self.model.embed(ids[-1:] + tokens))


ADAPTERS = {"random": lambda model, exit_layer: random_adapter(model, 1),
            "perfect": PerfectAdapter, "noisy": NoisyAdapter,
            "adversarial": lambda model, exit_layer: PerfectAdapter(model, exit_layer, -1)}


def make_drafter(kind, model, exit_layer, threshold):
    if kind == "lookup":
        return PromptLookupDrafter(model)
    if kind.startswith("sps"):  # the small one has a padded vocabulary
        size, weight = model.config.vocab_size + 8, model.norm.weight
        small = copy.copy(model) if kind == "sps itself" else random_model(
            replace(TINY, num_hidden_layers=1, vocab_size=size), 1, weight.dtype, weight.device)
        return SpsDrafter(model, small, threshold)
    if kind == "rest":
        source, size = random.Random(1), min(12, model.config.vocab_size)
        return RestDrafter(model, datastore([[source.randrange(size) for _ in range(9)]
                                             for _ in range(40)]))
    if kind == "any tokens":
        return RandomDrafter(model, 3)
    return KangarooDrafter(model, ADAPTERS[kind](model, exit_layer), exit_layer, threshold)


def decode(model, drafter, prompt, n, garbage=0.0, **options):
    """(ids, the logits that chose each of them, KV cache, rounds); the cache starts full of
    `garbage`."""
    width = options.pop("width")
    cache = model.new_cache(len(prompt) + n + 2 * width, width)
    cache.rows.fill_(garbage)
    seen, logits = [], type(model).logits
    model.logits = lambda h: seen.append(logits(model, h)) or seen[-1]
    rounds = list(generate(model, drafter, prompt, n, cache=cache, **options))
    del model.logits
    rows = [verified[0, [0, *r.path][:len(r.tokens)]]
            for verified, r in zip(seen, rounds, strict=True)]
    return sum((r.tokens for r in rounds), []), torch.cat(rows), cache, rounds


def assert_equal_bits(model, prompt, a, b):
    """Ids, logits, and every cache row that belongs to a committed token which has been run."""
    assert a[0] == b[0]
    assert torch.equal(a[1], b[1])
    end = len(prompt) + len(a[0]) - 1
    assert torch.equal(a[2].rows[:, :, :, :end], b[2].rows[:, :, :, :end])


@st.composite
def configs(draw):
    """Any shape of a small Llama: layers, heads and their groups, vocabulary, RoPE."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    group = draw(st.sampled_from([1, 2, 4]))
    return replace(
        TINY,
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * group,
        head_dim=draw(st.sampled_from([4, 16])),
        hidden_size=draw(st.sampled_from([16, 48, 160])),
        num_hidden_layers=draw(st.integers(1, 5)),
        vocab_size=draw(st.sampled_from([5, 40, 300])),
        tie_word_embeddings=draw(st.booleans()),
        rope_type="linear",
        rope_scaling=(draw(st.sampled_from([1.0, 4.0])),))


DRAFTERS = [*ADAPTERS, "lookup", "sps", "sps itself", "rest", "any tokens"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    config=configs(),
    seed=st.integers(0, 999),
    packed=st.booleans(),
    kind=st.sampled_from(DRAFTERS),
    threshold=st.sampled_from([0.0, 0.3, 0.6, 1.0, 1.5]),
    width=st.sampled_from([2, 4, 8, 16]),
    sampler=samplers,
    prompt_length=st.integers(1, 40),
    n=st.integers(1, 48),
    eos=st.sets(st.integers(0, 39), max_size=2),
    data=st.data())
def test_any_drafter_gives_the_bits_of_vanilla(
        device, dtype, config, seed, packed,  # the model
        kind, threshold, width,               # the drafter, and the rows of a step
        sampler, prompt_length, n, eos,       # the text
        data):
    """Guards everything: positions, rollback, catching up, one shape, one noise, EOS and length
    limits."""
    exit_layer = data.draw(st.integers(0, config.num_hidden_layers - 1), "exit layer")
    steps = data.draw(st.integers(0, width - 1), "γ")
    with block(data.draw(st.sampled_from([16, 32, 64]), "block")):
        model = random_model(config, seed, dtype, device, packed_for=width if packed else None)
        prompt = [random.Random(seed).randrange(config.vocab_size) for _ in range(prompt_length)]
        options = dict(steps=steps, sampler=sampler, eos=eos, width=width)
        vanilla = decode(model, NoDrafter(model), prompt, n, **options)
        drafter = make_drafter(kind, model, exit_layer, threshold)
        drafted = decode(model, drafter, prompt, n, garbage=7e3, **options)
        assert_equal_bits(model, prompt, vanilla, drafted)
        assert all(max(r.draft.levels()) <= steps for r in drafted[3])
        assert len(vanilla[3]) == len(vanilla[0])  # vanilla: a verification a token


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_wide_model_with_long_drafts(device, dtype, packed):
    """A model large enough that products of 1 and of 5 rows do round differently: catches a step
    that is not of one shape."""
    config = replace(TINY, hidden_size=320, intermediate_size=768, num_attention_heads=10,
                     num_key_value_heads=5, head_dim=32, num_hidden_layers=3, vocab_size=2000)
    model = random_model(config, 5, dtype, device, packed_for=8 if packed else None)
    prompt = [random.Random(5).randrange(2000) for _ in range(50)]
    vanilla = decode(model, NoDrafter(model), prompt, 24, width=8)
    for kind in ("perfect", "noisy", "any tokens"):
        drafted = decode(model, make_drafter(kind, model, 1, 0), prompt, 24, steps=7, width=8)
        assert_equal_bits(model, prompt, vanilla, drafted)
        assert any(r.accepted for r in drafted[3]) or kind == "any tokens"


@pytest.mark.parametrize("device", DEVICES)
@given(seed=st.integers(0, 999), kind=st.sampled_from(list(ADAPTERS)), sampler=samplers,
       short=st.integers(1, 30), more=st.integers(1, 30))
@examples(25)
def test_more_new_tokens_only_append(device, seed, kind, sampler, short, more):
    """The budget sets the memory and the last draft's length, never a view: the same text,
    longer."""
    with block(16):
        model = random_model(TINY, seed, device=device)
        drafter = make_drafter(kind, model, 1, 0.3)  # one for both texts
        runs = [decode(model, drafter, [seed % 40], n, sampler=sampler, width=8)
                for n in (short, short + more)]
        assert runs[1][0][:short] == runs[0][0]
        assert torch.equal(runs[1][1][:short], runs[0][1])


@pytest.mark.parametrize("device", DEVICES)
@given(seed=st.integers(0, 999), n=st.integers(1, 20), stale=st.sampled_from([1e4, -1e4, 1e-4]))
@examples(20)
@example(seed=0, n=20, stale=6e4)  # the largest finite float16
def test_stale_rows_change_nothing(device, seed, n, stale):
    """A cache full of large finite garbage gives the bits of one of zeros: a masked row has weight
    0, exactly."""
    for dtype in DTYPES:
        model = random_model(TINY, seed, dtype, device=device)
        clean, dirty = (decode(model, NoDrafter(model), [1, 2, 3], n, garbage=g, width=8)
                        for g in (0.0, stale))
        assert_equal_bits(model, [1, 2, 3], clean, dirty)


@given(start=st.integers(0, 500), width=st.integers(1, 16), live=st.integers(1, 16),
       size=st.sampled_from([16, 32, 64]))
def test_a_drafted_row_has_the_view_that_it_would_have_alone(start, width, live, size):
    """Shapes depend on the position, never on how many rows are live. Seen here even where a kernel
    forgives it."""
    with block(size):
        cache = KVCache.zeros(replace(TINY, num_hidden_layers=1), 1000, width, torch.zeros(()))
        x = torch.zeros(1, 1 + min(live, cache.room(start)), 32)
        together, _, view = one_shape(x, start, cache)
        # Attention costs the context so far, not the budget.
        assert 0 <= view.length - (start + width) < size
        for i in range(x.shape[1]):
            alone, _, view_alone = one_shape(x[:, i:i + 1], start + i, cache)
            assert view_alone.length == view.length and alone.shape == together.shape


@pytest.mark.parametrize("limit", [9, 20, 33])
@pytest.mark.parametrize("kind", ["perfect", "random", "lookup", "sps itself", "sps", "rest"])
def test_the_context_end_is_vanillas(limit, kind):
    """Drafts must not pass max_position_embeddings, and must not end the text before it."""
    model = random_model(replace(TINY, max_position_embeddings=limit))
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    vanilla = decode(model, NoDrafter(model), prompt, 100, width=8)
    drafted = decode(model, make_drafter(kind, model, 1, 0), prompt, 100, width=8)
    assert len(vanilla[0]) == limit - len(prompt)
    assert_equal_bits(model, prompt, vanilla, drafted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_self_check_passes_here_and_can_fail(device, dtype, monkeypatch):
    """The load-time check must see a product whose rows are treated differently, else it says
    nothing."""
    model = random_model(replace(TINY, hidden_size=160), 0, dtype, device)
    # All widths there are: one that crosses the edge of a view would be a false alarm.
    assert all(rows_are_alike(model, width) for width in (2, 8, 16, 20, 32, 48, 64))
    layer_type, honest = type(model.layers[1].mlp), type(model.layers[1].mlp).forward

    def by_index(self, x):  # what a kernel that rounds the last row in another way does
        y = honest(self, x)
        y[:, -1] = y[:, -1] * (1 + torch.finfo(dtype).eps)
        return y

    monkeypatch.setattr(layer_type, "forward", by_index)
    assert not rows_are_alike(model, 8)


@pytest.mark.parametrize("kind", ["noisy", "lookup", "sps itself", "rest"])
def test_prompts_of_any_length(kind, monkeypatch):
    """Prefill around every edge of a chunk and of a view: rows left out, doubled or misplaced."""
    monkeypatch.setattr("kangaroo.PREFILL_ROWS", 16)
    model, source = random_model(TINY, 2), random.Random(2)
    with block(16):
        for length in [*range(1, 20), *range(30, 35), *range(46, 51)]:
            prompt = [source.randrange(40) for _ in range(length)]
            vanilla = decode(model, NoDrafter(model), prompt, 4, width=8)
            drafter = make_drafter(kind, model, 1, 0)
            drafted = decode(model, drafter, prompt, 4, garbage=7e3, width=8)
            assert_equal_bits(model, prompt, vanilla, drafted)
            assert vanilla[0] == generate_naive(model, prompt, 4, Sampler())


@pytest.mark.parametrize("threads", some([2, 3], 2))  # one: all other tests
def test_any_number_of_threads(threads):
    """Threads divide a sum among them: at each number of them, the bits of vanilla at that one."""
    config = replace(TINY, hidden_size=320, intermediate_size=768, num_attention_heads=10,
                     num_key_value_heads=5, head_dim=32, num_hidden_layers=2, vocab_size=2000)
    torch.set_num_threads(threads)  # the module's fixture puts it back
    try:
        model = random_model(config, 5, packed_for=8)
        vanilla = decode(model, NoDrafter(model), [1, 2, 3], 20, width=8)
        drafter = make_drafter("noisy", model, 1, 0)
        drafted = decode(model, drafter, [1, 2, 3], 20, steps=7, width=8)
        assert_equal_bits(model, [1, 2, 3], vanilla, drafted)
    finally:
        torch.set_num_threads(1)


def test_an_adapter_with_a_shorter_context():
    """The adapter's own max_position_embeddings is no limit: its cache is as long as the text."""
    model = random_model(TINY, 1)
    adapter = random_adapter(model)
    adapter.config = replace(adapter.config, max_position_embeddings=8)
    vanilla = decode(model, NoDrafter(model), [1, 2, 3], 90, width=8)
    drafted = decode(model, KangarooDrafter(model, adapter, 1, 0), [1, 2, 3], 90, width=8)
    assert_equal_bits(model, [1, 2, 3], vanilla, drafted)
    assert len(vanilla[0]) == 90


def test_an_end_of_sequence_within_an_accepted_draft():
    """It ends the text there, in the middle of what was accepted; what follows is not committed."""
    model = random_model(TINY, 3)
    ids = decode(model, NoDrafter(model), [1], 8, width=8)[0]
    eos = ids[2]
    rounds = decode(model, make_drafter("perfect", model, 1, 0), [1], 8, width=8, eos={eos})[3]
    n = ids.index(eos) + 1
    assert rounds[0].tokens == ids[:n] and rounds[0].accepted == n and len(rounds) == 1
    assert len(rounds[0].draft.tokens) > n
