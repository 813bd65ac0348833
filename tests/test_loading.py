"""From a Hugging Face folder to a Llama: what is accepted, what is refused and in which words, and
that the weights arrive."""
import json
import math
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import DTYPES, TINY, config_json, random_model, save, save_file

import llama
from kangaroo import NoDrafter, generate
from llama import Linear, UserError, inverse_frequencies, pack
from support.checkpoint import load_llama, named_weights, read_config

ABSENT = object()
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192
}
can_pack = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(),
    reason="oneDNN's packed products are for x86")


# --------------------------------------------------------------------------------------------------
# config.json

def load_config(folder, changes, generation=ABSENT):
    """The LlamaConfig of TINY's config.json with these changes, and of generation_config.json
    unless it is ABSENT."""
    data = config_json(TINY) | changes
    folder.joinpath("config.json").write_text(
        json.dumps({k: v
                    for k, v in data.items()
                    if v is not ABSENT}))
    if generation is not ABSENT:
        folder.joinpath("generation_config.json").write_text(json.dumps(generation))
    return read_config(folder)


@pytest.mark.parametrize("changes, expected", [
    ({}, {}),
    ({"num_key_value_heads": ABSENT}, {"num_key_value_heads": 4}),
    ({"head_dim": ABSENT, "hidden_size": 64}, {"head_dim": 16, "hidden_size": 64}),
    ({"head_dim": None, "hidden_size": 64}, {"head_dim": 16, "hidden_size": 64}),
    ({"head_dim": 16}, {"head_dim": 16}),
    ({"rms_norm_eps": ABSENT, "rope_theta": ABSENT, "max_position_embeddings": ABSENT
      }, {"max_position_embeddings": 2048}),
    ({"rms_norm_eps": 1e-5, "rope_theta": 500000}, {"rms_norm_eps": 1e-5, "rope_theta": 500000.0}),
    ({"rope_scaling": None}, {}),
    ({"rope_scaling": {"type": "linear", "factor": 2}
      }, {"rope_type": "linear", "rope_scaling": (2.0,)}),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2}
      }, {"rope_type": "linear", "rope_scaling": (2.0,)}),
    ({"rope_scaling": {"type": "llama3"} | LLAMA3
      }, {"rope_type": "llama3", "rope_scaling": (8.0, 1.0, 4.0, 8192.0)}),
    ({"rope_scaling": {"rope_type": "llama3"} | LLAMA3
      }, {"rope_type": "llama3", "rope_scaling": (8.0, 1.0, 4.0, 8192.0)}),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": ABSENT
      }, {"rope_theta": 5e5}),
    ({
        "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 5e5},
        "rope_theta": ABSENT
    }, {"rope_type": "linear", "rope_scaling": (2.0,), "rope_theta": 5e5}),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3, "rope_theta": ABSENT
      }, {"rope_type": "llama3", "rope_scaling": (8.0, 1.0, 4.0, 8192.0), "rope_theta": 5e5}),
    ({"model_type": "mistral", "sliding_window": None}, {}),
    ({
        "hidden_act": ABSENT, "attention_bias": ABSENT, "mlp_bias": False,
        "partial_rotary_factor": 1.0
    }, {}),
    ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    ({"tie_word_embeddings": ABSENT}, {"tie_word_embeddings": False}),
    ({"bos_token_id": 1, "eos_token_id": 2}, {"bos_token_id": 1, "eos_token_ids": (2,)}),
    ({"eos_token_id": [7, 2]}, {"eos_token_ids": (2, 7)}),
    ({"eos_token_id": None}, {}),
], ids=str)
def test_configs_that_are_read(tmp_path, changes, expected):
    """Guards against a field that is misread, ignored, or given another default than Hugging
    Face's."""
    assert load_config(tmp_path, changes) == replace(TINY, **expected)


@pytest.mark.parametrize("generation, ids", [({"eos_token_id": [9, 2]}, (2, 9)),
                                             ({"eos_token_id": 5}, (2, 5)), ({}, (2,))])
