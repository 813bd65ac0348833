"""From a Hugging Face folder to a Llama: what is accepted, what is refused and in which words, and
that the weights arrive."""
import copy
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import weakref
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import kangaroo
import llama
import train_adapter
from drafters.adapters import load_adapter
from drafters.lookup import PromptLookupDrafter
from kangaroo import NoDrafter, NotFinite, generate
from llama import Linear, RMSNorm, inverse_frequencies
from support import start
from support.checkpoint import load_llama, named_weights, read_config
from support.decoder import Decoder, load
from support.errors import UserError
from support.packing import FastRMSNorm, PackedLinear, pack, swap, use_fast_norms

import pytest
import torch
from helpers import (
    DTYPES,
    TINY,
    config_json,
    random_adapter,
    random_model,
    save_file,
    write_adapter,
    write_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

ABSENT = type("ABSENT", (), {"__repr__": lambda self: "ABSENT"})()  # the same name in all processes
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
    ({"rope_parameters": {"rope_type": "yarn"}, "rope_scaling": {"type": "linear", "factor": 2}
      }, {"rope_type": "linear", "rope_scaling": (2.0,)}),
    ({"hidden_act": "swish", "attention_bias": None, "mlp_bias": None}, {}),
    ({"quantization_config": None}, {}),
    ({"max_sequence_length": 4096}, {"max_position_embeddings": 4096}),
    ({"model_type": "mistral", "sliding_window": None}, {}),
    ({"model_type": "mistral", "sliding_window": None, "num_key_value_heads": ABSENT,
      "num_attention_heads": 16, "max_position_embeddings": ABSENT},
     {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 131072}),
    ({"model_type": "mistral", "max_position_embeddings": 32768},
     {"max_position_embeddings": 4096, "sliding_window": 4096}),
    ({"sliding_window": 4096}, {}),
    ({"sliding_window": 1024}, {}),
    ({"sliding_window": 1023}, {"max_position_embeddings": 1023, "sliding_window": 1023}),
    ({"sliding_window": 64, "use_sliding_window": True},
     {"max_position_embeddings": 64, "sliding_window": 64}),
    ({"sliding_window": 64, "use_sliding_window": False}, {}),
    ({"sliding_window": None, "layer_types": ["full_attention"] * 4}, {}),
    ({"sliding_window": 64, "use_sliding_window": False, "layer_types": [
        "sliding_attention", "full_attention"]},
     {"max_position_embeddings": 64, "sliding_window": 64}),
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


def test_an_end_that_cannot_occur_is_left_out(tmp_path, capfd):
    """Guards against an index error in training, where the ends of texts are counted, and against
    saying it twice."""
    write_model(tmp_path)
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [-1, 3, 340]}')
    decoder = load(tmp_path, draft_model=tmp_path, device="cpu", dtype="float32")
    assert decoder.model.config.eos_token_ids == (2, 3)
    lines = [f"note: {generation}: eos_token_id = {i} ends no text, vocab_size is 340\n"
             for i in (-1, 340)]
    assert capfd.readouterr().err == 2 * "".join(lines)  # the model's and the draft model's


@pytest.mark.parametrize(
    "changes, field",
    [({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
     ({"hidden_act": "gelu"}, "hidden_act"),
     ({"sliding_window": -1}, "sliding_window"), ({"sliding_window": "4k"}, "sliding_window"),
     ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
     ({"layer_types": "full_attention"}, "layer_types"),
     ({"layer_types": ["sliding_attention"]}, "sliding_window"),
     ({"rope_interleaved": True}, "rope_interleaved"), ({"model_type": "gpt2"}, "model_type"),
     ({"model_type": ["llama"]}, "model_type"),
     ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
     ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
      "partial_rotary_factor"),
     ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
     ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "longrope"),
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
     ({"eos_token_id": [[2]]}, "eos_token_id"), ({"eos_token_id": True}, "eos_token_id"),
     ({"bos_token_id": True}, "bos_token_id"), ({"bos_token_id": 1.0}, "bos_token_id")], ids=str)
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


GPTQ = {"bits": 4, "group_size": 128, "desc_act": False}


