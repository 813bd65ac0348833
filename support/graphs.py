"""What a GPU needs: exact kernels, and the decode steps as CUDA graphs.

At decode size a GPU runs a kernel faster than Python can start it. A CUDA graph is a recording of
kernel launches that is started as one. It repeats the same launches on the same memory, so what is
recorded must have

- static shapes: a step is always `width` rows, and one recording is made per length of the cache's
  view (`KVCache.BLOCK`);
- static memory: inputs are copied into the recording's own, and the KV cache is kept from one text
  to the next;
- no host decision: where rows are written and what they see is said by tensors (positions; for a
  tree also the view's slots and columns), never by Python numbers.

The one-shape step of `llama.py` is all that already. So graphs wrap the same functions,
`Llama.step`, `Llama.logits`, the adapter and the drafter's `draft_step` and `choose`, and the
algorithm in `kangaroo.py` does not know of them. The same kernels run: graphs on and off give the
same bits.

Left out on purpose: prefill, whose shapes vary and whose kernels are long; `KVCache.keep`, one copy
a round at most. Follows PyTorch's notes "CUDA semantics: CUDA Graphs" and "Numerical accuracy".
"""
import contextlib
import copy
import gc
import os
import sys
import weakref
from functools import lru_cache

import llama
from llama import CHAIN_WIDTH, KVCache, one_shape, pinned, rows_are_alike

import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# Exact kernels

def exact_kernels(tf32=False):
    """The settings under which a kernel's result depends on its inputs and their shapes alone.

    Call before CUDA is used. `llama.rows_are_alike` checks on the device at hand what these are
    for: that the rows of one call are treated alike. Not set: torch.use_deterministic_algorithms.
    Of what a step calls it would change index_copy_ alone, into a sort and several kernels a layer;
    that one is exact here, because no position is written twice. `Sampler.scores` does not need it
    either.
    """
    # cuBLAS may split a sum over workers, in an order that is fixed by the shape, the memory it may
    # use and nothing else, if that memory is one stream's own and of one size. This is the size
    # that PyTorch asks for on a H100 anyway. Splitting itself is no harm: the rows of a step lie in
    # one tile, and so are split at the same places.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Parts of a split sum are to be added in float32. (PyTorch's default adds them in the dtype of
    # the result.)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    # TF32 drops 13 of float32's 23 bits. It rounds all rows alike, but who says float32 means it.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    # cuDNN's attention chooses among kernels by a heuristic of its own, some of which split the
    # keys. What remains for a step, whose mask flash attention does not take, is the
    # memory-efficient kernel: it goes through the keys block by block, with the rows of a head side
    # by side (see llama.attend), or, for head sizes that it does not know, plain matrix products.
    torch.backends.cuda.enable_cudnn_sdp(False)


def fuse_pointwise(backend="inductor"):
    """Let torch.compile fuse chains of small operations: RoPE and writing to the cache, SiLU times
    up, and the norm where PyTorch has no kernel for it.

    For both, who drafts and who does not, or for neither. Whole layers are not compiled: that would
    choose kernels by the length of the view, and take minutes.
    """
    functions = {name: getattr(llama, name) for name in ("rotate_and_write", "silu_and_multiply")}
    if not llama.FUSED_NORM:
        functions["rms_norm"] = lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)
    for name, function in functions.items():
        # Not one that is compiled already.
        function = getattr(function, "_torchdynamo_orig_callable", function)
        setattr(llama, name, torch.compile(function, dynamic=True, backend=backend))


# --------------------------------------------------------------------------------------------------
# Recording

class CudaRecorder:
    """Records functions as CUDA graphs, which never run at once and so may share memory."""

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function, inputs):
        # First run it unrecorded: what happens only once, such as compiling, must not be recorded.
        # Running it once more is harmless, because a step writes the same rows to the same places.
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with no_collection(), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                outputs = function(*inputs)
        return graph.replay, outputs