def test_eos_ids_are_those_of_both_files(tmp_path, generation, ids):
    """Guards against text that runs on: Llama 3's end of turn stands in generation_config.json
    only."""
    assert load_config(tmp_path, {"eos_token_id": 2}, generation).eos_token_ids == ids


@pytest.mark.parametrize(
    "changes, field",
    [({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
     ({"hidden_act": "gelu"}, "hidden_act"),
     ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
     ({"sliding_window": 4096}, "sliding_window"), ({"model_type": "gpt2"}, "model_type"),
     ({"model_type": ABSENT}, "model_type"),
     ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
     ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
     ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
     ({"rope_scaling": "default"}, "rope_scaling"), ({"rope_scaling": [2.0]}, "rope_scaling"),
     ({"rope_scaling": {"type": "linear"}}, "factor"),
     ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor"),
     ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
     ({"hidden_size": ABSENT}, "hidden_size"), ({"intermediate_size": None}, "intermediate_size"),
     ({"num_hidden_layers": -1}, "num_hidden_layers"),
     ({"num_attention_heads": 0}, "num_attention_heads"), ({"vocab_size": "40"}, "vocab_size"),
     ({"max_position_embeddings": 64.5}, "max_position_embeddings"),
     ({"head_dim": True}, "head_dim"), ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
     ({"rope_theta": math.inf}, "rope_theta"), ({"num_key_value_heads": 3}, "num_key_value_heads"),
     ({"head_dim": 7}, "head_dim"), ({"eos_token_id": "</s>"}, "eos_token_id"),
     ({"eos_token_id": [[2]]}, "eos_token_id")], ids=str)
def test_configs_that_are_refused(tmp_path, changes, field):
    """Guards against a model that loads and then says nonsense, and against a traceback: the file
    and the field are named."""
    with pytest.raises(UserError) as error:
        load_config(tmp_path, changes)
    assert f"{tmp_path / 'config.json'}: " in str(error.value) and field in str(error.value)


def test_the_file_at_fault_is_named(tmp_path):
    """Guards against blaming config.json for what stands in generation_config.json."""
    with pytest.raises(UserError, match="generation_config.json: eos_token_id"):
        load_config(tmp_path, {}, {"eos_token_id": "</s>"})


@pytest.mark.parametrize("content", [b"{", b"[]", b'"llama"', b"\xff\xfe{}", None],
                         ids=["cut", "list", "text", "binary", "none"])
def test_config_files_that_are_refused(tmp_path, content):
    """Guards against a traceback from the JSON reader."""
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    assert f"{path}: " in str(error.value)


# --------------------------------------------------------------------------------------------------
# Weights

def file_tensors(config=TINY):
    """Random tensors by the names and shapes of Hugging Face's Llama; written out here, so that it
    is a second opinion."""
    d, m, q, kv = (config.hidden_size, config.intermediate_size,
                   config.num_attention_heads * config.head_dim,
                   config.num_key_value_heads * config.head_dim)
    shapes = {
        "model.embed_tokens": (config.vocab_size, d), "model.norm": (d,),
        "lm_head": (config.vocab_size, d)
    }
    for i in range(config.num_hidden_layers):
        shapes |= {
            f"model.layers.{i}.{name}": shape
            for name, shape in {
                "input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (
                    q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (
                        kv, d), "self_attn.o_proj": (d, q), "mlp.gate_proj": (
                            m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m)
            }.items()
        }
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def write(folder, tensors, shards=1, config=TINY):
    """A model folder with these tensors in one file, or dealt out to several with an index."""
    folder.joinpath("config.json").write_text(json.dumps(config_json(config)))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensor
                   for name, tensor in tensors.items()
                   if weight_map[name] == shard}, folder / shard)
    folder.joinpath("model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards", [1, 2])