@pytest.mark.parametrize("name, data, words", [
    ("config.json", {"quantization_config": GPTQ | {"quant_method": "gptq"}},
     "quantization_config: quantised weights (quant_method gptq)"),
    ("config.json", {"quantization_config": {"load_in_8bit": True}}, "quant_method unnamed"),
    ("config.json", {"quantization_config": "int4"}, "quant_method unnamed"),
    ("config.json", {"compression_config": {"quant_method": "sparseml"}}, "sparseml"),
    ("quantize_config.json", GPTQ, "quantised weights (quant_method gptq)"),
    ("quant_config.json", {"w_bit": 4}, "quantised weights (quant_method awq)")])
def test_quantised_folders_are_refused_by_name(tmp_path, name, data, words):
    """Guards against a GPTQ folder whose config.json is silent, refused only for names of weights
    that tell a user nothing; and against a dictionary of settings as the message."""
    (tmp_path / "quantize.json").write_text("a file of another name says nothing")
    load_config(tmp_path, {})
    if name == "config.json":
        data = config_json(TINY) | data
    (tmp_path / name).write_text(json.dumps(data))
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    message = str(error.value)
    assert message.startswith(str(tmp_path / name)) and words in message
    assert "{" not in message and "only float32, bfloat16 and float16" in message


