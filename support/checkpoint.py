"""Files in and out: Hugging Face model folders, adapters, atomic writing. UserError names the file.

    config.json -> LlamaConfig     model.safetensors, shards -> Llama     adapter folder -> Adapter

Nothing of the algorithm. What a config.json asks for and `llama.py` does not do is refused by name.
"""
import ctypes
import hashlib
import json
import math
import os
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize

from kangaroo import ADAPTERS
from llama import Linear, Llama, LlamaConfig, UserError, build

# --------------------------------------------------------------------------------------------------
# Files

def read_json(path):
    """The object in a JSON file, as a dict."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a JSON {type(data).__name__}, an object is needed")
    return data


def write_json(path, data):
    write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())


def write_atomically(path, data):
    """Write bytes so that at any moment `path` holds all of the old ones or all of the new ones."""
    path = Path(path)
    try:
        with open(path.with_name(path.name + ".tmp"), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None


def write_safetensors(path, tensors):
    """Write {name: tensor}, atomically. Needs no NumPy, as safetensors.torch does."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    specs = {name: TensorSpec(dtype=str(t.dtype).removeprefix("torch."), shape=t.shape,
                              data_ptr=t.data_ptr(), data_len=t.nbytes)
             for name, t in tensors.items()}
    write_atomically(path, serialize(specs, {"format": "pt"}))


# --------------------------------------------------------------------------------------------------
# config.json

# What llama.py does, in config.json's words. Any other value would give wrong tokens silently.
IMPLEMENTED = {
    "model_type": ("llama", "mistral"), "hidden_act": ("silu",), "attention_bias": (False,),
    "mlp_bias": (False,), "sliding_window": (None,), "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
}
ROPE_FIELDS = {"default": (), "linear": ("factor",), "llama3": (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def read_config(folder):
    """folder/config.json, and generation_config.json's end-of-sequence ids, as a LlamaConfig.

    UserError if the model is no Llama, or one that `llama.py` would compute wrongly.
    """
    path = Path(folder) / "config.json"
    data = {"model_type": "(missing)"} | read_json(path)

    def number(name, default=None, kind=int, source=data):
        value = source.get(name)
        value = default if value is None else value
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not fits or not 0 < value < math.inf:
            raise UserError(f"{path}: {name} = {value!r}, must be a positive {kind.__name__}")
        return kind(value)

    rope = refuse_other_models(path, data)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    heads, hidden_size = number("num_attention_heads"), number("hidden_size")
    config = LlamaConfig(
        hidden_size, number("intermediate_size"), number("num_hidden_layers"), heads,
        number("num_key_value_heads", heads), number("head_dim", hidden_size // heads),
        number("vocab_size"), number("max_position_embeddings", 2048),
        number("rms_norm_eps", 1e-6, float),
        number("rope_theta", 10000.0, float, rope if "rope_theta" in rope else data), rope_type,
        tuple(number(name, kind=float, source=rope) for name in ROPE_FIELDS[rope_type]),
        data.get("tie_word_embeddings") or False, data.get("bos_token_id"), eos_ids(folder))
    for fits, message in (
            (rope_type != "llama3" or rope["low_freq_factor"] < rope["high_freq_factor"],
             f"low_freq_factor = {rope.get('low_freq_factor')} must be below "
             f"high_freq_factor = {rope.get('high_freq_factor')}"),
            (isinstance(config.tie_word_embeddings, bool),
             f"tie_word_embeddings = {config.tie_word_embeddings!r}, must be true or false"),
            (config.bos_token_id is None or config.bos_token_id in range(config.vocab_size),
             f"bos_token_id = {config.bos_token_id!r}, must be below vocab_size = "
             f"{config.vocab_size}"),
            (heads % config.num_key_value_heads == 0,
             f"num_attention_heads = {heads} is no multiple of num_key_value_heads = "
             f"{config.num_key_value_heads}"),
            (config.head_dim % 2 == 0, f"head_dim = {config.head_dim} must be even")):
        if not fits:
            raise UserError(f"{path}: {message}")
    return config


def refuse_other_models(path, data):
    """UserError if a config.json asks for what `llama.py` does not do; returns RoPE's settings."""
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    for name, values in IMPLEMENTED.items():
        default = rope.get(name, values[0]) if isinstance(rope, dict) else values[0]
        value = data.get(name, default)
        if value not in values:
            raise UserError(f"{path}: {name} = {value!r} is not implemented, only "
                            f"{' or '.join(map(repr, values))}")
    known = isinstance(rope, dict)
    rope_type = rope.get("rope_type", rope.get("type", "default")) if known else rope
    if not known or not isinstance(rope_type, str) or rope_type not in ROPE_FIELDS:
        raise UserError(f"{path}: rope_scaling of type {rope_type!r} is not implemented, only "
                        f"{', '.join(ROPE_FIELDS)}")
    return rope


def eos_ids(folder):
    """The end-of-sequence ids that config.json and generation_config.json name, ascending."""
    found = set()
    for path in (Path(folder) / "config.json", Path(folder) / "generation_config.json"):
        ids = read_json(path).get("eos_token_id") if path.exists() else None
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(isinstance(i, int) for i in ids):
            raise UserError(f"{path}: eos_token_id = {ids!r}, must be an integer or a list of "
                            "integers")
        found |= set(ids)
    return tuple(sorted(found))


def config_json(config):
    """The config.json, as a dict, that `read_config` reads this LlamaConfig from."""
    data = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False} | asdict(config)
    rope_type, values = data.pop("rope_type"), data.pop("rope_scaling")
    eos = data.pop("eos_token_ids")
    if rope_type != "default":
        fields = dict(zip(ROPE_FIELDS[rope_type], values))
        data["rope_scaling"] = {"rope_type": rope_type} | fields
    return data | {"eos_token_id": list(eos)}


# --------------------------------------------------------------------------------------------------
# Weights

def named_weights(module):
    """{Hugging Face's name: the parameter, or the rows of the stacked parameter, that it fills}."""
    weights = {}
    for name, weight in module.named_parameters():
        path = name.split(".")[:-1]
        owner = module.get_submodule(".".join(path))
        parts = owner.parts if isinstance(owner, Linear) else {path[-1]: len(weight)}
        for part, rows in zip(parts, weight.split(list(parts.values()))):
            weights[".".join([*path[:-1], part, "weight"])] = rows
    return weights


def load_weights(module, tensors, source):
    """Fill `module` from {name: (shape, function that reads the tensor)}, one tensor at a time.

    UserError lists missing, unexpected and misshapen names.
    """
    expected = named_weights(module)
    misshapen = [f"{name} {list(shape)} instead of {list(expected[name].shape)}"
                 for name, (shape, _) in tensors.items()
                 if name in expected and tuple(shape) != tuple(expected[name].shape)]
    kinds = (("missing", sorted(expected.keys() - tensors.keys())),
             ("unexpected", sorted(tensors.keys() - expected.keys())), ("misshapen", misshapen))
    faults = [f"{len(names)} {what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
              for what, names in kinds if names]
    if faults:
        raise UserError(f"{source}: weights do not fit the config: {'; '.join(faults)}")
    with torch.no_grad():
        for name, (_, read) in tensors.items():
            tensor = read()
            if not tensor.is_floating_point():
                raise UserError(f"{source}: {name} is {tensor.dtype}, quantised weights are not "
                                "implemented")
            expected[name].copy_(tensor)


def read_tensor(path, name):
    with safe_open(path, framework="pt") as file:  # closed again: the pages are not ours for longer
        return file.get_tensor(name)


def safetensors_entries(path):
    """{name: (shape, function that reads the tensor)} of a safetensors file; nothing is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: (file.get_slice(name).get_shape(), partial(read_tensor, path, name))
                    for name in file.keys()}
    except (OSError, SafetensorError) as e:
        message = f"{path}: missing, truncated or not a safetensors file ({e})"
        raise UserError(message) from None


def pickle_entries(path):
    """The same of a file of torch.save, which may hold tensors and nothing else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): (t.shape, lambda t=t: t) for name, t in state.items()}
    except Exception as e:  # torch.load raises whatever a damaged pickle leads it to
        raise UserError(f"{path}: damaged, or holds more than tensors "
                        f"({type(e).__name__})") from None


