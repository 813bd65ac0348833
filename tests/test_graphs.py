"""CUDA graphs: their logic on any machine, with a stand-in that runs what it recorded; the real
ones where there is a GPU."""
import gc
import random
import warnings
import weakref
from dataclasses import replace
from functools import partial
from unittest import mock

import llama
from bench import common
from drafters.adapters import PartialHead
from drafters.lookup import PromptLookupDrafter
from drafters.tree import TreeDrafter
from kangaroo import KangarooDrafter, NoDrafter, generate
from llama import CHAIN_WIDTH, MLP, Attention, RMSNorm, Sampler
from support import graphs as module
from support.attention import CHUNK, LONG, attend, attend_by_group, merge_chunks
from support.decoder import load
from support.graphs import (
    CompiledRMSNorm,
    CudaRecorder,
    GraphedAdapter,
    GraphedChain,
    GraphedLlama,
    GraphedSampler,
    GraphedTree,
    Graphs,
    direct_recorder,
    exact_kernels,
    fuse_pointwise,
    no_collection,
)
from support.packing import FastRMSNorm, use_fast_norms

import pytest
import torch
from helpers import (
    DTYPES,
    TINY,
    PerfectAdapter,
    block,
    examples,
    random_adapter,
    random_model,
    samplers,
    write_adapter,
    write_model,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


class StandIn:
    """Records without a GPU. `functions` holds what was recorded, `replays` counts. As on a GPU, a
    recording's outputs are memory that later replays overwrite: here at once, with garbage, so that
    whoever keeps it without copying is found out."""

    def __init__(self):
        self.functions, self.replays, self.outputs = [], 0, []

    def __call__(self, function, inputs):
        replay, outputs = direct_recorder(function, inputs)
        self.functions.append(function)
        self.outputs.append(outputs)

        def counted():
            self.replays += 1
            given = {x.data_ptr() for x in inputs}  # no layers at all hand on what they were given
            for static in self.outputs:
                for tensor in static:
                    if tensor.data_ptr() not in given:
                        tensor.fill_(77)
            replay()
        return counted, outputs


ADAPTERS = {"random": lambda model, exit_layer: random_adapter(model, 1), "perfect": PerfectAdapter}


def make_drafter(model, adapter, exit_layer, threshold, head=None, candidates=1):
    """A chain's drafter, or with more candidates a tree's; of a graphed model one with graphs."""
    chain, tree = KangarooDrafter, TreeDrafter
    if isinstance(model, GraphedLlama):
        chain, tree, adapter = GraphedChain, GraphedTree, GraphedAdapter(adapter, model)
    if candidates == 1:
        return chain(model, adapter, exit_layer, threshold, head)
    return tree(model, adapter, exit_layer, threshold, head, candidates)


def decode(model, kind, prompt, n, adapter=None, exit_layer=1, threshold=0.1, candidates=1,
           head=None, width=8, **options):
    """(ids, the target's KV cache, the adapter's, drafts). A graphed model decodes with graphs,
    another without."""
    if kind == "kangaroo":
        drafter = make_drafter(model, adapter, exit_layer, threshold, head, candidates)
    else:
        drafter = {"none": NoDrafter, "lookup": PromptLookupDrafter}[kind](model)
    cache = model.new_cache(len(prompt) + n + 2 * width, width)
    if isinstance(model, GraphedLlama):
        options["sampler"] = GraphedSampler(options["sampler"], model, width)
    rounds = list(generate(model, drafter, prompt, n, cache=cache, **options))
    caches = cache, getattr(drafter, "adapter_cache", cache)
    rows = [c.rows[:, :, :, :cache.length].clone() for c in caches]
    return [token for r in rounds for token in r.tokens], *rows, [r.draft.tokens for r in rounds]


def assert_same(on, off):
    assert on[0] == off[0] and on[3] == off[3]
    for a, b in zip(on[1:3], off[1:3], strict=True):
        assert torch.equal(a, b)


@given(
    seed=st.integers(0, 999),
    dtype=st.sampled_from(DTYPES),
    packed=st.booleans(),
    kind=st.sampled_from(["none", "lookup", "kangaroo", "kangaroo"]),
    adapter=st.sampled_from(list(ADAPTERS)),
    exit_layer=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 0.1, 0.6]),
    width=st.sampled_from([2, 4, 8, 12, 16]),
    sampler=samplers,
    data=st.data())