def test_a_lora_is_refused_by_name(tmp_path):
    """Guards against the text of the model without it, where transformers applies it; and against
    a question for config.json, which a LoRA alone has not."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for read in (load_llama, lambda folder: load_adapter(folder, random_model())):
        with pytest.raises(UserError, match=r"adapter_config.json: a LoRA .*merge_and_unload\(\)"):
            read(tmp_path)
    write(tmp_path, file_tensors())
    with pytest.raises(UserError, match="adapter_config.json: a LoRA"):
        load_llama(tmp_path)


def test_the_context_ends_where_a_window_would_slide(tmp_path):
    """Guards against tokens computed with keys that a Mistral's window has dropped, a prompt that
    is refused for a field with another value, and an end that nobody was told of."""
    config = write_model(tmp_path)
    data = config_json(config) | {"model_type": "mistral", "sliding_window": 40}
    (tmp_path / "config.json").write_text(json.dumps(data))
    decoder = load(tmp_path, adapter="random", dtype="float32", device="cpu")
    assert decoder.describe().endswith(" · width 7 · context 40 (sliding_window)")
    decoder.model.config = replace(decoder.model.config, eos_token_ids=())
    for drafter in ("kangaroo", "none"):
        assert len(decoder.generate([1] * 30, drafter, 99)[1]["ids"]) == 10
    with pytest.raises(UserError, match=r"must have from 1 to 39 \(sliding_window 40\)"):
        decoder.encode("stones and hats " * 20)
    (tmp_path / "config.json").write_text(json.dumps(data | {"sliding_window": None}))
    decoder = load(tmp_path, device="cpu", dtype="float32", adapter=False)
    assert "sliding" not in decoder.describe("none")


@pytest.mark.parametrize("content", [b"{", b"[]", b'"llama"', b"\xff\xfe{}", b"[" * 200_000,
                                     None],
                         ids=["cut", "list", "text", "binary", "deep", "none"])
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


FILES = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin"),
         "old bin": ("pytorch_model", "bin")}  # the last: torch.save's format before 1.6


def write_weights(tensors, path, kind):
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "bin")


def write(folder, tensors, shards=1, config=TINY, kind="safetensors"):
    """A model folder with these tensors in one file, or dealt out to several with an index."""
    stem, suffix = FILES[kind]
    folder.joinpath("config.json").write_text(json.dumps(config_json(config)))
    if shards == 1:
        write_weights(tensors, folder / f"{stem}.{suffix}", kind)
        return
    weight_map = {name: f"{stem}-{i % shards}.{suffix}" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        write_weights({name: tensor
                       for name, tensor in tensors.items()
                       if weight_map[name] == shard}, folder / shard, kind)
    folder.joinpath(f"{stem}.{suffix}.index.json").write_text(
        json.dumps({"weight_map": weight_map}))


# Of a tied matrix files hold one name or both; safetensors' own save_model keeps the head's.
kept_of_two = st.sampled_from([["model.embed_tokens.weight"], ["lm_head.weight"],
                               ["model.embed_tokens.weight", "lm_head.weight"]])


@cache
def bfloat16_tensors(config):
    """Values that bfloat16 holds; some are too small for float16, or too large."""
    tensors = {name: t.bfloat16().float() for name, t in file_tensors(config).items()}
    tensors["model.layers.1.mlp.down_proj.weight"][:, ::2] *= 2.0 ** -20
    tensors["model.layers.2.mlp.up_proj.weight"][3] *= 2.0 ** 18
    return tensors


@cache
def only_fingerprint(config):
    """Of these tensors in the plainest folder."""
    with tempfile.TemporaryDirectory() as folder:
        tensors = {name: t for name, t in bfloat16_tensors(config).items()
                   if not config.tie_word_embeddings or name != "lm_head.weight"}
        write(Path(folder), tensors, config=config)
        return load_llama(folder).fingerprint


@settings(max_examples=60)
@given(kind=st.sampled_from(list(FILES)), shards=st.integers(1, 3), stored=st.sampled_from(DTYPES),
       dtype=st.sampled_from(DTYPES), tied=st.booleans(), kept=kept_of_two,
       padding=st.sampled_from([0, 1, 24]), constants=st.booleans())
def test_every_weight_arrives_from_every_kind_of_folder(kind, shards, stored, dtype, tied, kept,
                                                        padding, constants):
    """Guards against a tensor in the wrong place, in the wrong order of a stack, of the wrong
    dtype or in no shard; a tied head that is asked for, or overwritten by the copy that some files
    hold; and against copies of one model that do not count as the same."""
    config = replace(TINY, tie_word_embeddings=tied, vocab_size=TINY.vocab_size + padding)
    tensors = {name: t.to(stored) for name, t in bfloat16_tensors(config).items()}
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        for name in {"lm_head.weight", "model.embed_tokens.weight"} - {*kept}:
            del tensors[name]
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)} if constants else {}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), tensors | inv_freq, shards, config, kind)
        model = load_llama(folder, dtype=dtype)
    loaded = named_weights(model)
    assert tied == (model.lm_head.weight.data_ptr() == model.embed_tokens.weight.data_ptr())
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and tied:
            name = "embed_tokens.weight"
        weight = loaded.pop(name.removeprefix("model."), None)
        if weight is not None:
            assert weight.dtype == dtype and torch.equal(weight, tensor.to(dtype)), name
    assert not loaded and model.fingerprint == only_fingerprint(config)


def test_another_head_than_the_tied_one_is_used(tmp_path, capfd):
    """Guards against a head that a LoRA was merged into, dropped because config.json still says
    that the model is tied; and against an adapter for the one that goes with the other."""
    def load_with(tensors, tied):
        write(tmp_path, tensors, 2, replace(TINY, tie_word_embeddings=tied))
        return load_llama(tmp_path)

    tensors, ids = file_tensors(), torch.tensor([[1, 2, 3]])
    untied, found = load_with(tensors, False), load_with(tensors, True)
    assert torch.equal(found(ids), untied(ids)) and found.config == untied.config
    del tensors["lm_head.weight"]
    assert untied.fingerprint == found.fingerprint != load_with(tensors, True).fingerprint
    err = capfd.readouterr().err
    assert err.startswith(f"note: {tmp_path}: lm_head.weight is used") and err.count("\n") == 1


@pytest.mark.parametrize("kind", FILES)
def test_all_faults_of_the_weights_are_told_at_once(tmp_path, kind):
    """Guards against mending a folder one error at a time, and against a weight that is silently
    left unset or cut."""
    tensors = file_tensors()
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    tensors["model.layers.4.mlp.up_proj.weight"] = torch.ones(48, 32)
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.ones(32, 47)
    write(tmp_path, tensors, kind=kind)
    with pytest.raises(UserError) as error:
        load_llama(tmp_path)
    for words in (str(tmp_path), "2 missing: lm_head.weight, norm.weight",
                  "1 unexpected: layers.4.mlp.up_proj.weight",
                  "1 misshapen: layers.1.mlp.down_proj.weight [32, 47] instead of [32, 48]"):
        assert words in str(error.value)


@pytest.mark.parametrize("kind, shards, other", [
    ("safetensors", 2, "model.safetensors.index.json"),
    ("bin", 2, "pytorch_model.bin.index.json"), ("bin", 1, "pytorch_model.bin")])
def test_of_two_saves_transformers_choice_is_loaded(tmp_path, capfd, kind, shards, other):
    """Guards against an older save, beside which its own save_pretrained leaves a newer one, and
    against silence on there being two."""
    write(tmp_path, {name: 2 * t for name, t in file_tensors().items()}, shards, kind=kind)
    load_llama(tmp_path)
    assert not capfd.readouterr().err
    write(tmp_path, file_tensors())
    assert torch.equal(load_llama(tmp_path).norm.weight, file_tensors()["model.norm.weight"])
    assert capfd.readouterr().err == (
        f"note: {tmp_path}: the weights are those of model.safetensors, not of {other}\n")


def test_of_two_adapters_one_is_named(tmp_path, capfd):
    """Guards against an adapter that is another than the last one copied there."""
    model = random_model()
    write_adapter(tmp_path, TINY)
    torch.save({}, tmp_path / "pytorch_model.bin")
    load_adapter(tmp_path, model)
    assert "those of adapter.safetensors, not of pytorch_model.bin" in capfd.readouterr().err


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    """Guards against an error that names one format of two, which sends a user to convert."""
    (tmp_path / "config.json").write_text(json.dumps(config_json(TINY)))
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(UserError) as error:
        load_llama(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: weights are missing, looked for model.safetensors, "
        "model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json")


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


SHARDED = {"safetensors": "model-1.safetensors", "bin": "pytorch_model-1.bin"}


@pytest.mark.parametrize("damage", ["cut", "half", "garbage", "empty", "gone", "a folder"])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
def test_a_damaged_shard_is_refused(tmp_path, kind, damage):
    """Guards against a traceback of a download that broke off, and a line that names no file."""
    write(tmp_path, file_tensors(), 2, kind=kind)
    path = tmp_path / SHARDED[FILES[kind][1]]
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"cut": data[:-1000], "half": data[:len(data) // 2],
                          "garbage": b"weights" * 99, "empty": b""}[damage])
    with pytest.raises(UserError) as error:
        load_llama(tmp_path)
    assert str(error.value).startswith(f"{path}: missing, truncated or ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind, file", SHARDED.items())
@pytest.mark.parametrize("index, words", [
    (b"{", "JSON"), (b"[]", "JSON list"), (b'{"metadata": {}}', "has no weight_map"),
    (b'{"weight_map": ["FILE"]}', "has no weight_map"), (b'{"weight_map": {"a": 7}}', "7: missing"),
    (b'{"weight_map": {"a": "gone-FILE"}}', "gone-{}: missing"),
    (b'{"weight_map": {"a": "../FILE"}}', "../{} must be a file in the same folder"),
    (b'{"weight_map": {"a": "x/../../FILE"}}', "must be a file in the same folder"),
    (b'{"weight_map": {"a": "/FILE"}}', "/{} must be a file in the same folder"),
    (b'{"weight_map": {}}', "39 missing")], ids=str)
def test_a_bad_index_is_refused(tmp_path, kind, file, index, words):
    """Guards against a traceback, and against a file that is read from outside of the folder."""
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", file_tensors(), 2, kind=kind)
    write_weights(file_tensors(), tmp_path / file, kind)
    name = f"{'.'.join(FILES[kind])}.index.json"
    (tmp_path / "model" / name).write_bytes(index.replace(b"FILE", file.encode()))
    with pytest.raises(UserError) as error:
        load_llama(tmp_path / "model")
    message = str(error.value)
    assert str(tmp_path / "model") in message and words.format(file) in message


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_integers_are_not_weights(tmp_path, kind):
    """Guards against quantised weights that are cast as though they were numbers to compute
    with."""
    write(tmp_path, {n: t.to(torch.int8) for n, t in file_tensors().items()}, kind=kind)
    with pytest.raises(UserError, match="is torch.int8, quantised weights"):
        load_llama(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [
    lambda path: {"norm.weight": Code(path)}, lambda path: Code(path), lambda path: [torch.ones(2)],
    lambda path: torch.ones(2), lambda path: {"norm.weight": [1.0]},
    lambda path: {0: torch.ones(2)}, lambda path: {"a": torch.ones(2, device="meta")},
    lambda path: {"a": torch.eye(2).to_sparse()}, lambda path: {"state_dict": file_tensors()}],
    ids=["code in it", "code", "list", "tensor", "numbers", "key", "meta", "sparse", "nested"])
def test_a_pickle_of_other_things_is_refused(tmp_path, content, zipped):
    """Guards against code in a downloaded file that runs, and a traceback for what is no dict of
    tensors."""
    write(tmp_path, {}, kind="bin")
    path = tmp_path / "pytorch_model.bin"
    torch.save(content(tmp_path / "ran"), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as error:
        load_llama(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "holds more than tensors" in message
    assert "\n" not in message and not (tmp_path / "ran").exists()


def test_a_zip_that_is_no_model_is_refused(tmp_path):
    """Guards against a traceback of PyTorch's reader of zip files."""
    write(tmp_path, {}, kind="bin")
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="pytorch_model.bin: missing, truncated or holds more"):
        load_llama(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    """Guards against an error about a file inside a folder that is not there, which hides a
    mistyped --model."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no config.json, --model wants a "):
        load_llama(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_llama(tmp_path / "nowhere")


PEAK = """
import os, sys
import torch
from support.checkpoint import load_llama
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
for folder in sys.argv[1:]:
    if os.fork() == 0:
        # A tiny one: what PyTorch imports on the way is not the weights' memory.
        load_llama(folder + "/tiny", dtype=torch.bfloat16)
        before = status("VmRSS")
        load_llama(folder + "/big", dtype=torch.bfloat16)
        print(status("VmHWM") - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_holds_the_weights_and_no_second_copy(tmp_path):
    """Guards against a whole checkpoint in memory, or in mapped pages, beside the model that it
    fills."""
    config = replace(TINY, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
                     num_attention_heads=8, num_key_value_heads=8, head_dim=64, vocab_size=4000)
    folders = [tmp_path / kind for kind in FILES]
    for name, shape in (("tiny", TINY), ("big", config)):
        tensors = {n: t.bfloat16() for n, t in file_tensors(shape).items()}
        for kind in FILES:
            (tmp_path / kind / name).mkdir(parents=True)
            write(tmp_path / kind / name, tensors, 4, shape, kind)
    result = subprocess.run([sys.executable, "-c", PEAK, *folders], check=True, text=True,
                            capture_output=True, cwd=Path(llama.__file__).parent)
    for peak, folder in zip(result.stdout.split(), folders, strict=True):
        files = [path.stat().st_size for path in (folder / "big").glob("*model-*")]
        assert int(peak) <= sum(files) + max(files) + 20e6, folder.name


def test_packing_keeps_no_matrix_that_it_has_replaced():
    """Guards the memory of loading: a list of all modules kept every plain matrix until the last
    one was packed, a second copy of the model."""
    replaced, alive = [], []

    def make(linear):
        alive.append(sum(ref() is not None for ref in replaced))
        replaced.append(weakref.ref(linear))
        return torch.nn.Identity()

    swap(random_model(), llama.Linear, make)
    assert len(alive) == 4 * TINY.num_hidden_layers + 1 and not any(alive)


# --------------------------------------------------------------------------------------------------
# Which model is this?

MEDIUM = replace(TINY, hidden_size=128, intermediate_size=352, num_hidden_layers=2,
                 vocab_size=1000)  # more numbers in a matrix than are digested


def test_every_weight_is_in_the_fingerprint(tmp_path):
    """Guards against merged LoRA weights that pass for the model before: only norms were
    digested. One row, or a column, or a small change everywhere is enough."""
    tensors = file_tensors(MEDIUM)
    write(tmp_path, tensors, config=MEDIUM)
    found = {load_llama(tmp_path).fingerprint}
    for i, (name, tensor) in enumerate(tensors.items()):
        changed = tensor.clone()
        if i % 3 == 2 or tensor.dim() == 1:
            changed += 0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
        elif i % 3 == 1:
            changed[:, 7] += 1
        else:
            changed[5] += 1
        write(tmp_path, tensors | {name: changed}, config=MEDIUM)
        found.add(load_llama(tmp_path).fingerprint)
    assert len(found) == 1 + len(tensors)


def test_an_adapter_is_refused_by_a_target_with_one_other_projection(tmp_path):
    """Guards against an adapter that drafts for a fine-tuned copy of its target, which looks like
    bad training."""
    config = write_model(tmp_path / "model")
    before = load_llama(tmp_path / "model")
    write_adapter(tmp_path / "adapter", config)
    path = tmp_path / "adapter" / "config.json"
    facts = json.loads(path.read_text())
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.2.self_attn.v_proj.weight"] += 0.01
    save_file(weights, tmp_path / "model" / "model.safetensors")
    after = load_llama(tmp_path / "model")

    path.write_text(json.dumps(facts | {"target": before.fingerprint}))
    load_adapter(tmp_path / "adapter", before)
    with pytest.raises(UserError, match=f"config.json: trained for another model .*"
                                        f"{before.fingerprint}.*{after.fingerprint}"):
        load_adapter(tmp_path / "adapter", after)


def test_the_adapter_that_comes_along_knows_its_target():
    """Guards against a fingerprint that changes from version to version: this one was written when
    norms ceased to be all of it."""
    folder = Path(kangaroo.__file__).parent / "models" / "stories"
    model = load_llama(folder)
    assert model.fingerprint == "3bd26074ec8bc03f"
    assert json.loads((folder / "adapter" / "config.json").read_text())["target"] == (
        model.fingerprint)


# --------------------------------------------------------------------------------------------------
# From published folders to text and to an adapter

def as_published(folder):
    """A folder like Vicuna's and one like an adapter of the paper's: weights in float16, pickled,
    with the constants of their time, in shards; no word on exit layer or target."""
    config = write_model(folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    (folder / "model" / "model.safetensors").unlink()
    write(folder / "model", {name: t.half() for name, t in weights.items()} | {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)}, 2,
          config, "bin")
    (folder / "adapter").mkdir()
    adapter = named_weights(random_adapter(random_model(config)))
    torch.save({name if name == "norm.weight" else f"layers.0.{name}": w.half()
                for name, w in adapter.items()}, folder / "adapter" / "pytorch_model.bin")
    data = config_json(replace(config, num_hidden_layers=1))
    (folder / "adapter" / "config.json").write_text(json.dumps(data))
    text = "\n\n".join(f"{i} hats? An old turtle! The stones liked it too." for i in range(40))
    (folder / "plain.txt").write_text(text)


def train(folder, *more):
    """Two updates from the published adapter; the exit status."""
    args = ["--model", folder / "model", "--init", folder / "adapter", "--out", folder / "trained",
            "--data", folder / "plain.txt", "--exit-layer", 1, "--updates", 2, "--batches", 1,
            "--batch-tokens", 300, "--max-length", 100, "--window", 10, "--device", "cpu",
            "--dtype", "float32", "--eval-prompts", 1, *more]
    return train_adapter.main([str(word) for word in args])


def test_published_folders_decode_and_train(tmp_path, capfd):
    """Guards against a claim in README that nothing has tried: the paper's target and adapter in
    the files that they were published in, all the way."""
    as_published(tmp_path)
    common = ["--model", str(tmp_path / "model"), "--prompt", "stones", "--compare", "--json",
              "--threshold", "0", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "32"]
    assert start.main([*common, "--adapter", str(tmp_path / "adapter"), "--exit-layer",
                              "1"]) == 0, capfd.readouterr().err
    before = json.loads(capfd.readouterr().out)
    assert train(tmp_path) == 0, capfd.readouterr().err
    capfd.readouterr()
    assert start.main([*common, "--adapter", str(tmp_path / "trained")]) == 0
    after = json.loads(capfd.readouterr().out)
    assert before["identical"] and after["identical"] and before["ids"] == after["ids"]
    assert before["drafted"][0] == 6 and before["ids"]


def test_training_does_not_go_on_with_another_projection(tmp_path, capfd):
    """Guards --resume: it went on with a target whose norms were the same, for an adapter that is
    of neither."""
    as_published(tmp_path)
    assert train(tmp_path) == 0 and train(tmp_path, "--resume") == 0, capfd.readouterr().err
    path = tmp_path / "model" / "pytorch_model-0.bin"
    weights = torch.load(path, weights_only=True)
    name = next(name for name in weights if name.endswith("proj.weight"))
    torch.save(weights | {name: weights[name] + 0.01}, path)
    capfd.readouterr()
    assert train(tmp_path, "--resume") == 2
    err = capfd.readouterr().err
    assert "checkpoint.pt: was made with --model of fingerprint" in err and err.count("\n") == 1


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
    decoder = Decoder(Path("m"), model, None, "none", None)
    for drafter in ("none", PromptLookupDrafter(model)):
        with pytest.raises(UserError, match=f"NaN or infinite values come out of .*{words}"):
            list(decoder.rounds([0, 1, 2], drafter, 4))
    with pytest.raises(NotFinite):
        list(generate(model, NoDrafter(model), [0, 1, 2], 4))


@can_pack
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_products_are_the_plain_ones(dtype):
    """Guards against a pack that does nothing, or permutes what it packs."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 products on this CPU")
    plain, packed = random_model(dtype=dtype), random_model(dtype=dtype, packed_for=8)
    linears = [[m for m in model.modules() if isinstance(m, kind)]
               for model, kind in ((plain, Linear), (packed, PackedLinear))]
    assert linears[0] and not any(isinstance(m, Linear) for m in packed.modules())
    for a, b in zip(*linears, strict=True):
        x = torch.randn(1, 8, a.weight.shape[1],
                        generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(a.weight, b.weight) and a.parts == b.parts
        assert torch.allclose(a(x), b(x), rtol=0, atol=8 * torch.finfo(dtype).eps)


@can_pack
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_is_still_a_module(dtype, tied):
    """Guards weights that are gone from state_dict() once they are packed, and a copy that shares
    memory with its original, or is none."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 products on this CPU")
    config = replace(TINY, tie_word_embeddings=tied)
    plain, packed = (random_model(config, 1, dtype, packed_for=width) for width in (None, 8))
    assert any(isinstance(m, PackedLinear) for m in packed.modules())
    expected, found = plain.state_dict(), packed.state_dict()
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert weight.dtype == found[name].dtype and torch.equal(weight, found[name]), name
    ids = torch.tensor([[1, 2, 3]])
    logits, other = packed(ids), copy.deepcopy(packed)
    assert torch.equal(other(ids), logits)
    assert other.state_dict().keys() == found.keys()
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(packed(ids), logits) and not torch.equal(other(ids), logits)
    plain.load_state_dict(found)


def test_fast_norms_are_the_plain_ones():
    """Guards a variance in place of a mean square, which differ where a mean is not zero; plain
    ones remain where nobody loads."""
    plain, fast = random_model(), random_model(packed_for=8)
    norms = [[m for m in model.modules() if isinstance(m, RMSNorm)] for model in (plain, fast)]
    assert {type(m) for m in norms[0]} == {RMSNorm} and {type(m) for m in norms[1]} == {FastRMSNorm}
    for a, b in zip(*norms, strict=True):
        x = 3 + torch.randn(2, 8, len(a.weight), generator=torch.Generator().manual_seed(0))
        assert torch.equal(a.weight, b.weight) and torch.allclose(a(x), b(x), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_packing_twice_is_packing_once(tied):
    """Guards against a second pack of a shared target, and against a tied head that takes the
    embedding with it."""
    config = replace(TINY, tie_word_embeddings=tied)
    models = [random_model(config), random_model(config, packed_for=8),
              pack(random_model(config, packed_for=8), 8)]
    texts = [[token for r in generate(model, NoDrafter(model), [1, 2, 3], 20) for token in r.tokens]
             for model in models]
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
    model, plain = (use_fast_norms(random_model(dtype=dtype)) for _ in range(2))
    pack(model, 8)
    assert torch.equal(model(torch.tensor([[1, 2, 3]])), plain(torch.tensor([[1, 2, 3]])))