@contextlib.contextmanager
def no_collection():
    """No garbage collection: one that frees another recording would break off this one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def direct_recorder(function, inputs):
    """The stand-in where there is no GPU: replays by running the function on the static inputs."""
    outputs = function(*inputs)

    def replay():
        for static, new in zip(outputs, function(*inputs), strict=True):
            static.copy_(new)
    return replay, outputs


class FixedView:
    """The view of a cache that a recording has, wherever its steps start."""

    def __init__(self, view):
        self.parts = view.rows, view.length, view.layers  # the view itself may be on loan
        self.key = view.length, id(view.rows)

    def view(self, end=None):
        return KVCache(*self.parts)


class Graphs:
    """Recordings by key, which names the function and all it depends on but its tensors' values.

    record(function, inputs) is to return (a function without arguments that replays, the outputs
    that this fills).
    """

    def __init__(self, record, device=None):
        self.record, self.recordings, self.memory = record, {}, {}
        self.device = device or getattr(record, "device", "cpu")

    @torch.inference_mode()
    def run(self, key, function, *tensors):
        """function(*tensors), a tuple of tensors: recorded when the key is new, else replayed.

        Tensors of the host (`llama.pinned`) are copied to `device`.
        """
        if key not in self.recordings:
            inputs = [self.static(*numbered) for numbered in enumerate(tensors)]
            recording = self.record(function, inputs)
            self.recordings[key] = function, inputs, *recording  # what it uses stays alive
        _, inputs, replay, outputs = self.recordings[key]
        for static, tensor in zip(inputs, tensors, strict=True):
            static.copy_(tensor, non_blocking=True)
        replay()
        # The next replay, of any recording, may use this memory.
        return tuple(output.clone() for output in outputs)

    def run_rows(self, key, function, most, *tensors):
        """function(*tensors), one tensor, where all have as many rows, 1 … `most`.

        When the first number of rows is needed, all are recorded, the largest first.
        """
        if (*key, len(tensors[0])) not in self.recordings:
            for n in range(most, 0, -1):
                self.run((*key, n), function, *(t.new_zeros(n, *t.shape[1:]) for t in tensors))
        return self.run((*key, len(tensors[0])), function, *tensors)[0]

    def static(self, number, tensor):
        """A copy of this input, in memory that recordings share, since they never run at once."""
        rows = tensor if tensor.dim() else tensor[None]
        key = number, rows.dtype, rows.shape[1:]
        if key not in self.memory or len(self.memory[key]) < len(rows):
            self.memory[key] = torch.empty(rows.shape, dtype=rows.dtype, device=self.device)
        return self.memory[key][:len(rows)].view(tensor.shape).copy_(tensor, non_blocking=True)

    def forget(self):
        """Drop all recordings.

        Not some: they share one stream, whose cuBLAS workspace may go with the first that does.
        """
        self.recordings, self.memory = {}, {}


# --------------------------------------------------------------------------------------------------
# What is recorded

class GraphedLlama:
    """A Llama whose decode steps are replayed. In everything else it is the model.

    widths: the numbers of rows that are a decode step. Other passes, as those of prefill, run as
    ever.
    """

    def __init__(self, model, widths, record=None):
        self.model, self.widths, self.device = model, widths, model.norm.weight.device
        self.graphs = Graphs(record or CudaRecorder(self.device), self.device)
        self.said = None  # by the last step: the states after the last layer, and their logits
        self.room = 0     # positions that a KV cache has room for: growing means recording anew
        self.memory = {}  # by config: the KV cache that recordings know
        self.lent = {}    # by config: a weak reference to the view of it that the last text got

    def __getattr__(self, name):
        return getattr(self.model, name)

    def new_cache(self, length, config=None):
        """As the model's own, in the memory of the last text's cache if nobody uses that now."""
        config = config or self.model.config
        if config in self.lent and self.lent[config]() is not None:
            # Two texts at once; or one that has ended, and something still knows its drafter.
            print("warning: another text has the KV cache that CUDA graphs know: this one is "
                  "decoded without them", file=sys.stderr)
            return self.model.new_cache(length, config)
        memory = self.memory.get(config)
        if memory is None or memory.length < length:
            if memory is not None:
                self.graphs.forget()
                del self.memory[config], memory  # before the new one is made
            memory = self.memory[config] = self.model.new_cache(max(length, self.room), config)
        memory.rows.zero_()  # as good as new, even if the last text ended in NaN
        cache = memory.view(length)
        self.lent[config] = weakref.ref(cache)
        return cache

    def knows(self, cache):
        """Whether recordings may address it: the cache of a second text at once they may not."""
        return any(cache.rows is memory.rows for memory in self.memory.values())

    def step(self, x, start, cache, width, first, last, parents=None):
        """As the model's own, replayed. Behind the last layer the LM head is recorded too."""
        model = self.model
        if width not in self.widths or not self.knows(cache):
            return model.step(x, start, cache, width, first, last, parents)

        def say(h):
            return (h, model.logits(h)) if last == len(model.layers) else (h,)

        view, name = FixedView(cache.view(start + width)), ("layers", first, last)
        if not torch.is_tensor(x) and len(x) == 1 and not parents:  # embedded in the recording
            def token_step(numbers):
                return say(model.step(numbers[:1], numbers[1], view, width, first, last))

            outputs = self.graphs.run((*name, "token", width, *view.key), token_step,
                                      pinned([*x, start], self.device))
        elif width <= CHAIN_WIDTH:
            def chain_step(x, start):
                return say(model.step(x, start, view, width, first, last))

            x = x if torch.is_tensor(x) else model.embed(x)
            x, start = F.pad(x, (0, 0, 0, width - x.shape[1])), pinned(start, self.device)
            outputs = self.graphs.run((*name, "chain", width, *view.key), chain_step, x, start)
        else:
            x = x if torch.is_tensor(x) else model.embed(x)
            outputs = self.replay(name, lambda *step: say(model.run_layers(*step, first, last)),
                                  *one_shape(x, start, cache, width, parents))
        if len(outputs) == 2:
            self.said = outputs
        return outputs[0]

    def replay(self, name, function, x, positions, cache):
        """function(x, positions, cache), whatever the tree of the rows is."""
        fixed = FixedView(cache)

        def recorded(x, positions, slots, columns=None):
            view = fixed.view()
            view.slots, view.columns = slots, columns
            return function(x, positions, view)

        slots = positions if cache.slots is None else cache.slots
        columns = [] if cache.columns is None else [cache.columns]
        key = (*name, "tree" if columns else "chain", x.shape[1], *fixed.key)
        return self.graphs.run(key, recorded, x, positions, slots, *columns)

    def logits(self, x):
        """What the last step's recording has computed, if they are asked for its states."""
        return self.said[1] if self.said and x is self.said[0] else self.model.logits(x)

    def views(self, first, last, width):
        """The lengths of the views of steps that start at positions `first` … `last`."""
        first, last = (KVCache.in_view(start + width, self.device) for start in (first, last))
        return range(first, last + 1, KVCache.BLOCK[self.device.type])

    def starts(self, first, last, width):
        """Of these positions one for each view, with room for a whole draft if there is such."""
        views = self.views(first, last, width)
        return [max(first, view - views.step - width + 1) for view in views]

    def are_alike(self, first, last):
        """`rows_are_alike` in the first and the last of these views, replayed and not."""
        width = max(self.widths)
        views = self.views(first, last, width)
        starts = {max(0, view - views.step - width + 1) for view in (views[0], views[-1])}
        return all(rows_are_alike(model, width, start) for start in starts
                   for model in (self.model, self))

    def describe(self, first, last):
        """In words, for steps that start at positions `first` … `last`."""
        first, *more = self.views(first, last, max(self.widths))
        views = f"{first}, {more[0]} … {more[-1]}" if more else f"{first}"
        return f"CUDA graphs for views of {views} positions, recorded at first use"