@examples(25)
def test_graphs_on_is_graphs_off(seed, dtype, packed, kind, adapter, exit_layer, threshold, width,
                                 sampler, data):
    """Tokens, drafts and both caches, whole: one text after another through the same recordings,
    chains and trees mixed."""
    with block(16):
        model = random_model(TINY, seed, dtype, packed_for=width if packed else None)
        graphed, source = GraphedLlama(model, (width,), StandIn()), random.Random(seed)
        adapter = ADAPTERS[adapter](model, exit_layer)
        for n in (5, 30, 17):  # the second text needs more room than the first left, the third less
            prompt = [source.randrange(40) for _ in range(data.draw(st.integers(1, 20), "prompt"))]
            candidates = data.draw(st.sampled_from([1, 3] if width > CHAIN_WIDTH else [1]), "K")
            more = dict(adapter=adapter, exit_layer=exit_layer, threshold=threshold,
                        candidates=candidates)
            options = more | dict(sampler=sampler, steps=width - 1, width=width)
            assert_same(decode(graphed, kind, prompt, n, **options),
                        decode(model, kind, prompt, n, **options))
        assert graphed.graphs.record.replays


@pytest.mark.parametrize("width", [2, 4])
def test_dead_rows_of_a_draft_are_zeros(width):
    """An example of the property above, which meets it by luck: the caches have them, too."""
    with block(16):
        model = random_model()
        options = dict(adapter=ADAPTERS["random"](model, 0), exit_layer=0, threshold=0.0,
                       candidates=1, sampler=Sampler(), steps=width - 1, width=width)
        graphed = GraphedLlama(model, (width,), StandIn())
        assert_same(decode(graphed, "kangaroo", [1], 30, **options),
                    decode(model, "kangaroo", [1], 30, **options))


def recordings(graphed, name="layers"):
    """The keys of recordings: (name, …, length of the view, memory of the cache)."""
    return [key for key in graphed.graphs.recordings if key[0] == name]


@pytest.mark.parametrize("width", [8, 16])
def test_one_recording_per_view_made_when_first_needed(width):
    """Buckets: a text's recordings are those of the views that it goes through, made once; a tree
    needs none of its own."""
    with block(32):
        model, stand_in = random_model(), StandIn()
        graphed = GraphedLlama(model, (width,), stand_in)
        graphed.capacity = 200
        options = dict(sampler=Sampler(), width=width)
        assert not stand_in.functions
        decode(graphed, "none", [1], 25 - width, **options)  # steps start at 0 … 24 − width
        assert len(stand_in.functions) == 1
        # And up to 57 − width: views of 32 and 64.
        decode(graphed, "none", [1], 26 + 32 - width, **options)
        assert [key[-2] for key in recordings(graphed)] == [32, 64]
        decode(graphed, "none", [2, 3], 30, **options)
        assert len(stand_in.functions) == 2 and stand_in.replays > 50
        decode(graphed, "lookup", [2, 3, 2, 3], 30, **options)  # its steps of several tokens
        assert len(stand_in.functions) <= 4
        adapter = random_adapter(model)
        for candidates in (1, 3) if width > CHAIN_WIDTH else (1, 1):
            decode(graphed, "kangaroo", [1], 25, adapter, 1, 0.0, candidates, **options)
            by_layer = {(0, 1)} if candidates > 1 else set()
            assert {key[1:3] for key in recordings(graphed)} == {(0, 4), (1, 4)} | by_layer
            for name in "draft", "to exit":
                views = [key[-2] for key in recordings(graphed, name)]
                assert len(set(views)) == len(views) > 0


