"""CUDA without a GPU: decoding, the command line and training on a pretended one (pretend_cuda.py),
which raises where devices meet or a capture would break, and overwrites what recordings made.

What is tested is what is decoded and how often the host waits, not what lies in a recording.
"""
import json
from dataclasses import replace

import train_adapter
from drafters.tree import TreeDrafter
from llama import Sampler
from support import packing, start
from support.graphs import CudaRecorder, GraphedLlama, Graphs
from support.packing import pack

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TEXT,
    TINY,
    PerfectAdapter,
    block,
    random_adapter,
    random_model,
    write_adapter,
    write_model,
)
from pretend_cuda import (
    CUDA,
    CaptureBroken,
    DevicesMeet,
    MemoryGone,
    pretend_cuda,
    refuse_unfit,
)
from safetensors.torch import load_file
from test_graphs import assert_same, decode

pytestmark = pytest.mark.skipif(torch.cuda.is_available(),
                                reason="there is a GPU: test_graphs.py has tests for it")
GREEDY, SAMPLED = Sampler(), Sampler(0.8, 5, 0.95, 1)


@pytest.fixture
def gpu():
    with pretend_cuda() as gpu, block(16):
        yield gpu


class RightAtTimes(PerfectAdapter):
    """Says what the target says, but at every third position what it likes least."""

    def __init__(self, model, exit_layer):
        super().__init__(model, exit_layer)
        self.config = replace(model.config, bos_token_id=0)  # its cache is another than the model's

    def __call__(self, x, positions, cache):
        h = super().__call__(x, positions, cache)
        return torch.where((positions % 3 > 0)[:, None], h, -h)


F32, BF16 = torch.float32, torch.bfloat16
WIDTHS = {"chain": (8, 1), "wide": (16, 1), "tree": (16, 3)}  # rows, candidates


@pytest.mark.parametrize("kind, sampler, dtype, group", [
    ("chain", GREEDY, F32, 2), ("chain", SAMPLED, BF16, 1), ("wide", GREEDY, BF16, 2),
    ("wide", SAMPLED, F32, 1), ("tree", GREEDY, BF16, 1), ("tree", SAMPLED, F32, 2)])
def test_replays_decode_as_kernels_do(gpu, monkeypatch, kind, sampler, dtype, group):
    """Tokens, drafts and both caches, bit for bit, text after text, and vanilla's tokens.

    With one host sync a round and one a draft step, and no copy that may make the host wait.
    """
    width, candidates = WIDTHS[kind]
    config = replace(TINY, num_hidden_layers=2, num_key_value_heads=4 // group,
                     vocab_size=39 + group)  # a multiple of 4, or not: see GivenNoise
    model = random_model(config, 3, dtype, "cuda", packed_for=width)
    graphed, grown = GraphedLlama(model, (width,)), []
    children = TreeDrafter.children
    monkeypatch.setattr(TreeDrafter, "children",
                        lambda *args: grown.append(1) or children(*args))  # a tree's draft step
    options = dict(adapter=RightAtTimes(model, 1), sampler=sampler, steps=width - 1, width=width,
                   candidates=candidates)
    for prompt, n in (([5], 13), ([7, 8, 9], 10)):  # the second finds all recorded
        eager = decode(model, "kangaroo", prompt, n, **options)
        grown.clear(), gpu.syncs.clear(), gpu.pageable.clear()
        replayed, syncs = decode(graphed, "kangaroo", prompt, n, **options), len(gpu.syncs)
        assert_same(replayed, eager)
        drafts = replayed[3]
        assert syncs == len(drafts) + (len(grown) if candidates > 1 else sum(map(len, drafts)))
        assert not gpu.pageable or prompt == [5]  # what is made once may come as it likes
        assert any(drafts) and len(drafts) < n  # some are accepted
        assert decode(graphed, "none", prompt, n, **options)[0] == eager[0]
    assert gpu.replays > 30 and (gpu.attentions or width > 8)


@pytest.fixture
def one_kernel_norm(monkeypatch):
    """A norm is one kernel, as in a PyTorch that has one for it."""
    monkeypatch.setattr(packing, "FUSED_NORM", True)
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: x * weight)