class GraphedAdapter:
    """An adapter whose decode steps are replayed by the model's graphs."""

    def __init__(self, adapter, model):
        self.adapter, self.model = adapter, model

    def __getattr__(self, name):
        return getattr(self.adapter, name)

    def __call__(self, x, positions, cache=None):
        adapter, model = self.adapter, self.model
        if cache is None or x.shape[1] not in model.widths or not model.knows(cache):
            return adapter(x, positions, cache)
        return model.replay(("adapter", id(adapter)), lambda *step: (adapter(*step),), x,
                            positions, cache)[0]


def settings_of(sampler):
    """What recordings of a sampler depend on, but for its noise, which is an input of theirs."""
    return sampler.temperature, sampler.top_k, sampler.top_p


def noise_of(sampler, positions, model):
    """That input: [(T, vocab_size)], or nothing if the sampler is greedy."""
    if not sampler.temperature:
        return []
    return [torch.stack([sampler.noise(position, model.config.vocab_size, model.device)
                         for position in positions])]


def with_noise(sampler, noise=None):
    """A copy that has this noise (T, vocab_size) at the positions 0, 1, …

    None: of a sampler that is greedy, or never draws.
    """
    sampler = copy.copy(sampler)
    sampler.noise = lambda position, *_: noise[position]
    return sampler


