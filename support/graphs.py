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
`Llama.step`, `Llama.logits`, the adapter, the sampler's choice and the drafters' `propose` and
`draw`, and the algorithm in `kangaroo.py` does not know of them. The same kernels run: graphs on
and off give the same bits.

Left out on purpose: prefill, whose shapes vary and whose kernels are long; `KVCache.keep`, one copy
a round at most. Follows PyTorch's notes "CUDA semantics: CUDA Graphs" and "Numerical accuracy".
"""
import contextlib
import gc
import os
import weakref

from drafters.chain import ChainDrafter
from drafters.tree import TreeDrafter
from kangaroo import Adapter
from llama import (
    MLP,
    Attention,
    KVCache,
    Llama,
    RMSNorm,
    Sampler,
    one_shape,
    rotate_and_write,
    silu_and_multiply,
)
from support.attention import merge_chunks
from support.device import pinned, to_host
from support.limits import CHAIN_WIDTH
from support.packing import FUSED_NORM, FastRMSNorm, swap
from support.self_check import rows_are_alike
from support.terminal import say

import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# Exact kernels

def exact_kernels(tf32=False):
    """The settings under which a kernel's result depends on its inputs and their shapes alone.

    Call before CUDA is used. `rows_are_alike` checks on the device at hand what these are for: that
    the rows of one call are treated alike. Not set: torch.use_deterministic_algorithms.
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
    # by side (see support/attention.py), or, for head sizes that it does not know, plain matrix
    # products.
    torch.backends.cuda.enable_cudnn_sdp(False)


def fuse_pointwise(*models, backend="inductor"):
    """Let torch.compile fuse chains of small operations of these modules: RoPE and writing to the
    cache, merging chunks of keys, SiLU times up, and the norm where PyTorch has no kernel for it.

    For both, who drafts and who does not, or for neither. Whole layers are not compiled: that would
    choose kernels by the length of the view, and take minutes.
    """
    def compiled(function):
        # fullgraph: what cannot be compiled is an error, not slow in silence.
        return torch.compile(function, dynamic=True, fullgraph=True, backend=backend)

    rotate, merge, multiply, norm = map(compiled, (rotate_and_write, merge_chunks,
                                                   silu_and_multiply, F.rms_norm))
    for model in models:
        for module in model.modules():
            if isinstance(module, Attention):
                module.rotate_and_write = rotate
                module.merge = merge
            elif isinstance(module, MLP):
                module.silu_and_multiply = multiply
        if not FUSED_NORM:
            swap(model, FastRMSNorm, lambda plain: CompiledRMSNorm(plain, norm))


