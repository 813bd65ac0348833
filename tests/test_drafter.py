"""The second oracle: what the drafter drafts. A losslessness test cannot see a broken drafter, only
a slow one."""
import random
from dataclasses import replace
from math import ceil

from drafters.lookup import PromptLookupDrafter
from drafters.rest import RestDrafter
from drafters.sps import SpsDrafter
from drafters.tree import TreeDrafter
from kangaroo import Draft, KangarooDrafter, NoDrafter, NotFinite, generate
from llama import Sampler, generate_naive
from support.errors import UserError
from support.self_check import find_nonfinite

import pytest
import torch
from helpers import (
    DEVICES,
    TINY,
    NoisyAdapter,
    PerfectAdapter,
    block,
    datastore,
    examples,
    random_adapter,
    random_model,
    samplers,
)
from hypothesis import given
from hypothesis import strategies as st


class CheckedDrafter:
    """In every round, compares the draft with that of a fresh drafter which is prefilled with
    ids[:-1]."""

    def __init__(self, make):
        self.make, self.inner = make, make()
        self.depth, self.observe = self.inner.depth, self.inner.observe

    def prefill(self, ids, cache, sampler):
        self.sampler = sampler
        return self.inner.prefill(ids, cache, sampler)

    def draft(self, ids, n_max, cache):
        draft, fresh = self.inner.draft(ids, n_max, cache), self.make()
        fresh_cache = fresh.model.new_cache(cache.length, cache.width)
        fresh.prefill(ids[:-1], fresh_cache, self.sampler)
        expected = fresh.draft(ids, n_max, fresh_cache)
        assert draft.tokens == expected.tokens and draft.parents == expected.parents
        # float64: a prefill and single steps round differently, by nothing that matters here
        if draft.hidden is not None or expected.hidden is not None:
            assert torch.allclose(draft.hidden, expected.hidden, atol=1e-9)
        assert torch.allclose(torch.tensor(draft.confidence), torch.tensor(expected.confidence),
                              atol=1e-9)
        return draft


@pytest.mark.parametrize("device", DEVICES)
@given(seed=st.integers(0, 999), kind=st.sampled_from(["random", "perfect", "noisy"]),
       sampler=samplers, steps=st.integers(1, 7), threshold=st.sampled_from([0.0, 0.3, 0.6]),
       prompt_length=st.integers(1, 20), exit_layer=st.integers(0, 3),
       width=st.sampled_from([2, 4, 8]))
@examples(60)
def test_every_draft_is_that_of_a_fresh_drafter(device, seed, kind, sampler, steps, threshold,
                                                prompt_length, exit_layer, width):
    """Guards the adapter's cache: positions off by one, rejected rows kept, a row missing after a
    full accept or an edge."""
    with block(16):
        model = random_model(TINY, seed, torch.float64, device=device)
        adapter = {"random": lambda *_: random_adapter(model, seed), "perfect": PerfectAdapter,
                   "noisy": NoisyAdapter}[kind](model, exit_layer)
        checked = CheckedDrafter(lambda: KangarooDrafter(model, adapter, exit_layer, threshold))
        prompt = [random.Random(seed).randrange(40) for _ in range(prompt_length)]
        rounds = list(generate(model, checked, prompt, 30, min(steps, width - 1), sampler,
                               width=width))
        assert sum(len(r.tokens) for r in rounds) == 30


@pytest.mark.parametrize("device", DEVICES)
@given(seed=st.integers(0, 999), steps=st.integers(0, 7), n=st.integers(1, 40),
       exit_layer=st.integers(0, 3), sampler=samplers)
@examples(40)
def test_a_perfect_adapter_is_always_accepted(device, seed, steps, n, exit_layer, sampler):
    """N tokens in exactly ⌈N / (γ + 1)⌉ rounds; a lost or stale adapter row costs rounds. Half as
    many mean a wrong count."""
    model = random_model(TINY, seed, torch.float64, device)
    drafter = KangarooDrafter(model, PerfectAdapter(model, exit_layer), exit_layer, 0)
    with block(64):
        rounds = list(generate(model, drafter, [seed % 40], n, steps, sampler))
    assert len(rounds) == ceil(n / (steps + 1))
    assert all(r.accepted == len(r.draft.tokens) for r in rounds)