class GraphedSampler:
    """A sampler whose choice is replayed for up to `width` rows, as those of a verification."""

    def __init__(self, sampler, model, width):
        self.sampler, self.model, self.width = sampler, model, width

    def choose(self, logits, position, depth=None):
        if not self.sampler.temperature:  # a single kernel
            return self.sampler.choose(logits, position, depth)
        bare = with_noise(self.sampler)  # without the noise that it keeps

        def recorded(logits, noise):
            return (with_noise(bare, noise).choose(logits, 0),)

        positions = (position + i for i in depth or range(len(logits)))
        return self.model.graphs.run_rows(("sample", *settings_of(bare)), recorded, self.width,
                                          logits, *noise_of(self.sampler, positions, self.model))


class GraphedDrafter:
    """What `graph_drafter` adds to a KangarooDrafter; `bare` is that, without model and text."""

    def choose(self, x, position, depth=None):
        """Replayed: from the adapter's states to the drafted tokens and their probabilities.

        The rows of a tree are its open nodes, at most one less than it may have nodes.
        """
        if self.fused:  # what the draft step's recording does not do is rare
            return super().choose(x, position, depth)
        bare, most = self.bare, max(1, getattr(self.bare, "nodes", 1) - 1)

        def recorded(x, *noise):
            return (drawing(bare, *noise).choose(x, 0),)

        key = "choose", *self.key(), getattr(bare, "candidates", 1)
        noise = noise_of(self.sampler, (position + i for i in depth or range(len(x))), self.model)
        return self.model.graphs.run_rows(key, recorded, most, x, *noise)

    def key(self):
        """What is not a tensor, and recordings of this drafter depend on."""
        return id(self.bare.adapter), *settings_of(self.bare.sampler)

    def draft_step(self, token, position, cache):
        """One replay, from a token to the one that is drafted to follow it."""
        bare, model, depth, width = self.bare, self.model.model, self.depth, self.width
        late = position - self.seen  # rows that the adapter has not seen before this one
        known = self.model.knows(cache) and self.model.knows(self.adapter_cache)
        if not self.fused or late > 1 or not known or width not in self.model.widths:
            return super().draft_step(token, position, cache)
        shallow = FixedView(cache.view(position + width))
        own = FixedView(self.adapter_cache.view(self.seen + width))

        def recorded(numbers, before, *noise):
            token, position, late = numbers.split(1)
            h = model.step(token, position, shallow, width, 0, depth)[:, :1]
            # The adapter's rows are this one or, if it is a row late, the one before and this one.
            rows = torch.cat((before, h, torch.zeros_like(h)), 1)
            rows = rows.index_select(1, torch.arange(1, 3, device=h.device) - late)
            x = bare.adapter(*one_shape(rows, position - late, own, width))
            return h, drawing(bare, *noise).choose(x[0].index_select(0, late), 0)

        key = "draft", *self.key(), depth, width, *shallow.key, *own.key
        before = max(0, position - 1)
        h, drafted = self.model.graphs.run(
            key, recorded, pinned([token, position, late], self.model.device),
            self.states[:, before:before + 1],
            *noise_of(self.sampler, [position + 1], self.model))
        self.states[:, position], self.seen = h[:, 0], position + 1
        return drafted


def drawing(drafter, noise=None):
    """A copy of the drafter whose sampler is `with_noise`."""
    drafter = copy.copy(drafter)
    drafter.sampler = with_noise(drafter.sampler, noise)
    return drafter


@lru_cache(maxsize=None)  # noqa: UP033 — one class each
def graphed_class(cls):
    return type(cls.__name__, (GraphedDrafter, cls), {})


def graph_drafter(drafter):
    """Replay the draft steps of a new KangarooDrafter; returns it.

    A chain's whole; of a tree the LM head with the choice, besides what the model and its adapter
    replay.
    """
    bare = drawing(drafter)  # what recordings keep alive: no cache, and nothing that keeps them
    bare.model, bare.adapter = drafter.model.model, getattr(drafter.adapter, "adapter",
                                                            drafter.adapter)
    drafter.bare, drafter.__class__ = bare, graphed_class(type(drafter))
    drafter.fused = not hasattr(bare, "candidates")
    if drafter.fused:
        drafter.adapter = bare.adapter
    return drafter