def fingerprint(tensors):
    """16 hex digits that tell one trained Llama from another: a digest of its norms' weights.

    It is the same for a bfloat16 copy.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in tensors if name.endswith("norm.weight")):
        tensor = tensors[name][1]().bfloat16().contiguous()
        digest.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
    return digest.hexdigest()[:16]


def is_constant(name):
    return name.endswith("rotary_emb.inv_freq")  # old checkpoints store it


def load_llama(folder, device="cpu", dtype=torch.float32):
    """A Llama from a Hugging Face folder: config.json, and model.safetensors or its shards.

    Weights are cast to `dtype` one tensor at a time.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, --model wants one with config.json and "
                        "*.safetensors")
    model = build(Llama, read_config(folder), device, dtype)
    tensors = {}
    for shard in shards(folder):
        tensors |= {name.removeprefix("model."): entry
                    for name, entry in safetensors_entries(folder / shard).items()
                    if not is_constant(name)}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # some files store the tied matrix twice
    load_weights(model, tensors, folder)
    model.fingerprint = fingerprint(tensors)
    return model.eval()


def shards(folder):
    """The names of the files that a model's weights are in."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: has no weight_map")
    return sorted({str(shard) for shard in weight_map.values()})


# --------------------------------------------------------------------------------------------------
# Adapters

# What an adapter's config.json may choose: for a chain, and under the key `tree` for a tree.
SETTINGS = {"steps": int, "threshold": (int, float), "top_candidates": int, "nodes": int}


def load_adapter(folder, model, exit_layer=None):
    """(adapter, its config.json as a dict with `exit_layer`) for this target, not packed yet.

    Reads config.json with adapter.safetensors, or with pytorch_model.bin as the published Kangaroo
    adapters have it. `exit_layer` overrides the config's. The name "random" gives an untrained
    adapter, to test with. UserError if it does not fit the model.
    """
    if str(folder) == "random":
        layers = model.config.num_hidden_layers
        return random_adapter(model), {"exit_layer": exit_layer_of("random", {
            "exit_layer": min(2, layers - 1)}, exit_layer, layers)}
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, --adapter wants one with config.json and "
                        "adapter.safetensors")
    where, config = folder / "config.json", read_config(folder)
    data = read_json(where)
    refuse_misfit(folder, config, data, model)
    exit_layer = exit_layer_of(where, data, exit_layer, model.config.num_hidden_layers)
    refuse_bad_settings(where, data)
    architecture = data.get("architecture", "attention")
    if architecture not in list(ADAPTERS):  # a list, for JSON may hold what cannot be looked up
        raise UserError(f"{where}: architecture = {architecture!r}, choose from "
                        f"{', '.join(ADAPTERS)}")
    weight = model.norm.weight
    adapter = build(ADAPTERS[architecture], config, weight.device, weight.dtype)
    entries = adapter_entries(folder)
    vocabulary = entries.pop("vocabulary", None)
    load_weights(adapter, entries, folder)
    if vocabulary:
        adapter.draft_from(vocabulary_ids(folder, vocabulary[1](), model), model.lm_head)
    adapter.source = str(folder)
    return adapter.eval(), {**data, "exit_layer": exit_layer}


def random_adapter(model):
    """An untrained adapter: norms are ones, matrices keep the size of what passes through."""
    config, weight = replace(model.config, num_hidden_layers=1), model.norm.weight
    adapter = build(ADAPTERS["attention"], config, weight.device, weight.dtype)
    generator = torch.Generator().manual_seed(0)
    for p in adapter.parameters():
        noise = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
        p.copy_(noise if p.dim() > 1 else torch.ones_like(p))
    adapter.source = "random"
    return adapter.eval()


def refuse_misfit(folder, config, data, model):
    """UserError unless an adapter's config is of this model's shape, and its weights for it."""
    for name in ("hidden_size", "num_attention_heads", "head_dim", "vocab_size"):
        ours, theirs = getattr(config, name), getattr(model.config, name)
        if ours != theirs:
            raise UserError(f"{folder}: the adapter has {name} = {ours}, the model {theirs}")
    if data.get("target", model.fingerprint) != model.fingerprint:
        raise UserError(f"{folder / 'config.json'}: trained for another model (fingerprint "
                        f"{data['target']}, this one has {model.fingerprint}); remove `target` to "
                        "use it all the same")


def exit_layer_of(where, data, wanted, n_layers):
    """The layers that draft: `wanted`, else what the adapter's config.json says."""
    exit_layer = data.get("exit_layer") if wanted is None else wanted
    if exit_layer is None:
        raise UserError(f"{where}: names no exit_layer, give --exit-layer (the paper: 2 for 7B, 3 "
                        "for 13B)")
    if not isinstance(exit_layer, int) or not 0 <= exit_layer < n_layers:
        raise UserError(f"exit layer {exit_layer!r}: must be at least 0 and below the model's "
                        f"{n_layers} layers")
    return exit_layer