@given(seed=st.integers(0, 999), samplers=st.lists(samplers, min_size=2, max_size=3))
@examples(20)
def test_a_drafter_has_the_sampler_of_each_text(seed, samplers):
    """Nobody gives it one when it is made: text after text it chooses as the target does, each in
    exactly ⌈N / (γ + 1)⌉ rounds. With a sampler of its own it was slow in silence."""
    model = random_model(TINY, seed, torch.float64)
    drafter = KangarooDrafter(model, PerfectAdapter(model, 1), 1, 0)
    for n, sampler in zip((23, 14, 9), samplers):
        rounds = list(generate(model, drafter, [seed % 40, 1], n, 4, sampler))
        assert len(rounds) == ceil(n / 5)
        assert all(r.accepted == len(r.draft.tokens) for r in rounds)


@pytest.mark.parametrize("device", DEVICES)
@given(seed=st.integers(0, 999), n=st.integers(1, 20))
@examples(25)
def test_an_adversarial_adapter_costs_a_round_a_token(device, seed, n):
    """Who drafts what the target likes least has nothing accepted; test_lossless.py shows that the
    text is the target's."""
    model = random_model(TINY, seed, torch.float64, device=device)
    drafter = KangarooDrafter(model, PerfectAdapter(model, 1, -1), 1, 0)
    rounds = list(generate(model, drafter, [1], n))
    assert len(rounds) == n and not any(r.accepted for r in rounds)


@pytest.mark.parametrize("device", DEVICES)
@given(seed=st.integers(0, 999), sampler=samplers, prompt_length=st.integers(1, 30),
       tied=st.booleans())
@examples(30)
def test_the_cached_step_agrees_with_the_definition(device, seed, sampler, prompt_length, tied):
    """Third oracle: vanilla decoding through cache, blocks and padding gives the tokens of ten
    lines without any of them."""
    model = random_model(replace(TINY, tie_word_embeddings=tied), seed, torch.float64,
                         device=device)
    prompt = [random.Random(seed).randrange(40) for _ in range(prompt_length)]
    with block(16):
        cached = [token for r in generate(model, NoDrafter(model), prompt, 25, sampler=sampler)
                  for token in r.tokens]
    assert cached == generate_naive(model, prompt, 25, sampler)


def test_a_long_prompt_is_prefilled_in_chunks(monkeypatch):
    """More rows than one prefill chunk: positions and views of the later chunks."""
    monkeypatch.setattr("kangaroo.PREFILL_ROWS", 16)
    model = random_model(TINY, 1, torch.float64)
    prompt = [random.Random(1).randrange(40) for _ in range(75)]
    drafter = CheckedDrafter(lambda: KangarooDrafter(model, random_adapter(model), 2, 0.1))
    with block(16):
        ids = [token for r in generate(model, drafter, prompt, 20) for token in r.tokens]
    assert ids == generate_naive(model, prompt, 20, Sampler())


@pytest.mark.parametrize("threshold, length", [(0.0, 6), (1.0, 1), (1.5, 1)])
def test_the_second_early_exit(threshold, length):
    """η = 0 never stops a draft; at η ≥ 1 every draft stops after its first token, which is still
    verified."""
    model = random_model()
    drafter = KangarooDrafter(model, random_adapter(model), 1, threshold)
    rounds = list(generate(model, drafter, [1, 2, 3], 30))
    assert all(len(r.draft.tokens) == min(length, 30 - i - 1)
               for i, r in zip(starts(rounds), rounds, strict=True))


def starts(rounds):
    """How many tokens had been committed before each round."""
    return [sum(len(r.tokens) for r in rounds[:i]) for i in range(len(rounds))]


@pytest.mark.parametrize("device", DEVICES)
@given(threshold=st.floats(0.05, 0.95), temperature=st.sampled_from([0.0, 0.5, 3.0]),
       seed=st.integers(0, 99))