@pytest.mark.parametrize("heads, launches", [((4, 4), 13), ((6, 2), 14), ((3, 1), 13)],
                         ids=["one head a group", "groups", "one group"])
@torch.inference_mode()
def test_launches_of_a_layer(gpu, one_kernel_norm, heads, launches):
    """What a step of a small model costs is their number, which may only fall."""
    config = replace(TINY, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    model, counts = random_model(config, 0, BF16, "cuda", packed_for=8), []
    for width in (1, 8):
        for layers in (1, 3):
            gpu.launches.clear()
            model.step([5], 3, model.new_cache(64, width), 0, layers)
            counts.append(len(gpu.launches))
        assert counts[-1] - counts[-2] <= 2 * launches


def test_launches_of_recordings(gpu, one_kernel_norm):
    """As above, of what is recorded for three layers: beside 13 a layer few."""
    config, counts = replace(TINY, num_hidden_layers=3, num_key_value_heads=4), {}
    model = random_model(config, 0, BF16, "cuda", packed_for=8)
    graphed, adapter = GraphedLlama(model, (8,)), pack(random_adapter(model), 8)
    for sampler in (SAMPLED, GREEDY):
        for kind in ("none", "kangaroo"):
            decode(graphed, kind, [5], 9, adapter, sampler=sampler, width=8)
    for key, (_, _, replay, _) in graphed.graphs.recordings.items():
        counts[key[:4] if key[0] == "layers" else key[0]] = len(replay.__self__.launches)
    assert counts.pop(("layers", 0, 3, "token")) <= 6 + 3 * 13 + 7  # a step of vanilla decoding
    assert counts.pop(("layers", 1, 3, "chain")) <= 4 + 2 * 13 + 7  # a verification
    assert counts.pop("to exit") <= 7 + 13 and counts.pop("draft") <= 24  # a greedy draft step
    assert counts.pop("sample") <= 36 and not counts  # the choices of eight rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretended") / "model"
    write_adapter(folder / "adapter", write_model(folder, replace(TINY, num_hidden_layers=2)))
    return folder


@pytest.mark.parametrize("more", [
    ["--compare"], ["--tree", "--temperature", "0.8", "--compare"],
    ["--drafter", "sps", "--dtype", "float32", "--compare"],
    ["--drafter", "lookahead", "--no-graphs"], ["--drafter", "lookup", "--top-p", "0.9",
                                                "--temperature", "1", "--compare"]],
                         ids=["chain", "tree", "sps", "lookahead", "lookup"])
def test_the_command_line(gpu, more, folder, capsys):
    """python kangaroo.py --device cuda: from a folder to a text that is vanilla's."""
    more = [*more, "--draft-model", str(folder)] if "sps" in more else more
    status = start.main(["--model", str(folder), "--prompt", "Once upon a time", "--json",
                                "--device", "cuda", "--max-new-tokens", "12", *more])
    out, err = capsys.readouterr()
    assert status == 0 and "warning: cuda" not in err, err
    result = json.loads(out)
    assert result.get("identical", True) and 0 < len(result["ids"]) <= 12
    assert f"cuda:0 · {'float32' if 'float32' in more else 'bfloat16'}" in err
    assert bool(gpu.replays) == ("--no-graphs" not in more) == ("CUDA graphs" in err)


def test_training(folder, tmp_path, capsys):
    """train_adapter.py on CUDA: an update, and --resume from its checkpoint, which has no update
    left; the weights are the CPU's, up to rounding."""
    data = tmp_path / "text.txt"
    data.write_text("\n\n".join(TEXT * 40), encoding="utf-8")

    def train(device, updates, *more):
        out = tmp_path / device
        status = train_adapter.main([
            "--model", str(folder), "--data", str(data), "--exit-layer", "1", "--out", str(out),
            "--device", device, "--dtype", "float32", "--updates", str(updates), "--batches", "1",
            "--batch-tokens", "256", "--max-length", "64", "--warmup", "1",
            "--eval-prompts", "1", "--eval-documents", "2", *more])
        assert status == 0, capsys.readouterr().err
        return load_file(out / "adapter.safetensors")

    with pretend_cuda() as gpu:
        first = train("cuda", 1)
        assert gpu.syncs
        resumed = train("cuda", 1, "--resume")
    expected = train("cpu", 1)
    for name, weight in first.items():
        assert torch.equal(weight, resumed[name]), name
        assert torch.allclose(weight.float(), expected[name].float(), rtol=0.02, atol=1e-4), name


# --------------------------------------------------------------------------------------------------
# The pretended GPU itself

def recorded(gpu, function, *tensors):
    return Graphs(CudaRecorder(CUDA)).run("function", function, *tensors)


@pytest.mark.parametrize("breaks", [
    lambda x: x + x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.ones(3).to(x.device),
    lambda x: x * torch.tensor(2.0), lambda x: x.cpu(),
    lambda x: x + torch.tensor([1.0]).pin_memory().to(x.device, non_blocking=True)],
                         ids=["item", "mask", "copy", "scalar", "host", "pinned"])
def test_what_breaks_a_capture(gpu, breaks):
    x = torch.ones(3, device=CUDA)
    breaks(x)  # as such it is allowed
    with pytest.raises(CaptureBroken):
        recorded(gpu, lambda x: (breaks(x),), x)


def test_devices_do_not_meet(gpu):
    x = torch.ones(3, device=CUDA)
    assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2]
    for meets in (lambda: x + torch.ones(3), lambda: torch.cat((x, torch.ones(3))),
                  lambda: torch.stack((x[0], torch.tensor(2.0)))):
        with pytest.raises(DevicesMeet):
            meets()


