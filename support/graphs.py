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
`run_layers`, `logits`, the adapter and the drafter's `predict`, and the algorithm in `kangaroo.py`
does not know of them. The same kernels run: graphs on and off give the same bits.

Left out on purpose: prefill, whose shapes vary and whose kernels are long; `KVCache.keep`, one copy
a round at most. Follows PyTorch's notes "CUDA semantics: CUDA Graphs" and "Numerical accuracy".
"""
import contextlib
import copy
import gc
import os
import weakref
from functools import partial

import torch

import llama
from llama import KVCache

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
    """Let torch.compile make one kernel of each chain of pointwise operations.

    For both, who drafts and who does not, or for neither. Whole layers are not compiled: that would
    choose kernels by the length of the view, and take minutes.
    """
    for name in ("rotate", "silu_and_multiply"):
        function = getattr(llama, name)
        # Not one that is compiled already.
        function = getattr(function, "_torchdynamo_orig_callable", function)
        setattr(llama, name, torch.compile(function, fullgraph=True, dynamic=True, backend=backend))


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


class Graphs:
    """Recordings by key, which names the function and all it depends on but its tensors' values.

    record(function, inputs) is to return (a function without arguments that replays, the outputs
    that this fills).
    """

    def __init__(self, record):
        self.record, self.recordings = record, {}

    @torch.inference_mode()
    def run(self, key, function, *tensors):
        """function(*tensors), a tuple of tensors: recorded when the key is new, else replayed."""
        if key not in self.recordings:
            inputs = [tensor.clone() for tensor in tensors]
            recording = self.record(function, inputs)
            self.recordings[key] = function, inputs, *recording  # what it uses stays alive
        _, inputs, replay, outputs = self.recordings[key]
        for static, tensor in zip(inputs, tensors, strict=True):
            static.copy_(tensor)
        replay()
        # The next replay, of any recording, may use this memory.
        return tuple(output.clone() for output in outputs)

    def forget(self):
        """Drop all recordings.

        Not some: they share one stream, whose cuBLAS workspace may go with the first that does.
        """
        self.recordings = {}


# --------------------------------------------------------------------------------------------------
# What is recorded

class GraphedLlama:
    """A Llama whose decode steps are replayed. In everything else it is the model.

    widths: the numbers of rows that are a decode step. Other passes, as those of prefill, run as
    ever.
    """

    def __init__(self, model, widths, record=None):
        self.model, self.widths, self.device = model, widths, model.norm.weight.device
        self.graphs = Graphs(record or CudaRecorder(self.device))
        self.room = 0     # positions that a KV cache has room for: growing means recording anew
        self.memory = {}  # by config: the KV cache that recordings know
        self.lent = {}    # by config: a weak reference to the view of it that the last text got

    def __getattr__(self, name):
        return getattr(self.model, name)

    def new_cache(self, length, config=None):
        """As the model's own, in the memory of the last text's cache if nobody uses that now."""
        config = config or self.model.config
        if config in self.lent and self.lent[config]() is not None:
            return self.model.new_cache(length, config)  # two texts at once: one without graphs
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

    def step(self, name, function, x, positions, cache):
        """function(x, positions, cache), replayed if it is a decode step on a known cache."""
        known = cache is not None and any(cache.rows is m.rows for m in self.memory.values())
        if not known or x.shape[1] not in self.widths:
            return function(x, positions, cache)
        rows, length, by_layer = cache.rows, cache.length, (cache.k, cache.v)

        def recorded(x, positions, slots, columns=None):
            view = KVCache(rows, length, by_layer)  # not `cache` itself, which may be on loan
            view.slots, view.columns = slots, columns
            return (function(x, positions, view),)

        slots = positions if cache.slots is None else cache.slots
        columns = [] if cache.columns is None else [cache.columns]
        key = name, tuple(x.shape), length, len(columns), id(rows)
        return self.graphs.run(key, recorded, x, positions, slots, *columns)[0]

    def run_layers(self, x, positions, cache, first, last):
        function = partial(self.model.run_layers, first=first, last=last)
        return self.step(("layers", first, last), function, x, positions, cache)

    def logits(self, x):
        if x.shape[1] not in self.widths:
            return self.model.logits(x)
        model = self.model  # a recording must not know this object, which keeps it: a cycle
        return self.graphs.run(("logits", tuple(x.shape)), lambda x: (model.logits(x),), x)[0]

    def views(self, first, last):
        """The lengths of the views of steps that start at positions `first` … `last`."""
        first, last = (KVCache.in_view(start + max(self.widths), self.device)
                       for start in (first, last))
        return range(first, last + 1, KVCache.BLOCK[self.device.type])

    def starts(self, first, last):
        """Of these positions one for each view, with room for a whole draft if there is such."""
        views = self.views(first, last)
        return [max(first, view - views.step - max(self.widths) + 1) for view in views]

    def describe(self, first, last):
        """In words, for steps that start at positions `first` … `last`."""
        first, *more = self.views(first, last)
        views = f"{first}, {more[0]} … {more[-1]}" if more else f"{first}"
        return f"CUDA graphs for views of {views} positions, recorded at first use"


class GraphedAdapter:
    """An adapter whose decode steps are replayed by the model's graphs."""

    def __init__(self, adapter, model):
        self.adapter, self.model = adapter, model

    def __getattr__(self, name):
        return getattr(self.adapter, name)

    def __call__(self, x, positions, cache=None):
        return self.model.step(("adapter", id(self.adapter)), self.adapter, x, positions, cache)


def graph_drafter(drafter):
    """Replay a new KangarooDrafter's LM head too, from adapter state to confidence; returns it."""
    graphs, unused = drafter.model.graphs, copy.copy(drafter)
    # The recording keeps `unused` alive: without a cache, and without what keeps the recording.
    unused.model = unused.model.model
    unused.adapter = getattr(unused.adapter, "adapter", unused.adapter)

    def predict(x):
        candidates = getattr(unused, "candidates", 1)
        key = ("predict", id(unused.adapter), unused.sampler.temperature, candidates,
               tuple(x.shape))
        return graphs.run(key, unused.predict, x)

    drafter.predict = predict
    return drafter