@examples(30)
def test_a_draft_ends_with_its_first_unsure_token(device, threshold, temperature, seed):
    """Exactly the last token of a draft may be at or below η, at the temperature in force."""
    model = random_model(TINY, seed, device=device)
    sampler = Sampler(temperature)
    drafter = KangarooDrafter(model, PerfectAdapter(model, 1), 1, threshold)
    for r in generate(model, drafter, [1, 2, 3], 30, sampler=sampler):
        assert all(p > threshold for p in r.draft.confidence[:-1])
        assert len(r.draft.confidence) == len(r.draft.tokens)


def test_confidence_is_taken_at_the_temperature_in_force():
    """A hot distribution is less sure than a cold one: η must see the one that is sampled from."""
    model = random_model()
    sure = {}
    for temperature in (0.1, 1.0, 10.0):
        sampler = Sampler(temperature)
        drafter = KangarooDrafter(model, PerfectAdapter(model, 1), 1, 0)
        sure[temperature] = next(generate(model, drafter, [1, 2, 3], 9,
                                          sampler=sampler)).draft.confidence[0]
    logits = model(torch.tensor([[1, 2, 3]]))[0, -1].double()
    for temperature, probability in sure.items():
        assert probability == pytest.approx((logits / temperature).softmax(-1).max().item(),
                                            rel=1e-4)


@pytest.mark.parametrize("kind", ["random", "perfect", "noisy"])
def test_nothing_of_the_shallow_layers_is_computed_twice(kind, monkeypatch):
    """A round runs the shallow layers once for each of its tokens and the deep ones once; prefill
    runs each layer once."""
    model = random_model()
    calls = [0] * 4
    forward = type(model.layers[0]).forward

    def count(self, x, rows, cache, layer):
        calls[layer] += 1
        return forward(self, x, rows, cache, layer)

    adapter = {"random": lambda: random_adapter(model),
               "perfect": lambda: PerfectAdapter(random_model(), 2),
               "noisy": lambda: NoisyAdapter(random_model(), 2)}[kind]()
    monkeypatch.setattr(type(model.layers[0]), "forward", count)
    monkeypatch.setattr("helpers.PerfectAdapter.__call__", uncounted(calls,
                                                                     PerfectAdapter.__call__))
    rounds = list(generate(model, KangarooDrafter(model, adapter, 2, 0.2), [1, 2, 3], 30))
    tokens_run = sum(1 + len(r.draft.tokens) for r in rounds)
    assert calls == [1 + tokens_run, 1 + tokens_run, 1 + len(rounds), 1 + len(rounds)]


def uncounted(calls, function):
    """`function` without its effect on the list `calls`: the perfect adapter runs layers too."""
    def call(*args):
        before = list(calls)
        result = function(*args)
        calls[:] = before
        return result
    return call


@pytest.mark.parametrize("kind", ["none", "lookup", "kangaroo", "tree", "sps", "rest"])
def test_host_syncs(kind, monkeypatch):
    """One a drafted token (in a tree: one for all open nodes) and one a round: each more costs a
    GPU its queue."""
    model, sampler, levels = random_model(), Sampler(0.7, 5, 0.9), []
    width = 16 if kind == "tree" else 8
    drafter = {
        "none": NoDrafter, "lookup": PromptLookupDrafter,
        "kangaroo": lambda m: KangarooDrafter(m, random_adapter(m), 1, 0.1),
        "tree": lambda m: TreeDrafter(m, PerfectAdapter(m, 1), 1, 0.1, candidates=3),
        "sps": lambda m: SpsDrafter(m, m, 0.1),
        "rest": lambda m: RestDrafter(m, datastore([[i, j] for i in range(40) for j in range(9)]))
    }[kind](model)
    if kind in ("kangaroo", "tree", "sps"):
        name = "children" if kind == "tree" else "propose"
        step = getattr(drafter, name)
        setattr(drafter, name, lambda *args: levels.append(1) or step(*args))
    syncs = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy",
                 "nonzero"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, original=original:
                            (syncs.append(original), original(*args))[1])
    rounds = list(generate(model, drafter, [1, 2, 3, 2, 3, 1, 2], 30, sampler=sampler,
                           width=width))
    assert len(syncs) == len(rounds) + len(levels)
    drafted = sum(len(r.draft.tokens) for r in rounds)
    assert kind not in ("kangaroo", "sps") or len(levels) == drafted
    assert kind != "tree" or len(levels) < sum(len(r.draft.tokens) for r in rounds)


