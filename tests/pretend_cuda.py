"""A pretended GPU: CPU tensors that say they lie on cuda:0, held to the rules of a real one.

    with pretend_cuda() as gpu:      # torch.cuda is there, --device cuda works, graphs record
        ...                          # gpu.launches, gpu.syncs, … say what was done

Every aten call is seen by a dispatch mode, runs on the CPU, and must obey:

- **Devices do not meet.** No call takes tensors of both, but for copies, scalars in pointwise
  operations, and an index, which is copied.
- **Waiting is counted.** A copy to the host, `.item()`, a boolean index and the like make the host
  wait (`syncs`), copies from memory that is not pinned may do so (`pageable`). A copy to the host
  that does not wait is garbage until an event behind it has been waited for.
- **A capture captures.** Neither of these in it, nothing on the host, nothing that its stream has
  not run before, when libraries set themselves up. Writes to what was there before do not happen.
- **A replay repeats a tape of aten calls.** All else is frozen, Python numbers too. Before it, all
  memory that was made during any capture is garbage, since recordings share memory. Other memory is
  known by address: it has to be kept by somebody else.
- **Attention with a mask** has the shapes that the memory-efficient kernel takes, and its result
  lies in memory as that kernel leaves it.

What only a real GPU can show is left out: its kernels' rounding and speed, races of streams, sizes
of memory, autocast, fused optimizers. Follows PyTorch's notes "CUDA semantics: CUDA Graphs".
"""
import contextlib
import math
import weakref
from functools import cache
from unittest import mock

import torch
import torch._dynamo  # noqa: F401 — a dispatch mode imports it, and it must see torch.cuda as it is
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CUDA = torch.device("cuda:0")
WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique2",
         "unique_dim", "unique_consecutive", "repeat_interleave"}  # the result's size, or a value
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
SCALARS = {"masked_fill", "masked_fill_", "fill", "fill_"}  # take one, though not pointwise


class DevicesMeet(RuntimeError):
    """A call has tensors of the GPU and of the CPU."""


class CaptureBroken(RuntimeError):
    """What must not be done during a capture."""


class MemoryGone(RuntimeError):
    """A replay uses memory that nobody has kept."""


class CudaTensor(torch.Tensor):
    """A CPU tensor, `elem`, in the disguise of one on the GPU.

    C++ takes it for one of the device "meta", which needs no driver; so a device "meta" in a call
    means this GPU, too.
    """
    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_meta = (property(lambda self, value=value: value)
                                for value in (CUDA, True, False))

    @staticmethod
    def __new__(cls, elem):
        with torch.inference_mode(False):  # of a wrapper made in it PyTorch makes no views
            tensor = torch.Tensor._make_wrapper_subclass(
                cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(),
                dtype=elem.dtype, device="meta")
        tensor.elem = elem
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: a tensor of a pretended GPU, outside of pretend_cuda()")

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.elem = new.elem

    def __getitem__(self, index):  # of a list C++ would make an index that lies on "meta"
        index = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(
            torch.tensor(i) if isinstance(i, list) else i for i in index))

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):  # to a file, as a copy on the host
        return self.cpu().__reduce_ex__(protocol)

    def __repr__(self, **_):
        return f"{self.elem} on {CUDA}"


# --------------------------------------------------------------------------------------------------
# The device