class CompiledRMSNorm(RMSNorm):
    """RMSNorm by a compiled F.rms_norm."""

    def __init__(self, norm, compiled):
        super().__init__(len(norm.weight), norm.eps)
        self.weight, self.compiled = norm.weight, compiled

    def forward(self, x):
        return self.compiled(x, self.weight.shape, self.weight, self.eps)


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
        # The view itself may be on loan.
        self.parts = view.rows, view.length, view.width, view.layers
        self.key = view.length, id(view.rows)

    def view(self, slots=None, columns=None):
        """With a tree's slots and columns, or those of a chain, as `one_shape` has them."""
        view = KVCache(*self.parts)
        if columns is None and view.width > CHAIN_WIDTH:
            columns = torch.arange(view.length, device=view.rows.device).repeat(view.width, 1)
        view.slots, view.columns = slots, columns
        return view


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

        The next replay, of any recording, may use their memory: who keeps them copies them. Tensors
        of the host (`support.device.pinned`) are copied to `device`.
        """
        if key not in self.recordings:
            inputs = [self.static(*numbered) for numbered in enumerate(tensors)]
            recording = self.record(function, inputs)
            self.recordings[key] = function, inputs, *recording  # what it uses stays alive
        _, inputs, replay, outputs = self.recordings[key]
        for static, tensor in zip(inputs, tensors, strict=True):
            static.copy_(tensor, non_blocking=True)
        replay()
        return outputs

    def run_rows(self, key, function, most, *tensors):
        """function(*tensors), one tensor, where all have as many rows, 1 … `most`.

        When the first number of rows is needed, all are recorded, the largest first.
        """
        if (*key, len(tensors[0])) not in self.recordings:
            tensors = [t.clone() for t in tensors]  # recording may overwrite what a replay gave
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
        # Of the last step behind the last layer: states, their logits, what `Sampler().judge` says.
        self.last_step = None, None, None
        self.capacity = 0  # positions that a KV cache has room for: growing means recording anew
        self.memory = {}  # by config: the KV cache that recordings know
        self.states = {}  # by an adapter's config: the exit layer's states that recordings know
        self.token = torch.zeros(1, dtype=torch.long, device=self.device)  # the newest of a draft
        self.lent = {}    # by config: a weak reference to the view of it that the last text got

    def __getattr__(self, name):
        return getattr(self.model, name)

    def new_cache(self, length, width, config=None):
        """A KV cache, in the memory of the last text's if nobody uses that now."""
        config = config or self.model.config
        if config in self.lent and self.lent[config]() is not None:
            # Two texts at once; or one that has ended, and something still knows its drafter.
            say("warning: another text has the KV cache that CUDA graphs know: this one is "
                "decoded without them")
            return self.model.new_cache(length, width, config)
        memory = self.memory.get(config)
        if memory is None or memory.length < length:
            if memory is not None:
                self.graphs.forget()
                self.states.pop(config, None)
                del self.memory[config], memory  # before the new one is made
            memory = self.memory[config] = self.model.new_cache(max(length, self.capacity), width,
                                                                config)
        memory.rows.zero_()  # as good as new, even if the last text ended in NaN
        cache = KVCache(memory.rows, memory.in_view(length, self.device), width, memory.layers)
        self.lent[config] = weakref.ref(cache)
        return cache

    def new_states(self, config):
        """Zeros for the exit layer's states, beside the adapter's cache, in the memory of the last
        text's."""
        if config not in self.states:
            rows = self.memory[config].rows
            self.states[config] = rows.new_zeros(1, rows.shape[3], config.hidden_size)
        return self.states[config].zero_()

    def knows(self, cache):
        """Whether recordings may address it: the cache of a second text at once they may not."""
        return any(cache.rows is memory.rows for memory in self.memory.values())

    def step(self, x, start, cache, first, last, parents=None):
        """What `Llama.step` gives, replayed. Behind the last layer the LM head and the greedy
        choices are recorded too."""
        model, width = self.model, cache.width
        if width not in self.widths or not self.knows(cache):
            return model.step(x, start, cache, first, last, parents)

        def judged(h):
            if last < len(model.layers):
                return (h,)
            logits = model.logits(h)
            return h, logits, Sampler().judge(logits[0], 0)

        view, name = FixedView(cache.view(start + width)), ("layers", first, last)
        positions = range(start, start + width)
        if not torch.is_tensor(x) and len(x) == 1 and not parents:  # embedded in the recording
            def token_step(numbers):
                return judged(model.run_layers(
                    embed_one(model, numbers[:1], width), numbers[1:], view.view(), first, last))

            outputs = self.graphs.run((*name, "token", width, *view.key), token_step,
                                      pinned([*x, *positions], self.device))
        elif width <= CHAIN_WIDTH:
            def chain_step(x, positions):
                return judged(model.run_layers(x, positions, view.view(), first, last))

            x = x if torch.is_tensor(x) else model.embed(x)
            x, positions = F.pad(x, (0, 0, 0, width - x.shape[1])), pinned(positions, self.device)
            outputs = self.graphs.run((*name, "chain", width, *view.key), chain_step, x, positions)
        else:
            x = x if torch.is_tensor(x) else model.embed(x)
            outputs = self.replay(name, lambda *step: judged(
                model.run_layers(*step, first, last)), *one_shape(x, start, cache, parents))
        h = outputs[0].clone()  # kept: by the drafter, or for it
        if len(outputs) == 3:
            self.last_step = h, *outputs[1:]
        return h

    def replay(self, name, function, x, positions, cache):
        """function(x, positions, cache), whatever the tree of the rows is."""
        fixed = FixedView(cache)

        def recorded(x, positions, slots, columns=None):
            return function(x, positions, fixed.view(slots, columns))

        slots = positions if cache.slots is None else cache.slots
        columns = [] if cache.columns is None else [cache.columns]
        key = (*name, "tree" if columns else "chain", x.shape[1], *fixed.key)
        return self.graphs.run(key, recorded, x, positions, slots, *columns)

    def logits(self, x):
        """What the last step's recording has computed, if they are asked for its states."""
        states, logits, _ = self.last_step
        return logits if x is states else self.model.logits(x)

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