class Observer:
    """Keeps what a drafter is told: the committed tokens, and the target's state before each."""

    def __init__(self, drafter):
        self.drafter, self.depth, self.prefill = drafter, drafter.depth, drafter.prefill
        self.draft, self.calls = drafter.draft, 0
        self.states, self.tokens = [], []

    def observe(self, hidden, choices, path):
        assert hidden.shape[1] == len(choices)
        self.states += [hidden[0, node] for node in (0, *path)]
        self.tokens += [choices[node] for node in (0, *path)]
        self.calls += 1


@pytest.mark.parametrize("kind", ["chain", "tree", "lookup"])
@given(seed=st.integers(0, 999), prompt_length=st.integers(1, 20), n=st.integers(1, 30))
@examples(15)
def test_a_drafter_observes_what_is_committed(kind, seed, prompt_length, n):
    """The prompt and every verification, accepted rows only, with the bits of vanilla's states: a
    method that learns from the target would learn from rejected rows."""
    model, width = random_model(TINY, seed), 16 if kind == "tree" else 8
    prompt = [random.Random(seed).randrange(40) for _ in range(prompt_length)]
    drafter = {"chain": lambda: KangarooDrafter(model, NoisyAdapter(model, 1), 1, 0),
               "tree": lambda: TreeDrafter(model, PerfectAdapter(model, 1), 1, 0, candidates=3),
               "lookup": lambda: PromptLookupDrafter(model)}[kind]()
    seen, vanilla = Observer(drafter), Observer(NoDrafter(model))
    runs = [list(generate(model, who, prompt, n, width=width)) for who in (seen, vanilla)]
    ids = prompt + [token for r in runs[0] for token in r.tokens]
    assert seen.tokens == vanilla.tokens == ids[1:]
    assert seen.calls == (prompt_length > 1) + len(runs[0])
    for a, b in zip(seen.states, vanilla.states, strict=True):
        assert torch.equal(a, b)


class NanAdapter(PerfectAdapter):
    source = "the damaged one"

    def __call__(self, x, positions, cache):
        return torch.full_like(x, torch.nan)


@pytest.mark.parametrize("drafter", [KangarooDrafter, TreeDrafter])
@pytest.mark.parametrize("temperature", [0, 1])
def test_an_adapter_full_of_nan_is_an_error(drafter, temperature):
    """It would draft nonsense in silence: the output right, the compression rate 1."""
    model, sampler = random_model(), Sampler(temperature)
    drafter = drafter(model, NanAdapter(model, 1), 1, 0.5)
    rounds = generate(model, drafter, [1, 2], 9, sampler=sampler, width=16)
    with pytest.raises(UserError, match="the damaged one: what it drafts with is not finite"):
        list(rounds)


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1), Sampler(1, 5), Sampler(1, 0, 0.9)])
def test_a_logit_that_is_not_finite_is_an_error(sampler):
    """Also where it is not the one chosen: top-k and top-p would hide it, or choose token 0."""
    model = random_model()
    model.lm_head.weight.data[17] = torch.nan
    with pytest.raises(NotFinite, match=r"^NaN or infinite logits: .* torch.float32$") as error:
        list(generate(model, NoDrafter(model), [1, 2], 9, sampler=sampler))
    assert isinstance(error.value, UserError) and error.value.ids == [1, 2]
    assert find_nonfinite(model, error.value.ids) == "the final norm or the LM head"


def test_a_token_that_was_only_drafted_is_looked_at_too():
    """Guards the message: a NaN in a drafted token's embedding came out of "the LM head"."""
    model = random_model()
    good = list(generate(model, NoDrafter(model), [1, 2], 4))[0].tokens[0]
    model.embed_tokens.weight.data[39] = torch.nan
    assert good != 39
    with pytest.raises(NotFinite) as error:
        list(generate(model, Proposes(model, Draft([39])), [1, 2], 4))
    assert find_nonfinite(model, error.value.ids) == "the embedding"


# --------------------------------------------------------------------------------------------------
# What `generate` refuses