class PretendCuda(TorchDispatchMode):
    """The one GPU, for as long as the mode is on."""

    def __init__(self):
        super().__init__()
        # The names of calls: all that start a kernel, but for those of recordings; that wait; that
        # may wait.
        self.launches, self.syncs, self.pageable = [], [], []
        self.attentions = 0                 # with a mask, that is of decode steps and prefill
        self.replays = 0
        self.on_the_way = []                # copies to the host, until it waits for an Event
        self.stream = self.default_stream = Stream()
        self.capture = None                 # the Graph that is being recorded
        self.graphs = weakref.WeakSet()     # all that are alive

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._overloadpacket.__name__
        if name == "is_pinned":
            return getattr(args[0], "pinned", False)
        if name in ("pin_memory", "_pin_memory"):
            return self.pin(args[0])
        if name == "scaled_dot_product_attention" and mask_of(args, kwargs) is not None:
            refuse_unfit(*elems((*args[:3], mask_of(args, kwargs))),
                         kwargs.get("enable_gqa", False))
            self.attentions += 1
            func = efficient_attention
        elif is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [t for t in leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        device = kwargs.get("device")
        target = isinstance(args[0], CudaTensor) if device is None and tensors else (
            device is not None and torch.device(device).type in ("cuda", "meta"))
        if name in ("_to_copy", "copy_"):
            self.copied(name, args[name == "copy_"], target, bool(
                kwargs.get("non_blocking") or args[2:]))
        elif target or any(isinstance(t, CudaTensor) for t in tensors):
            self.refuse_strangers(func, name, args, tensors)
            if name in WAITS or name in INDEXING and any(
                    t.dtype in (torch.bool, torch.uint8) for t in leaves(args[1])
                    if t is not None):
                self.waits(name)
        elif self.capture is not None:
            raise CaptureBroken(f"{func} runs on the host during a capture")
        else:
            return func(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        if device is not None:
            kwargs["device"] = "cpu"
        return self.launch(func, args, kwargs, target or name not in ("_to_copy", "copy_"))

    def launch(self, func, args, kwargs, wrap):
        """Run a call on the CPU's tensors, or put it on the tape of a capture."""
        if self.capture is None:
            self.stream.has_run.add(func)
            made = func(*elems(args), **elems(kwargs))
            self.launches += started(func, args, kwargs, made)
            if not wrap and kwargs.get("non_blocking"):
                self.on_the_way.append((made, made.clone()))
                made.fill_(77)
        else:
            if func not in self.stream.has_run:
                raise CaptureBroken(f"{func} has not run on this stream before the capture")
            made = self.capture.put_on_tape(func, args, kwargs)
        known = {id(t.elem): t for t in leaves((args, kwargs)) if isinstance(t, CudaTensor)}
        known = known if wrap else {id(t): t for t in leaves(made)}
        return mapped(made, torch.Tensor,
                      lambda t: known[id(t)] if id(t) in known else CudaTensor(t))

    def waits(self, name):
        if self.capture is not None:
            raise CaptureBroken(f"{name} makes the host wait during a capture")
        self.syncs.append(name)

    def pin(self, tensor):
        if self.capture is not None:
            raise CaptureBroken("pin_memory allocates on the host during a capture")
        pinned = tensor.clone()
        pinned.pinned = True
        return pinned

    def copied(self, name, source, target, non_blocking):
        """Account for a copy; `target`: whether it goes to the GPU."""
        if isinstance(source, CudaTensor) and not target and not non_blocking:
            self.waits(f"{name} to the host")
        if target and not isinstance(source, CudaTensor):
            if self.capture is not None:
                raise CaptureBroken(f"{name} from the host during a capture")
            if not (non_blocking and getattr(source, "pinned", False)):
                self.pageable.append(name)

    def refuse_strangers(self, func, name, args, tensors):
        for t in tensors:
            if isinstance(t, CudaTensor):
                continue
            if name in INDEXING and isinstance(args[0], CudaTensor):
                self.copied(name, t, True, False)
            elif t.dim() or not (torch.Tag.pointwise in func.tags or name in SCALARS):
                raise DevicesMeet(f"{func}: {[(str(t.device), tuple(t.shape)) for t in tensors]}")

    @torch.inference_mode()
    def replay(self, tape):
        if self.capture is not None:
            raise CaptureBroken("a replay during a capture")
        self.replays += 1
        with _disable_current_modes():
            for graph in self.graphs:
                graph.poison()
            for func, args, kwargs, made in tape:
                args, kwargs = mapped((args, kwargs), Address, Address.tensor)
                again = func(*args, **kwargs)
                for tensor, new in zip(leaves(made), leaves(again)):
                    if isinstance(tensor, torch.Tensor):
                        tensor.copy_(new)


def efficient_attention(*args, **kwargs):
    """With a result as the memory-efficient kernel leaves it: positions before heads."""
    y = ATTENTION(*args, **kwargs).transpose(1, 2)
    return y.contiguous().transpose(1, 2)


ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
efficient_attention._schema, efficient_attention.__name__ = ATTENTION._schema, "attention"


def made_new(args, kwargs, made):
    """What a call has made that is no view of what it was given."""
    before = {address(t) for t in leaves(elems((args, kwargs))) if isinstance(t, torch.Tensor)}
    return [t for t in leaves(made) if isinstance(t, torch.Tensor) and address(t) not in before]


def started(func, args, kwargs, made):
    """The names of the kernels that a call starts."""
    copies = ["copy"] if func.__name__ == "roll.default" and not args[0].is_contiguous() else []
    starts = func._schema.is_mutable or made_new(args, kwargs, made)
    return copies + [func.__name__.split(".")[0]] if starts else []


@cache
def is_composite(func):
    """Whether a call is made of other calls, of which a GPU sees these."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def leaves(tree):
    """What stands in nested lists, tuples and dicts."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [leaf for branch in tree for leaf in leaves(branch)]
    return [tree]


def mapped(tree, kind, function):
    """The same, with function(leaf) for each leaf of a kind."""
    if isinstance(tree, (list, tuple)):
        return (list if isinstance(tree, list) else tuple)(
            mapped(branch, kind, function) for branch in tree)
    if isinstance(tree, dict):
        return {key: mapped(branch, kind, function) for key, branch in tree.items()}
    return function(tree) if isinstance(tree, kind) else tree


def elems(tree):
    return mapped(tree, CudaTensor, lambda tensor: tensor.elem)


# --------------------------------------------------------------------------------------------------
# Graphs

class Stream:
    """A torch.cuda.Stream: work never overlaps here, so that it only knows what it has run."""

    def __init__(self, *_, **__):
        self.has_run = set()

    def wait_stream(self, other):
        pass

    def synchronize(self):
        torch.cuda.synchronize()


class Event:
    """A torch.cuda.Event: behind the copies to the host that were started before it."""

    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.copies, self.gpu.on_the_way = self.gpu.on_the_way, []

    def synchronize(self):
        self.gpu.waits("synchronize")
        for made, copy in self.copies:
            made.copy_(copy)


class Address:
    """Memory that a graph uses and does not own: it knows where it lies, and does not keep it."""

    def __init__(self, tensor):
        self.storage, self.dtype = StorageWeakRef(tensor.untyped_storage()), tensor.dtype
        self.layout = tensor.storage_offset(), tensor.size(), tensor.stride()

    def tensor(self):
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise MemoryGone("a replay uses memory that nobody has kept since the capture")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class Graph:
    """A torch.cuda.CUDAGraph: a tape of the calls that make or change something."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.reset()
        gpu.graphs.add(self)

    def reset(self):
        self.tape, self.own = [], {}  # own: what was made during the capture, by address
        self.launches = []            # the names of the kernels that a replay starts

    def replay(self):
        self.gpu.replay(self.tape)

    def put_on_tape(self, func, args, kwargs):
        """What the call returns: of the right shapes. Nothing that was there before is changed."""
        changes = func._schema.is_mutable
        made = elems(kwargs.get("out", args[0])) if changes else func(*elems(args), **elems(kwargs))
        new = made_new(args, kwargs, made)
        self.launches += started(func, args, kwargs, made)
        if changes or new:  # else it is a view
            by_address = mapped((args, kwargs), CudaTensor, self.known)
            self.tape.append((func, *by_address, None if changes else made))
        self.own |= {address(t): t for t in new}
        return made

    def known(self, tensor):
        return tensor.elem if address(tensor.elem) in self.own else Address(tensor.elem)

    def poison(self):
        for tensor in self.own.values():
            tensor.fill_(math.nan if tensor.is_floating_point() else 77)


def address(tensor):
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def pretend_cuda():
    """A PretendCuda, with what `torch.cuda` has for it."""
    gpu = PretendCuda()

    @contextlib.contextmanager
    def on_stream(stream):
        before, gpu.stream = gpu.stream, stream
        try:
            yield
        finally:
            gpu.stream = before

    @contextlib.contextmanager
    def capturing(graph, pool=None, stream=None, capture_error_mode="global"):
        assert gpu.capture is None
        gpu.capture = graph
        try:
            with on_stream(stream or Stream()):
                yield
        finally:
            gpu.capture = None
        with _disable_current_modes(), torch.inference_mode():
            graph.poison()  # a capture runs nothing

    def nothing(*_):
        return contextlib.nullcontext()

    there = dict(
        _lazy_init=nothing, is_available=lambda: True, device_count=lambda: 1,
        current_device=lambda: 0, set_device=nothing, device=nothing,
        is_bf16_supported=lambda *_: True, get_device_capability=lambda *_: (9, 0),
        get_device_name=lambda *_: "a pretended GPU", empty_cache=nothing,
        synchronize=lambda *_: gpu.waits("synchronize"), Stream=Stream, stream=on_stream,
        Event=lambda: Event(gpu),
        current_stream=lambda *_: gpu.stream, graph_pool_handle=object, graph=capturing,
        CUDAGraph=lambda *_, **__: Graph(gpu),
        is_current_stream_capturing=lambda: gpu.capture is not None)
    with mock.patch.multiple(torch.cuda, **there), gpu:
        yield gpu


# --------------------------------------------------------------------------------------------------
# Attention

def mask_of(args, kwargs):
    return args[3] if len(args) > 3 else kwargs.get("attn_mask")


def refuse_unfit(q, k, v, mask, enable_gqa=False):
    """ValueError for what the memory-efficient kernel does not take of q (B, H, T, D), k and
    v (B, H, S, D) and a mask.

    PyTorch would then take plain matrix products, or copy the mask, in every layer of every step.
    Rules for compute capability 8 and above, all from aten/src/ATen/native/transformers:

    - four dimensions, one batch size, one number of heads, no enable_gqa; D a multiple of 16 bytes;
      the last stride 1 (cuda/sdp_utils.cpp: use_mem_efficient_attention,
      check_head_dim_size_mem_efficient, sdp_utils_cpp.h: check_last_dim_stride_equals_1_dense);
    - one dtype, float32, bfloat16 or float16, of the mask too unless that is bool, which would be
      converted (attention.cpp: validate_sdpa_input, convert_boolean_attn_mask);
    - the mask's last dimension and its other strides multiples of 16 elements, or it is padded or
      copied (attention.cpp: preprocess_mask);
    - pointers and strides of q, k, v and the mask aligned to 16 bytes
      (cuda/mem_eff_attention/kernel_forward.h: check_supported).
    """
    aligned, (B, H, T, D) = 16 // q.element_size(), q.shape
    wide = mask.expand(B, H, T, k.shape[2])
    for fits, rule in (
            (k.shape == v.shape == (B, H, k.shape[2], D) and not enable_gqa, "one head each"),
            (q.dtype in (torch.float32, torch.bfloat16, torch.float16), "a dtype of the kernel"),
            (q.dtype == k.dtype == v.dtype == mask.dtype, "one dtype, the mask's too"),
            (D % aligned == 0, "a head of a multiple of 16 bytes"),
            (all(t.stride(-1) == 1 for t in (q, k, v, mask)), "a last stride of 1"),
            (wide.shape[-1] % 16 == 0 and all(s % 16 == 0 for s in wide.stride()[:3]),
             "a mask whose rows lie multiples of 16 elements apart"),
            (all(t.storage_offset() % aligned == 0 for t in (q, k, v, mask))
             and all(t.stride(i) % aligned == 0 for t in (q, k, v) for i in (1, 2)),
             "memory aligned to 16 bytes")):
        if not fits:
            shapes = [(tuple(t.shape), t.stride(), t.dtype) for t in (q, k, v, mask)]
            raise ValueError(f"the memory-efficient kernel wants {rule}: {shapes}")