def refuse_bad_settings(where, data):
    """UserError unless γ, η and so on are numbers, for the chain and for the tree."""
    if not isinstance(data.get("tree", {}), dict):
        raise UserError(f"{where}: tree = {data['tree']!r} is no object with the settings of "
                        "--tree")
    for settings in (data, data.get("tree", {})):
        for name, kind in SETTINGS.items():
            if name in settings and not isinstance(settings[name], kind):
                raise UserError(f"{where}: {name} = {settings[name]!r} is not a number that "
                                f"--{name.replace('_', '-')} would take")


def adapter_entries(folder):
    """{name: (shape, function that reads the tensor)} of an adapter's folder, named as in it."""
    if (folder / "adapter.safetensors").exists() or not (folder / "pytorch_model.bin").exists():
        entries = safetensors_entries(folder / "adapter.safetensors")
    else:
        entries = pickle_entries(folder / "pytorch_model.bin")
    return {name.removeprefix("layers.0."): entry for name, entry in entries.items()
            if not is_constant(name)}


def vocabulary_ids(folder, ids, model):
    """The token ids that an adapter drafts from, checked, on the model's device."""
    size = model.config.vocab_size
    if ids.is_floating_point() or ids.dim() != 1 or not len(ids) or ids.min() < 0 or (
            ids.max() >= size):
        raise UserError(f"{folder}: vocabulary must be a list of token ids below vocab_size = "
                        f"{size}")
    return ids.long().to(model.norm.weight.device)