def test_memory_is_reused_until_it_is_too_small():
    """The KV cache that recordings know serves the next text, zeroed; a longer one gets more and
    the old recordings go."""
    with block(16):
        model, stand_in = random_model(), StandIn()
        graphed = GraphedLlama(model, (8,), stand_in)
        cache = graphed.new_cache(40, 8)
        rows, length = cache.rows, cache.length
        rows.fill_(torch.nan)
        other = graphed.new_cache(40, 8)  # while the first is in use: memory of its own
        assert other.rows is not rows
        del cache, other
        gc.collect()
        cache = graphed.new_cache(20, 8)
        assert cache.rows is rows and cache.length == 32 < length and not rows.any()
        graphed.step([1], 3, cache, 0, 4)
        assert len(recordings(graphed)) == 1
        del cache
        gc.collect()
        graphed.capacity = 100
        larger = graphed.new_cache(60, 8)
        assert larger.rows is not rows and larger.rows.shape[3] >= 100 and larger.length == 64
        assert not graphed.graphs.recordings  # all of them: see Graphs.forget


def test_two_texts_at_once(capsys):
    """The second goes without graphs, which is said, and neither disturbs the other: a choice that
    a recording has made is not another step's."""
    model = random_model()
    graphed = GraphedLlama(model, (8,), StandIn())
    sampler = GraphedSampler(Sampler(), graphed, 8)
    both = [generate(graphed, NoDrafter(graphed), prompt, 20, sampler=sampler)
            for prompt in ([1, 2], [3, 4, 5])]
    tokens = [[], []]
    for a, b in zip(*both):
        tokens[0] += a.tokens
        tokens[1] += b.tokens
    assert capsys.readouterr().err.count("without them") == 1
    assert tokens == [[t for r in generate(model, NoDrafter(model), p, 20) for t in r.tokens]
                      for p in ([1, 2], [3, 4, 5])]


class Calls(TorchDispatchMode):
    """Counts the aten calls that are no views."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = (r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not any(views)
        return func(*args, **kwargs or {})


def in_silence(function, inputs):
    """Records without a GPU; what a replay calls is not counted."""
    replay, outputs = direct_recorder(function, inputs)

    def silent():
        with _disable_current_modes():
            replay()
    return silent, outputs


def test_calls_outside_of_recordings():
    """Each is a launch that a GPU waits for. These figures may only fall: calls of a vanilla step,
    of a draft step, and, inside of recordings, of a layer."""
    model = random_model()
    graphed, adapter = GraphedLlama(model, (8,), in_silence), random_adapter(model)
    graphed.capacity, sampler = 200, GraphedSampler(Sampler(), graphed, 8)

    def calls(rounds):
        begin = next(rounds)
        with Calls() as found:
            rounds = [begin, *rounds]
        return found.count, len(rounds) - 1, sum(len(r.draft.tokens) for r in rounds[1:])

    def vanilla():
        return calls(generate(graphed, NoDrafter(graphed), [1, 2], 30, sampler=sampler))

    def kangaroo(steps):
        drafter = make_drafter(graphed, adapter, 1, -1.0)
        return calls(generate(graphed, drafter, [1, 2], 30, steps, sampler))

    vanilla(), kangaroo(7)  # record
    count, rounds, _ = vanilla()
    assert count / rounds <= 3
    a, b = kangaroo(2), kangaroo(7)
    a_round = 9  # without a draft step: the first token's way to the exit, verification
    assert all(count <= a_round * rounds + 4 * drafted for count, rounds, drafted in (a, b))
    counts = []
    for layers in (1, 3):
        with torch.inference_mode(), Calls() as found:
            model.step(torch.ones(1, 8, 32), 3, model.new_cache(64, 8), 0, layers)
        counts.append(found.count)
    assert counts[1] - counts[0] <= 2 * 16


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8, 5, 0.9, seed=3)],
                         ids=["greedy", "sampled"])
@pytest.mark.parametrize("width, replays", [(8, 2), (16, 3)], ids=["chain", "tree"])
def test_replays_of_a_draft_step(monkeypatch, width, replays, sampler):
    """Two in a chain: to the drafted token, and its own way to the exit. Three in a tree: shallow
    layers, adapter, LM head and choice. And in each round one for the first token of a chain or the
    last ones of a tree, one for verification, and, if it is sampled, one for its choice."""
    stand_in, steps, model = StandIn(), [], random_model()
    graphed, adapter = GraphedLlama(model, (width,), stand_in), random_adapter(model)
    cls, name = (GraphedChain, "propose") if width == 8 else (TreeDrafter, "children")
    step = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda *args: steps.append(1) or step(*args))
    options = dict(sampler=sampler, steps=5, width=width, candidates=1 if width == 8 else 3)
    for _ in ("recorded", "replayed"):
        stand_in.replays = 0
        steps.clear()
        replayed = decode(graphed, "kangaroo", [1, 2], 30, adapter, **options)
    drafts = replayed[3]
    assert len(steps) > len(drafts)
    a_round = 3 if sampler.temperature else 2
    assert stand_in.replays == replays * len(steps) + a_round * len(drafts)
    assert_same(replayed, decode(model, "kangaroo", [1, 2], 30, adapter, **options))


@pytest.mark.parametrize("drafter", ["kangaroo", "tree"])
@pytest.mark.parametrize("sampler", [None, Sampler(0.8, seed=3)], ids=["greedy", "sampled"])
def test_nothing_is_recorded_after_the_warm_up(drafter, sampler, tmp_path):
    """Guards timed sections: all views of all texts, and room for the longest, before the first."""
    write_adapter(tmp_path / "model" / "adapter", write_model(tmp_path / "model"))
    decoder = load(tmp_path / "model", device="cpu", dtype="float32",
                   width=16 if drafter == "tree" else 8)
    decoder.use_graphs(StandIn())
    prompts, methods = [[5, 6, 7], [8, 9] * 30], [(drafter, None), ("none", None), ("none", 1)]
    decoder.warm_up(prompts, 90, methods, sampler)
    views = {key[-2] for key in recordings(decoder.model)}
    assert views >= {64, 128, 192}
    rows = decoder.model.memory[decoder.model.config].rows
    before = set(decoder.model.graphs.recordings)
    for ids in prompts:
        for name, width in methods:
            list(decoder.rounds(ids, name, 90, sampler, width))
    assert decoder.model.memory[decoder.model.config].rows is rows
    assert set(decoder.model.graphs.recordings) == before


def test_static_buffers():
    """Inputs are copied in before each replay, and the caller's tensors are never the recording's.
    Outputs are the recording's: the next replay overwrites them."""
    stand_in = StandIn()
    graphs, x = Graphs(stand_in), torch.ones(3)
    first = graphs.run("double", lambda x: (2 * x,), x)[0]
    assert first.tolist() == [2] * 3
    # The recording counts, not the function of the second call.
    second = graphs.run("double", lambda x: (0 * x,), 5 * x)[0]
    assert second.tolist() == [10] * 3 and second is first and x.tolist() == [1] * 3
    assert len(stand_in.functions) == 1 and stand_in.replays == 2
    assert graphs.recordings["double"][1][0].data_ptr() != x.data_ptr()