def test_every_weight_arrives(tmp_path, shards, dtype):
    """Guards against a tensor in the wrong place, in the wrong order of a stack, of the wrong
    dtype, or in no shard."""
    tensors = file_tensors()
    write(tmp_path, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
          shards)
    model = load_llama(tmp_path, dtype=dtype)
    expected = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in tensors.items()}
    loaded = named_weights(model)
    assert loaded.keys() == expected.keys()
    assert all(loaded[name].dtype == dtype and torch.equal(loaded[name], expected[name])
               for name in expected)
    for i, layer in enumerate(model.layers):
        for stack, names in ((layer.self_attn.qkv_proj, [
                "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
        ]), (layer.mlp.gate_up_proj, ["mlp.gate_proj", "mlp.up_proj"])):
            assert torch.equal(stack.weight,
                               torch.cat([expected[f"layers.{i}.{name}.weight"] for name in names]))


@pytest.mark.parametrize("stored_twice", [False, True])
def test_a_tied_head_is_the_embedding(tmp_path, stored_twice):
    """Guards against a tied head with memory of its own, or overwritten by the copy that some files
    hold."""
    tensors = file_tensors()
    write(
        tmp_path, tensors if stored_twice else
        {name: t
         for name, t in tensors.items()
         if name != "lm_head.weight"}, config=replace(TINY, tie_word_embeddings=True))
    model = load_llama(tmp_path)
    assert model.lm_head.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_all_faults_of_the_weights_are_told_at_once(tmp_path):
    """Guards against mending a folder one error at a time, and against a weight that is silently
    left unset or cut."""
    tensors = file_tensors()
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    tensors["model.layers.4.mlp.up_proj.weight"] = torch.ones(48, 32)
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.ones(32, 47)
    write(tmp_path, tensors)
    with pytest.raises(UserError) as error:
        load_llama(tmp_path)
    for words in (str(tmp_path), "2 missing: lm_head.weight, norm.weight",
                  "1 unexpected: layers.4.mlp.up_proj.weight",
                  "1 misshapen: layers.1.mlp.down_proj.weight [32, 47] instead of [32, 48]"):
        assert words in str(error.value)


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize(
    "content, name, words",
    [(lambda: save(file_tensors())[:-1000], SINGLE, "truncated"),
     (lambda: b"weights" * 99, SINGLE, "not a safetensors file"),
     (lambda: b"", SINGLE, "not a safetensors file"), (None, SINGLE, "missing"),
     (lambda: save({n: t.to(torch.int8)
                    for n, t in file_tensors().items()}), SINGLE, "quantised"),
     (lambda: b'{"weight_map": {"a": "model-7.safetensors"}}', INDEX,
      "model-7.safetensors: missing"), (lambda: b'{"metadata": {}}', INDEX, "weight_map"),
     (lambda: b"{", INDEX, "JSON")],
    ids=["cut", "garbage", "empty", "no file", "int8", "no shard", "no weight_map", "index cut"])
def test_damaged_weights_are_refused(tmp_path, content, name, words):
    """Guards against a traceback, and against integer weights that are cast as though they were
    numbers to compute with."""
    write(tmp_path, file_tensors())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content())
    with pytest.raises(UserError) as error:
        load_llama(tmp_path)
    assert str(tmp_path) in str(error.value) and words in str(error.value)


def test_a_missing_folder_is_refused(tmp_path):
    """Guards against an error about a file inside a folder that is not there, which hides a
    mistyped --model."""
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_llama(tmp_path / "nowhere")