def embed_one(model, token, width):
    """A token's row, and `width` − 1 dead ones: (1, width, hidden_size)."""
    return F.pad(model.embed(token), (0, 0, 0, width - 1))


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


def graph_part(part, model, width, record=None):
    """What a drafter needs, in the form whose decode steps are replayed; other things as they are.
    """
    if isinstance(part, Llama):
        return GraphedLlama(part, (width,), record)
    return GraphedAdapter(part, model) if isinstance(part, Adapter) else part


# --------------------------------------------------------------------------------------------------
# Choices

class GivenNoise(Sampler):
    """A sampler whose noise (T, vocab_size) is given, of the positions 0, 1, …, or None if it never
    draws any: what a recording holds. It has always as many rows, so they go all at once."""

    def __init__(self, sampler, rows=None):
        super().__init__(sampler.temperature, sampler.top_k, sampler.top_p)
        self.rows = rows

    def noise(self, position, vocab_size, device):
        return self.rows[position]

    def perturbed(self, logits, position, depth=None):
        # Softmax adds up a row by 16 bytes; rows that begin in between it does not treat alike.
        if self.temperature and logits.shape[-1] % 4 == 0:
            return self.scores(logits) + self.rows
        return super().perturbed(logits, position, depth)


def settings_of(sampler):
    """What recordings of a sampler depend on, but for its noise, which is an input of theirs."""
    return sampler.temperature, sampler.top_k, sampler.top_p


def noise_of(sampler, positions, model):
    """That input: [(T, vocab_size)], or nothing if the sampler is greedy."""
    if not sampler.temperature:
        return []
    return [torch.stack([sampler.noise(position, model.config.vocab_size, model.device)
                         for position in positions])]


class GraphedSampler(Sampler):
    """A sampler whose choices are replayed, for `width` rows, as those of a verification; or if it
    is greedy have been, in the step's recording."""

    def __init__(self, sampler, model, width):
        super().__init__(*settings_of(sampler), sampler.seed)
        self.model, self.width = model, width

    def judge(self, logits, position, depth=None):
        _, recorded, judged = self.model.last_step
        if self.temperature or recorded is None or logits.data_ptr() != recorded.data_ptr():
            return super().judge(logits, position, depth)
        return judged[:, :len(logits)]

    def choose(self, logits, position, depth=None):
        if not self.temperature:  # a single kernel
            return super().choose(logits, position, depth)
        bare = GivenNoise(self)  # what the recording keeps: not the model's caches

        def recorded(logits, noise):
            return (GivenNoise(bare, noise).choose(logits, 0),)

        dead = self.width - len(logits)
        positions = [position + i for i in depth or range(len(logits))] + [position] * dead
        choices, = self.model.graphs.run(
            ("sample", self.width, *settings_of(self)), recorded, F.pad(logits, (0, 0, 0, dead)),
            *noise_of(self, positions, self.model))
        return choices[:len(logits)]