def test_padding_and_other_shapes():
    """A step is recorded at its padded shape whatever is live; a pass of other than `width` rows,
    as prefill's, is not, nor a step in a cache of another width or of another text."""
    model, stand_in = random_model(), StandIn()
    graphed = GraphedLlama(model, (8,), stand_in)
    cache = graphed.new_cache(50, 8)
    for live in (2, 3, 8):
        ids = list(range(live))
        h, expected = (m.step(ids, 5, cache, 0, 4) for m in (graphed, model))
        assert torch.equal(h, expected) and torch.equal(graphed.logits(h), model.logits(h))
    assert len(stand_in.functions) == 1
    graphed.run_layers(model.embed([1, 2, 3]), torch.arange(3), cache, 0, 4)
    graphed.step(list(range(8)), 5, model.new_cache(64, 8), 0, 4)
    del cache
    wider = graphed.new_cache(50, 9)
    assert graphed.knows(wider)
    graphed.step(list(range(8)), 5, wider, 0, 4)
    graphed.logits(model.embed([1, 2, 3]))
    assert len(stand_in.functions) == 1


def test_what_a_recording_depends_on_is_in_its_key():
    """The sampler's settings, candidates, adapter and head are Python values inside of a recording:
    another value, another recording. The seed is none: noise comes as a tensor."""
    model, stand_in = random_model(), StandIn()
    graphed, x = GraphedLlama(model, (16,), stand_in), torch.randn(
        2, 32, generator=torch.Generator().manual_seed(0))
    adapter, found = random_adapter(model), set()
    for head in (PartialHead(model.lm_head, torch.arange(10)), None):
        for settings in ((0.0,), (2.0,), (2.0, 9), (2.0, 0, 0.6)):
            for candidates, seed in ((2, 0), (4, 0), (4, 1)):
                drawn = []
                for m in (model, graphed):
                    drafter = make_drafter(m, adapter, 1, 0, head, candidates)
                    drafter.prefill([], m.new_cache(64, 16), Sampler(*settings, seed=seed))
                    drawn.append(drafter.draw(x, 5, [1, 1]))
                    del drafter
                assert drawn[0] == drawn[1]
                found.add(str(drawn[0]))
    # Of all numbers of open nodes at once.
    assert len(stand_in.functions) == 2 * 4 * 2 * 14 and len(found) > 16