def test_a_capture_needs_a_warm_up(gpu):
    graph, stream, x = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.ones(3, device=CUDA)
    x.exp()
    with pytest.raises(CaptureBroken, match="has not run on this stream"):
        with torch.cuda.graph(graph, stream=stream):
            x.exp()


def test_a_replay_does_again_what_was_recorded(gpu):
    """On the memory of then, with the numbers of then; what a recording made is garbage by then."""
    x, stream, factor = torch.ones(3, device=CUDA), torch.cuda.Stream(), [2.0]
    sums = torch.zeros(3, device=CUDA)

    def step():
        y = x * factor[0]
        sums.add_(y)
        return y

    with torch.cuda.stream(stream):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = step()
    assert sums.tolist() == [2, 2, 2] and y.isnan().all().item()  # a capture runs nothing
    x.fill_(3)
    factor[0] = 100.0
    graph.replay()
    assert y.tolist() == [6, 6, 6] and sums.tolist() == [8, 8, 8]
    other = torch.cuda.CUDAGraph()
    with torch.cuda.graph(other, stream=stream):
        step()
    other.replay()
    assert y.isnan().all().item()  # the memory of both
    x = None
    with pytest.raises(MemoryGone):
        graph.replay()


@pytest.mark.parametrize("heads, head_dim, keys, dtype, mask_dtype, fits", [
    (2, 8, 64, torch.bfloat16, torch.bfloat16, True),
    (2, 4, 64, torch.float32, torch.float32, True),
    (2, 4, 64, torch.bfloat16, torch.bfloat16, False),  # a head of 8 bytes
    (2, 8, 63, torch.bfloat16, torch.bfloat16, False),  # a mask that would be padded
    (2, 8, 64, torch.bfloat16, torch.float32, False),   # a mask that would be converted
    (4, 8, 64, torch.bfloat16, torch.bfloat16, False),  # groups
    (2, 8, 64, torch.float64, torch.float64, False)])
def test_what_the_attention_kernel_takes(heads, head_dim, keys, dtype, mask_dtype, fits):
    q = torch.zeros(1, heads, 5, head_dim, dtype=dtype)
    k = torch.zeros(1, keys, 2, head_dim, dtype=dtype).transpose(1, 2)
    mask = torch.zeros(5, keys, dtype=mask_dtype)
    if fits:
        return refuse_unfit(q, k, k, mask)
    with pytest.raises(ValueError, match="wants"):
        refuse_unfit(q, k, k, mask)