PEAK = """
import sys
import torch
from support.checkpoint import load_llama
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
load_llama(sys.argv[1], dtype=torch.bfloat16)  # a tiny one: what PyTorch imports on the way is not the weights' memory
before = status("VmRSS")
load_llama(sys.argv[2], dtype=torch.bfloat16)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_holds_the_weights_and_no_second_copy(tmp_path):
    """Guards against a whole checkpoint in memory, or in mapped pages, beside the model that it
    fills."""
    config = replace(TINY, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
                     num_attention_heads=8, num_key_value_heads=8, head_dim=64, vocab_size=4000)
    for name, shape in (("tiny", TINY), ("big", config)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, {n: t.bfloat16()
                                for n, t in file_tensors(shape).items()}, shards=4, config=shape)
    files = [path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors")]
    result = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "tiny", tmp_path / "big"],
                            check=True, capture_output=True, cwd=Path(llama.__file__).parent)
    assert int(result.stdout) <= sum(files) + max(files) + 20e6


# --------------------------------------------------------------------------------------------------
# Constants, bad weights, packed weights

def frequencies(config):
    """RoPE's frequencies in Python's float64, by the rule on wavelengths as Llama 3's authors wrote
    it."""
    result = []
    for i in range(0, config.head_dim, 2):
        f = config.rope_theta ** -(i / config.head_dim)
        if config.rope_type == "linear":
            f /= config.rope_scaling[0]
        elif config.rope_type == "llama3":
            factor, low, high, original = config.rope_scaling
            wavelength = 2 * math.pi / f
            if wavelength > original / low:
                f /= factor
            elif wavelength >= original / high:
                smooth = (original / wavelength - low) / (high - low)
                f = (1 - smooth) * f / factor + smooth * f
        result.append(f)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("rope_type, scaling", [("default", ()), ("linear", (4.0,)),
                                                ("llama3", (8.0, 1.0, 4.0, 8192.0)),
                                                ("llama3", (32.0, 1.0, 4.0, 8192.0))])
def test_rope_frequencies(rope_type, scaling):
    """Guards against a wrong RoPE, which shows only as text that slowly loses its thread. Shapes
    are Llama 3's."""
    config = replace(TINY, head_dim=128, rope_theta=500000.0, rope_type=rope_type,
                     rope_scaling=scaling)
    ours, expected = inverse_frequencies(config, torch.device("cpu")), frequencies(config)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name, words", [("embed_tokens", "the embedding"),
                                         ("layers.0.self_attn.k_proj", "layer 0:"),
                                         ("layers.1.input_layernorm", "layer 1:"),
                                         ("layers.3.mlp.down_proj", "layer 3:"),
                                         ("norm", "LM head"), ("lm_head", "LM head")])
def test_where_numbers_break_is_named(name, words, value):
    """Guards against fluent-looking text from NaN, which wins every comparison, and against blaming
    the wrong weights."""
    model = random_model()
    named_weights(model)[f"{name}.weight"][0] = value
    with pytest.raises(UserError, match=words):
        list(generate(model, NoDrafter(model), [0, 1, 2], 4))


@can_pack
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_products_are_the_plain_ones(dtype):
    """Guards against a pack that does nothing, or permutes what it packs."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 products on this CPU")
    plain, packed = random_model(dtype=dtype), random_model(dtype=dtype, packed_for=8)
    linears = [[m for m in model.modules() if isinstance(m, Linear)] for model in (plain, packed)]
    for a, b in zip(*linears, strict=True):
        x = torch.randn(1, 8, a.weight.shape[1],
                        generator=torch.Generator().manual_seed(0)).to(dtype)
        assert b.weight is None
        assert torch.allclose(a(x), b(x), rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("tied", [False, True])
def test_packing_twice_is_packing_once(tied):
    """Guards against a second pack of a shared target, and against a tied head that takes the
    embedding with it."""
    config = replace(TINY, tie_word_embeddings=tied)
    models = [
        random_model(config),
        random_model(config, packed_for=8),
        pack(random_model(config, packed_for=8), 8)
    ]
    texts = [[
        token for r in generate(model, NoDrafter(model), [1, 2, 3], 20) for token in r.tokens
    ] for model in models]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("dtype, operator, stand_in",
                         [(torch.float16, "_is_mkldnn_fp16_supported", lambda: False),
                          (torch.bfloat16, "_is_mkldnn_bf16_supported", lambda: False),
                          (torch.float32, "_reorder_linear_weight", None)],
                         ids=["float16", "bfloat16", "old PyTorch"])
def test_what_cannot_be_packed_stays_plain(monkeypatch, dtype, operator, stand_in):
    """Guards against a CPU, or a PyTorch, on which a packed product raises an error at the first
    token."""
    def missing(*args):
        raise NotImplementedError(operator)

    monkeypatch.setattr(torch.ops.mkldnn, operator, stand_in or missing)
    model, plain = random_model(dtype=dtype, packed_for=8), random_model(dtype=dtype)
    assert torch.equal(model(torch.tensor([[1, 2, 3]])), plain(torch.tensor([[1, 2, 3]])))