def test_what_a_draft_step_depends_on_is_in_its_key():
    """As above, of chains, whose recording goes from the exit to the next token: texts with one
    adapter, head or sampler after texts with another."""
    model, stand_in = random_model(), StandIn()
    graphed, texts = GraphedLlama(model, (8,), stand_in), 0
    few, adapters = PartialHead(model.lm_head, torch.arange(10)), [
        random_adapter(model, seed) for seed in (1, 2)]
    for _ in range(2):
        for adapter, head in ((adapters[0], few), (adapters[1], few), (adapters[1], None)):
            for settings in ((0.0,), (2.0,), (2.0, 9), (2.0, 0, 0.6)):
                for exit_layer, seed in ((1, 0), (1, 1), (2, 0)):
                    options = dict(adapter=adapter, head=head, exit_layer=exit_layer, threshold=0.0,
                                   sampler=Sampler(*settings, seed=seed), steps=3)
                    assert_same(decode(graphed, "kangaroo", [1, 2], 7, **options),
                                decode(model, "kangaroo", [1, 2], 7, **options))
                    texts += 1
    assert texts == 72 and len(recordings(graphed, "draft")) == 3 * 4
    assert len(recordings(graphed, "to exit")) == 2


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("width", [8, 16])
def test_nothing_outlives_its_owner(width, sampler):
    """Guards a GPU's memory: graphs, their pool and the weights were kept by a cycle until some
    garbage collection, which could come in the middle of another recording and break it off."""
    gc.collect()
    gc.disable()
    try:
        model = random_model()
        graphed = GraphedLlama(model, (width,), StandIn())
        decode(graphed, "kangaroo", [1, 2], 20, random_adapter(model),
               candidates=1 if width == 8 else 3, sampler=sampler, steps=5, width=width)
        assert len(graphed.graphs.recordings) >= 3
        dead = [weakref.ref(thing) for thing in (graphed, graphed.graphs, model)]
        del graphed, model
        assert [ref() for ref in dead] == [None] * 3
    finally:
        gc.enable()


def test_what_a_drafter_observes_is_its_own():
    """A verification's states are handed to the drafter after the sampler's replay, whose recording
    may use their memory."""
    class Keeper(NoDrafter):
        kept = []

        def observe(self, hidden, choices, path):
            self.kept = [*self.kept, hidden]

    model, sampler, found = random_model(), Sampler(0.8, seed=3), []
    graphed = GraphedLlama(model, (8,), StandIn())
    for target, how in ((model, sampler), (graphed, GraphedSampler(sampler, graphed, 8))):
        drafter = Keeper(target)
        list(generate(target, drafter, [1, 2], 20, sampler=how))
        found.append(drafter.kept)
    assert len(found[0]) > 20 and all(map(torch.equal, *found))


@pytest.mark.parametrize("drafter", ["kangaroo", "tree"])
@pytest.mark.parametrize("how", ["watched", "timed", "alone"])
def test_the_next_text_is_replayed_too(drafter, how, tmp_path):
    """Guards speed: a drafter that was watched, or timed, knew itself, and so kept its cache until
    some garbage collection. The next text found it taken and was drafted without graphs (seen on
    the first GPU: more than half of the texts, their draft steps three times as slow)."""
    write_adapter(tmp_path / "model" / "adapter", write_model(tmp_path / "model"))
    decoder = load(tmp_path / "model", device="cpu", dtype="float32",
                   width=16 if drafter == "tree" else 8)
    decoder.use_graphs(StandIn())
    run = {"watched": lambda: decoder.generate([5, 6, 7], drafter, 9, on_draft=lambda text: None),
           "timed": lambda: common.decode(decoder, [5, 6, 7], drafter, 9),
           "alone": lambda: decoder.generate([5, 6, 7], drafter, 9)}[how]
    gc.collect()
    gc.disable()
    try:
        run()
        assert len(decoder.model.lent) == 2  # the model's cache and the adapter's
        assert [view() for view in decoder.model.lent.values()] == [None] * 2
    finally:
        gc.enable()