class GraphedChain(ChainDrafter):
    """A ChainDrafter each of whose draft steps is two replays: from a token's state at the exit to
    the token that is drafted to follow it, and that one's way to the exit.

    The second is needed even if the draft ends there. So it is started before the host knows which
    token it is: while the host reads and decides, the GPU runs. Its model is a GraphedLlama, its
    adapter a GraphedAdapter.
    """

    def prefill(self, ids, cache, sampler):
        h, graphed = super().prefill(ids, cache, sampler), self.model
        self.ahead = None  # the position whose token is on its way to the exit already
        self.replayed = cache.width in graphed.widths and graphed.knows(cache) and graphed.knows(
            self.adapter_cache)
        if self.replayed:
            self.states = graphed.new_states(self.adapter.config)
        return h

    def propose(self, token, position, cache):
        late = position - self.seen  # rows that the adapter has not seen before this one
        if late > 1 or not self.replayed:
            return super().propose(token, position, cache)
        self.run_to_exit(token, position, cache)
        # What the recording keeps: nothing of this text.
        graphed, states, width, newest = self.model, self.states, cache.width, self.model.token
        adapter, head, sampler = self.adapter.adapter, self.head, self.sampler
        own, bare = FixedView(self.adapter_cache.view(self.seen + width)), GivenNoise(sampler)

        def recorded(numbers, *noise):
            positions, rows, late = numbers.split((width, width, 1))
            x = adapter(states.index_select(1, rows), positions, own.view())
            drafted = GivenNoise(bare, *noise).candidates(head(x[0].index_select(0, late)), 0)
            newest.copy_(drafted[0, 0, :1])
            return (drafted,)

        # The adapter's rows are this position or, if it is a row late, the one before and this one;
        # dead ones are zeros, as the last of the states always is.
        rows = [*range(self.seen, position + 1)] + [states.shape[1] - 1] * (width - 1 - late)
        numbers = [*range(self.seen, self.seen + width), *rows, late]
        key = "draft", id(adapter), id(head), *settings_of(sampler), width, *own.key
        drafted, = graphed.graphs.run(key, recorded, pinned(numbers, graphed.device),
                                      *noise_of(sampler, [position + 1], graphed))
        read = to_host(drafted)
        self.seen = self.ahead = position + 1
        self.replay_to_exit(self.ahead, cache)
        [[drafted]] = sampler.fetch(read())
        return drafted

    def run_to_exit(self, token, position, cache):
        if not self.replayed:
            return super().run_to_exit(token, position, cache)
        if self.ahead != position:
            self.model.token.copy_(pinned([token], self.model.device), non_blocking=True)
            self.replay_to_exit(position, cache)
        self.ahead = None

    def replay_to_exit(self, position, cache):
        """Run the newest token, which lies on the device, through the shallow layers."""
        model, newest, states, depth = self.model.model, self.model.token, self.states, self.depth
        width, shallow = cache.width, FixedView(cache.view(position + cache.width))

        def recorded(positions):
            h = model.run_layers(embed_one(model, newest, width), positions, shallow.view(), 0,
                                 depth)
            states.index_copy_(1, positions[:1], h[:, :1])
            return ()

        self.model.graphs.run(("to exit", id(states), depth, width, *shallow.key), recorded,
                              pinned(range(position, position + width), self.model.device))


class GraphedTree(TreeDrafter):
    """A TreeDrafter whose LM head and choice of candidates are one replay."""

    def draw(self, x, position, depth):
        """The rows x (T, hidden_size) are open nodes, at most one less than there may be nodes."""
        model, head, sampler, k = self.model, self.head, self.sampler, self.candidates
        bare, most = GivenNoise(sampler), max(1, self.most - 1)

        def recorded(x, *noise):
            return (GivenNoise(bare, *noise).candidates(head(x), 0, k=k),)

        key = "draw", id(head), *settings_of(sampler), k
        noise = noise_of(sampler, (position + i for i in depth), model)
        return sampler.fetch(model.graphs.run_rows(key, recorded, most, x, *noise))


# The drafters that have a form for graphs. Others run with what their model and adapter replay.
GRAPHED = {ChainDrafter: GraphedChain, TreeDrafter: GraphedTree}