class Proposes(NoDrafter):
    """Always the same draft."""

    def __init__(self, model, draft, depth=0):
        super().__init__(model)
        self.proposed, self.depth = draft, depth

    def draft(self, ids, n_max, cache):
        return self.proposed


@pytest.mark.parametrize("draft, width, message", [
    (Draft([1] * 5), 4, "a draft of 5 tokens, 5 levels deep, where there is room for 3 tokens, 3 "),
    (Draft([1] * 16, parents=[0] * 16), 16, "a draft of 16 tokens, 1 levels deep, where there is"),
    (Draft([1] * 6), 8, "6 levels deep, where there is room for 7 tokens, 5 levels deep"),
    (Draft([1] * 6, parents=[0, 1, 2, 3, 4, 5]), 16, "room for 15 tokens, 5 levels deep"),
    (Draft([1, 2], parents=[0]), 16, "must come before their children, [0] do not"),
    (Draft([1, 2], parents=[0, 0, 0]), 16, "[0, 0, 0] do not"),
    (Draft([1, 2], parents=[0, 2]), 16, "[0, 2] do not"),
    (Draft([1, 2], parents=[2, 0]), 16, "[2, 0] do not"),
    (Draft([1, 2], parents=[-1, 0]), 16, "[-1, 0] do not"),
    (Draft([1, 2], parents=[0, 0]), 8, "a draft tree at width 8: needs a width above 8")],
    ids=["wide chain", "wide tree", "deep chain", "deep tree", "a parent too few",
         "a parent too many", "its own parent", "a later parent", "parent -1", "narrow tree"])
def test_a_draft_that_does_not_fit_is_an_error(draft, width, message):
    """Guards who writes a drafter: rows out of the step, positions out of the view, or a wrong
    text, instead of one line that says whose fault it is."""
    model = random_model()
    with pytest.raises(UserError) as error:
        list(generate(model, Proposes(model, draft), [1, 2], 20, 5, width=width))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_just_fits_is_verified():
    """One token less than what is refused above, in the width and in depth."""
    model = random_model()
    for draft, width in ((Draft([1] * 3), 4), (Draft([1] * 5), 8),
                         (Draft(list(range(15)), parents=[0] * 15), 16)):
        expected = [r.tokens for r in generate(model, NoDrafter(model), [1, 2], 1, 5, width=width)]
        rounds = generate(model, Proposes(model, draft), [1, 2], 20, 5, width=width)
        assert next(rounds).tokens[:1] == expected[0]


def test_a_draft_without_states_is_an_error():
    """Guards a drafter that has run layers and does not hand over what came of it."""
    model = random_model()
    for draft in (Draft([]), Draft([1])):
        with pytest.raises(UserError, match="a draft needs its states at depth 2"):
            list(generate(model, Proposes(model, draft, depth=2), [1, 2], 9))


@pytest.mark.parametrize("length", [0, 20, 21])
def test_a_prompt_that_does_not_fit_is_an_error(length):
    """Guards an index error for an empty prompt, and a text of no tokens for one as long as the
    context."""
    model = random_model(replace(TINY, max_position_embeddings=20))
    with pytest.raises(UserError, match=rf"^a prompt of {length} tokens: must have from 1 to 19, "
                                        "for the context is 20$"):
        list(generate(model, NoDrafter(model), [1] * length, 9))
    for fits, n in ((1, 9), (19, 1)):
        rounds = list(generate(model, NoDrafter(model), [1] * fits, 9))
        assert sum(len(r.tokens) for r in rounds) == n


# --------------------------------------------------------------------------------------------------
# Prompt lookup

def test_prompt_lookup_proposes_what_came_last_after_the_same_words():
    """The latest earlier occurrence, no more than n_max tokens, nothing without one."""
    drafter = PromptLookupDrafter(random_model())
    assert drafter.draft([1, 2, 3, 4, 1, 2, 5, 6, 1, 2], 3, None).tokens == [5, 6, 1]
    assert drafter.draft([1, 2, 5, 1, 2], 7, None).tokens == [5, 1, 2]
    assert drafter.draft([1, 2, 3, 4], 7, None).tokens == []
    assert drafter.draft([7], 7, None).tokens == []
    assert drafter.draft([1, 2, 3, 1, 2], 0, None).tokens == []