def test_nothing_recorded_survives_a_growing_cache():
    """Guards recordings of one stream whose cuBLAS workspace goes with the first that is dropped:
    all go together."""
    graphed = GraphedLlama(random_model(), (8,), StandIn())
    decode(graphed, "none", [1, 2], 5, sampler=Sampler(), steps=0, width=8)
    before = [weakref.ref(recording[0]) for recording in graphed.graphs.recordings.values()]
    assert len(before) == 1
    graphed.new_cache(1000, 8)
    graphed.graphs.record.functions.clear()  # the stand-in's own list
    gc.collect()
    assert not graphed.graphs.recordings and not any(ref() for ref in before)


def test_no_collection_while_recording():
    """It would free other recordings, which breaks this one off; and it is put back as it was."""
    with no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_attention_by_group_is_attention():
    """The GPU's attention, up to rounding: heads of a group that share their keys."""
    generator = torch.Generator().manual_seed(0)
    for heads, kv_heads in ((4, 4), (6, 2), (3, 1)):
        q, k, v = (torch.randn(1, n, h, 8, generator=generator).double()
                   for n, h in ((5, heads), (32, kv_heads), (32, kv_heads)))
        unseen = torch.arange(32) > torch.arange(9, 14)[:, None]
        mask = torch.where(unseen, -torch.inf, 0.0).double()
        assert torch.allclose(attend_by_group(q, k, v, mask), attend(q, k, v, mask), atol=1e-12)


@pytest.mark.parametrize("start", [LONG - 1, LONG - 3, LONG + 100])
def test_attention_by_chunk_is_attention(start):
    """The GPU's attention over long views, up to rounding; also where a row stands before the last
    chunk, of which it sees nothing."""
    generator = torch.Generator().manual_seed(0)
    for heads, kv_heads in ((4, 4), (6, 2), (3, 1)):
        q, k, v = (torch.randn(1, n, h, 8, generator=generator).double() for n, h in (
            (5, heads), (LONG + CHUNK, kv_heads), (LONG + CHUNK, kv_heads)))
        unseen = torch.arange(k.shape[1]) > torch.arange(start, start + 5)[:, None]
        mask = torch.zeros(unseen.shape).double().masked_fill(unseen, -torch.inf)
        many = mask.repeat(heads // kv_heads, 1)
        many[:, -CHUNK:][:, 0].clamp_(min=-30000)
        merge = mock.Mock(side_effect=merge_chunks)  # which may be a compiled one
        assert torch.allclose(attend_by_group(q, k, v, many, merge), attend(q, k, v, mask),
                              atol=1e-12)
        assert len(merge.call_args.args[0]) == k.shape[1] // CHUNK


HOOKS = {"rotate_and_write": Attention, "merge": Attention, "silu_and_multiply": MLP}


def compiled(model):
    """For each operation that may be fused whether a compiled one stands in all modules of a model
    (None: in some)."""
    found = {name: [hasattr(getattr(m, name), "_torchdynamo_orig_callable")
                    for m in model.modules() if isinstance(m, kind)]
             for name, kind in HOOKS.items()}
    found["norm"] = [isinstance(m, CompiledRMSNorm) for m in model.modules()
                     if isinstance(m, RMSNorm)]
    return {name: flags[0] if len(set(flags)) == 1 else None for name, flags in found.items()}


def two_steps(model):
    """States of two steps of two widths, and the cache that they write."""
    cache = model.new_cache(40, 8)
    wide = llama.KVCache(cache.rows, cache.length, 16)
    return [model.step([1, 2, 3], 0, cache, 0, 4), model.step([4], 3, wide, 0, 4), cache.rows]


@pytest.mark.parametrize("fused_norm", [True, False])
def test_compiled_pointwise_operations_are_the_same_functions(monkeypatch, fused_norm):
    """`fuse_pointwise` without a compiler behind it: the same states and cache at every shape, up
    to the rounding of another formula of the norm; twice is once."""
    monkeypatch.setattr(module, "FUSED_NORM", fused_norm)
    model, found = use_fast_norms(random_model()), []
    for fuse in (False, True, True):
        if fuse:
            fuse_pointwise(model, backend="eager")
        found.append(two_steps(model))
    assert compiled(model) == {"rotate_and_write": True, "merge": True,
                               "silu_and_multiply": True, "norm": not fused_norm}
    for before, after, again in zip(*found, strict=True):
        same = torch.equal if fused_norm else partial(torch.allclose, atol=1e-5)
        assert same(before, after)
        assert torch.equal(after, again)


@pytest.mark.parametrize("fused_norm", [True, False])
def test_compiling_one_model_leaves_all_others_alone(monkeypatch, fused_norm):
    """Guards against a --compile that is in force for whatever the process does next: another
    model, the functions of llama.py, modules that are made later."""
    monkeypatch.setattr(module, "FUSED_NORM", fused_norm)
    model, other = use_fast_norms(random_model()), use_fast_norms(random_model())
    functions = llama.rotate_and_write, llama.silu_and_multiply, torch.nn.functional.rms_norm
    before = two_steps(other)
    fuse_pointwise(model, backend="eager")
    assert (llama.rotate_and_write, llama.silu_and_multiply,
            torch.nn.functional.rms_norm) == functions
    assert any(compiled(model).values())
    for untouched in (other, use_fast_norms(random_model())):
        assert not any(compiled(untouched).values())
        assert all(map(torch.equal, before, two_steps(untouched)))
        assert {type(m) for m in untouched.modules() if isinstance(m, RMSNorm)} == {FastRMSNorm}


@pytest.mark.parametrize("width, candidates", [(8, 1), (16, 3)], ids=["chain", "tree"])
def test_no_copy_from_pageable_memory(width, candidates):
    """Such a copy may make the host wait for a GPU's whole queue: all data goes to the device
    through `to_device`."""
    model, ways = random_model(), []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            if name in ("__getitem__", "__setitem__"):
                index = args[1] if isinstance(args[1], tuple) else (args[1],)
                ways.extend(("index", i) for i in index if isinstance(i, list))
            elif function is torch.Tensor.to and isinstance(args[-1], torch.device):
                ways.append(("to", kwargs))
            elif function is torch.tensor and kwargs and "device" in kwargs:
                ways.append(("tensor", args))
            return function(*args, **kwargs or {})

    drafter = make_drafter(model, PerfectAdapter(model, 1), 1, 0.02, candidates=candidates)
    model(torch.tensor([[1, 2]]))  # RoPE's frequencies go to the device once
    with Watch():
        rounds = list(generate(model, drafter, [1, 2, 3], 30, 5, Sampler(0.7, 5, 0.9), width=width))
    assert all(way == ("to", {"non_blocking": True}) for way in ways) and ways
    moved = any(r.path != list(range(1, 1 + len(r.path))) for r in rounds)
    assert moved == (candidates > 1)  # `keep` had something to move


def test_tf32_is_off_unless_asked_for():
    """And no sum is rounded to the dtype of its result while its parts are added."""
    matmul = torch.backends.cuda.matmul
    for asked in (True, False):
        exact_kernels(tf32=asked)
        assert torch.get_float32_matmul_precision() == ("high" if asked else "highest")
        assert not matmul.allow_bf16_reduced_precision_reduction
        assert not matmul.allow_fp16_reduced_precision_reduction


@pytest.mark.parametrize(
    "more", [("kangaroo", None, {}), ("kangaroo", Sampler(0.8, seed=3), {}),
             ("tree", None, {"top_candidates": 3}), ("sps", None, {})],
    ids=["greedy", "sampled", "tree", "sps"])
def test_the_command_line_with_graphs(more, tmp_path):
    """`Decoder` decodes the same with graphs, drafting and vanilla, and says at the start which
    views will be recorded."""
    write_adapter(tmp_path / "model" / "adapter", write_model(tmp_path / "model"))
    drafter, sampler, settings = more
    width = 16 if drafter == "tree" else 8
    plain, graphed = (load(tmp_path / "model", device="cpu", dtype="float32", width=width,
                           draft_model=tmp_path / "model" if drafter == "sps" else None)
                      for _ in range(2))
    graphed.use_graphs(StandIn())
    prompts = [plain.encode(text) for text in
               ("Once upon a time", "A much longer prompt: " + "the kangaroo jumped. " * 8)]
    graphed.make_room(prompts, 40)
    assert "CUDA graphs for views of 64, 128" in graphed.describe(drafter)
    assert "CUDA" not in plain.describe(drafter)
    for ids in prompts:
        on, off = (decoder.generate(ids, drafter, 40, sampler, **settings)[1]["ids"]
                   for decoder in (graphed, plain))
        vanilla = [[token for r in decoder.rounds(ids, "none", 40, sampler) for token in r.tokens]
                   for decoder in (graphed, plain)]
        assert on == off == vanilla[0] == vanilla[1]
    assert graphed.model.graphs.record.replays > 100


# --------------------------------------------------------------------------------------------------
# On a GPU

@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8, 5, 0.95, 1)],
                         ids=["greedy", "sampled"])
@pytest.mark.parametrize("width, candidates", [(8, 1), (16, 1), (16, 3)],
                         ids=["chain", "wide", "tree"])
@pytest.mark.parametrize("group", [1, 2])
def test_cuda_graphs_on_is_graphs_off(dtype, sampler, width, candidates, group):
    """The real thing: tokens, drafts and both caches, whole, and equal to vanilla decoding with
    graphs."""
    config = replace(TINY, hidden_size=256, intermediate_size=512, num_attention_heads=4,
                     num_key_value_heads=4 // group, head_dim=64, vocab_size=2000)
    model = random_model(config, 3, dtype, "cuda")
    graphed, adapter = GraphedLlama(model, (width,)), random_adapter(model)
    options = dict(adapter=adapter, sampler=sampler, steps=width - 1, width=width,
                   candidates=candidates)
    for n in (20, 150):
        on, off = (decode(m, "kangaroo", [5, 6, 7], n, **options) for m in (graphed, model))
        assert_same(on, off)
        assert decode(graphed, "none", [5, 6, 7], n, **options)[0] == on[0]
    assert len(graphed.graphs.recordings) >= 3


@gpu
@pytest.mark.parametrize("width, candidates", [(8, 1), (16, 3)], ids=["chain", "tree"])
def test_cuda_host_syncs(width, candidates):
    """PyTorch's own count: one a round, and of a tree one a draft step, nothing hidden. A chain's
    draft steps wait for events, which it does not count."""
    model = random_model(TINY, 0, torch.float32, "cuda")
    graphed, steps = GraphedLlama(model, (width,)), []
    options = dict(adapter=random_adapter(model), threshold=0.0, sampler=Sampler(0.7, 5, 0.9),
                   steps=5, width=width)
    # Recording synchronises.
    decode(graphed, "kangaroo", [1, 2, 3], 40, candidates=candidates, **options)
    drafter = make_drafter(graphed, options["adapter"], 1, 0.0, candidates=candidates)
    name = "children" if candidates > 1 else "propose"
    step = getattr(drafter, name)
    setattr(drafter, name, lambda *args: steps.append(1) or step(*args))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rounds = list(generate(graphed, drafter, [1, 2, 3], 40, 5, options["sampler"],
                                   width=width))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = len(rounds) + (len(steps) if candidates > 1 else 0)
    assert sum("synchroniz" in str(w.message) for w in caught) == waits and steps


@gpu
def test_cuda_recordings_share_memory():
    """A recording more costs next to nothing in PyTorch's allocator."""
    model = random_model(replace(TINY, hidden_size=256), 0, torch.bfloat16, "cuda")
    graphed = GraphedLlama(model, (8,), CudaRecorder(torch.device("cuda")))
    graphed.capacity = 900
    decode(graphed, "none", [1], 40, sampler=Sampler(), width=8)
    before = torch.cuda.memory_allocated()
    decode(graphed, "none", [1], 800, sampler=Sampler(), width=8)
    assert torch.cuda.memory_allocated() - before < 8 * 2 ** 20
