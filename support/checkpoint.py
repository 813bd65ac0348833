"""Files in and out: Hugging Face model folders, adapters, atomic writing. UserError names the file.

    config.json -> LlamaConfig     *.safetensors or pytorch_model*.bin -> Llama, its fingerprint
    adapter folder -> Adapter      folder of Medusa heads -> Heads

Nothing of the algorithm. What a config.json asks for and `llama.py` does not do is refused by name.
"""
import ctypes
import hashlib
import json
import math
import os
import warnings
import zipfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from drafters.medusa import TREE, Heads
from kangaroo import ADAPTERS
from llama import Linear, Llama, LlamaConfig, build
from support.errors import UserError

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize

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


def write_safetensors(path, tensors, facts=None):
    """Write {name: tensor}, and {name: text} of facts, atomically.

    Needs no NumPy, as safetensors.torch does.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    specs = {name: TensorSpec(dtype=str(t.dtype).removeprefix("torch."), shape=t.shape,
                              data_ptr=t.data_ptr(), data_len=t.nbytes)
             for name, t in tensors.items()}
    write_atomically(path, serialize(specs, {"format": "pt"} | (facts or {})))


# --------------------------------------------------------------------------------------------------
# config.json

# What llama.py does, in config.json's words. Any other value would give wrong tokens silently.
IMPLEMENTED = {
    "model_type": ("llama", "mistral"), "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None), "mlp_bias": (False, None), "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, None),
}
LAYER_TYPES = "full_attention", "sliding_attention"
ROPE_FIELDS = {"default": (), "linear": ("factor",), "llama3": (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
# Where transformers takes other values than a Llama's for fields that a config.json leaves out.
DEFAULTS = {"mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072,
                        "sliding_window": 4096}}


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

    refuse_quantised(path, data)
    rope = refuse_other_models(path, data)
    for name, value in DEFAULTS.get(data["model_type"], {}).items():
        data.setdefault(name, value)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    heads, hidden_size = number("num_attention_heads"), number("hidden_size")
    # Vicuna-16k names in max_sequence_length how far its RoPE was stretched.
    context = max(number("max_position_embeddings", 2048), number("max_sequence_length", 1))
    window = number("sliding_window", context) if slides(path, data) else context
    config = LlamaConfig(
        hidden_size, number("intermediate_size"), number("num_hidden_layers"), heads,
        number("num_key_value_heads", heads), number("head_dim", hidden_size // heads),
        number("vocab_size"), min(context, window), number("rms_norm_eps", 1e-6, float),
        number("rope_theta", 10000.0, float, rope if "rope_theta" in rope else data), rope_type,
        tuple(number(name, kind=float, source=rope) for name in ROPE_FIELDS[rope_type]),
        data.get("tie_word_embeddings") or False, data.get("bos_token_id"), eos_ids(folder),
        window if window < context else None)
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


def refuse_quantised(path, data):
    """UserError if config.json, or a file that GPTQ or AWQ put beside it, names a quantisation."""
    found = [(f"{path}: {name}", data[name], "unnamed")
             for name in ("quantization_config", "compression_config") if data.get(name)]
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if path.with_name(name).exists():
            found.append((path.with_name(name), read_json(path.with_name(name)), method))
    for where, settings, method in found:
        method = settings.get("quant_method", method) if isinstance(settings, dict) else method
        raise UserError(f"{where}: quantised weights (quant_method {method}) are not implemented, "
                        "only float32, bfloat16 and float16")


def refuse_other_models(path, data):
    """UserError if a config.json asks for what `llama.py` does not do; returns its RoPE settings.

    Those are in rope_parameters, or before transformers 5 in rope_scaling; it reads that first.
    """
    name = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    rope = data.get(name) or {}
    flat = isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values())
    for field, values in IMPLEMENTED.items():
        for value in (data.get(field, values[0]), (rope if flat else {}).get(field, values[0])):
            if value not in values:
                known = " or ".join(repr(v) for v in values if v is not None)
                raise UserError(f"{path}: {field} = {value!r} is not implemented, only {known}")
    if not flat:
        raise UserError(f"{path}: {name} = {str(rope)[:60]} is not implemented, only an object "
                        "that holds for all layers")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_FIELDS:
        raise UserError(f"{path}: {name} of type {rope_type!r} is not implemented, only "
                        f"{', '.join(ROPE_FIELDS)}")
    return rope


def slides(path, data):
    """Whether a row sees `sliding_window` positions only, itself among them.

    Up to so many positions that is what every row sees anyway: there the context ends.
    """
    kinds = data.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind not in LAYER_TYPES for kind in kinds):
        raise UserError(f"{path}: layer_types = {str(kinds)[:60]} is not implemented, only a list "
                        f"of {' and '.join(LAYER_TYPES)}")
    if data.get("sliding_window") is None and "sliding_attention" in kinds:
        raise UserError(f"{path}: layer_types has sliding_attention, sliding_window must say of "
                        "how many positions")
    return data.get("use_sliding_window") is not False or "sliding_attention" in kinds


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
    del data["sliding_window"]  # read_config has put it into max_position_embeddings
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
        *path, kind = name.split(".")
        owner = module.get_submodule(".".join(path))
        parts = owner.parts if isinstance(owner, Linear) else {path[-1]: len(weight)}
        for part, rows in zip(parts, weight.split(list(parts.values()))):
            weights[".".join([*path[:-1], part, kind])] = rows
    return weights


def load_weights(module, tensors, source):
    """Fill `module` from {name: (shape, function that reads the tensor)}, one tensor at a time.

    Returns {name: a sample of the tensor}, for `fingerprint`. UserError lists missing, unexpected
    and misshapen names.
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
    return {name: fill(expected[name], read(), f"{source}: {name}")
            for name, (_, read) in tensors.items()}


@torch.no_grad()
def fill(weight, tensor, name):
    """Copy a file's tensor to where it belongs, and return a sample of it.

    A function of its own, so that the tensor is let go before the next one's file is opened.
    """
    if not tensor.is_floating_point():
        raise UserError(f"{name} is {tensor.dtype}, quantised weights are not implemented")
    weight.copy_(tensor)
    return sample(tensor)


def read_tensor(path, name):
    with safe_open(path, framework="pt") as file:  # closed again: the pages are not ours for longer
        return file.get_tensor(name)


def safetensors_entries(path):
    """{name: (shape, function that reads it)} of a safetensors file's tensors; none is read yet."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: (file.get_slice(name).get_shape(), partial(read_tensor, path, name))
                    for name in file.keys()}
    except (OSError, SafetensorError) as e:
        message = f"{path}: missing, truncated or not a safetensors file ({e})"
        raise UserError(message) from None


def pickle_entries(path, opened):
    """The same of a file of torch.save, which may hold tensors and nothing else.

    `opened` is a dict to keep the last file that was read in: one at a time is in memory.
    """
    return {name: (tensor.shape, lambda name=name: open_pickle(path, opened)[name])
            for name, tensor in open_pickle(path, opened).items()}


def open_pickle(path, opened):
    """{name: tensor} of a file of torch.save, mapped into memory if it is not of the old format."""
    if path not in opened:
        opened.clear()  # before the next one is read
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on pickle protocols
                opened[path] = dict(torch.load(path, map_location="cpu", weights_only=True,
                                               mmap=zipfile.is_zipfile(path)))
        except Exception as e:  # torch.load raises whatever a damaged pickle leads it to
            why = getattr(e, "strerror", None) or type(e).__name__
            raise UserError(f"{path}: missing, truncated or holds more than tensors "
                            f"({why})") from None
        for name, t in opened[path].items():
            if not (isinstance(name, str) and torch.is_tensor(t) and t.device.type == "cpu"
                    and t.layout == torch.strided):
                raise UserError(f"{path}: holds more than tensors: {str(name)[:60]!r} is "
                                f"{type(t).__name__}")
    return opened[path]


# --------------------------------------------------------------------------------------------------
# Which model is this?

SAMPLE = 512  # numbers of a matrix; of a vector all


def sample(tensor):
    """About `SAMPLE` numbers from all over a weight, in bfloat16, the first among them."""
    flat, n = tensor.detach().reshape(-1), tensor.numel()
    # An odd stride meets every column of a matrix, for their number is mostly a power of two.
    chosen = flat[::(n // SAMPLE | 1) if tensor.dim() > 1 else 1]
    return chosen.to(torch.bfloat16, copy=True)  # a view would keep the file in memory


def digest(tensors):
    """16 hex digits of the bytes of tensors."""
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
    return result.hexdigest()[:16]


def fingerprints(samples):
    """(fingerprint, the one of former versions): tell one Llama from another, of {name: sample}.

    Whatever file the weights are in and of whichever dtype: they go by way of bfloat16 to float16,
    which is where two copies of one model, each rounded, meet. (A small bfloat16 number is rounded
    again, or lost, in float16.) The former one knew the norms only, and not merged LoRA weights.
    """
    norms = [name for name in sorted(samples) if name.endswith("norm.weight")]
    return (digest(samples[name].half() for name in sorted(samples)),
            digest(samples[name] for name in norms))


# --------------------------------------------------------------------------------------------------
# Model folders

def is_constant(name):
    return name.endswith("rotary_emb.inv_freq")  # old checkpoints store it


def load_llama(folder, device="cpu", dtype=torch.float32):
    """A Llama from a Hugging Face folder: config.json, and the files that `weight_files` finds.

    Weights are cast to `dtype` one tensor at a time.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, --model wants one with config.json and "
                        "*.safetensors or pytorch_model*.bin")
    model = build(Llama, read_config(folder), device, dtype)
    tensors, opened = {}, {}
    for path in weight_files(folder):
        entries = (safetensors_entries(path) if path.suffix == ".safetensors" else
                   pickle_entries(path, opened))
        tensors |= {name.removeprefix("model."): entry
                    for name, entry in entries.items() if not is_constant(name)}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # some files store the tied matrix twice
    samples = load_weights(model, tensors, folder)
    model.fingerprint, model.former_fingerprint = fingerprints(samples)
    return model.eval()


def weight_files(folder):
    """The paths of the files that a model's weights are in: safetensors, if there are such."""
    looked_for = []
    for name in ("model.safetensors", "pytorch_model.bin"):
        index, single = folder / f"{name}.index.json", folder / name
        if index.exists():
            return shards(index)
        if single.exists():
            return [single]
        looked_for += [single.name, index.name]
    raise UserError(f"{folder}: weights are missing, looked for {', '.join(looked_for)}")


def shards(index):
    """The paths of the files that an index names, which are in its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: has no weight_map")
    names = sorted({str(shard) for shard in weight_map.values()})
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{index}: {name} must be a file in the same folder")
    return [index.parent / name for name in names]


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
                        "adapter.safetensors or pytorch_model.bin")
    where = folder / "config.json"
    data = read_json(where)
    if "medusa_num_heads" in data:
        raise UserError(f"{where}: holds Medusa heads, for --drafter medusa")
    config = read_config(folder)
    refuse_misfit(folder, config, data, model)
    exit_layer = exit_layer_of(where, data, exit_layer, model.config.num_hidden_layers)
    refuse_bad_settings(where, data)
    architecture = data.get("architecture", "attention")
    if architecture not in list(ADAPTERS):  # a list, for JSON may hold what has no hash
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
    if data.get("target", model.fingerprint) not in (model.fingerprint, model.former_fingerprint):
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
        entries = pickle_entries(folder / "pytorch_model.bin", {})
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


# --------------------------------------------------------------------------------------------------
# Medusa heads

HEADS_FILES = "medusa_lm_head.safetensors", "medusa_lm_head.pt"


def load_heads(folder, model):
    """The heads in a folder, for this target: config.json, and one of HEADS_FILES.

    They are as many as the file has: a published config.json may count fewer. Without projections
    of their own they use the target's LM head, or the rows of it that `vocabulary` lists.
    """
    folder = Path(folder)
    path, data, entries = heads_files(folder)
    refuse_misfit(folder, model.config, data, model)
    vocabulary, size = entries.pop("vocabulary", None), model.config.hidden_size
    first = list(entries["0.0.linear.weight"][0]) if "0.0.linear.weight" in entries else []
    if first[-1:] not in ([], [size]):
        raise UserError(f"{path}: the heads have hidden_size = {first[-1]}, the model {size}")
    blocks = data["medusa_num_layers"]
    n = max(data["medusa_num_heads"], len({name.split(".")[0] for name in entries}))
    own = model.config.vocab_size if f"0.{blocks}.weight" in entries else 0
    if own and vocabulary:
        raise UserError(f"{path}: holds projections, which have no use for `vocabulary`")
    weight = model.norm.weight
    heads = build(Heads, (n, blocks, size, own), weight.device, weight.dtype)
    load_weights(heads, {f"heads.{name}": entry for name, entry in entries.items()}, path)
    if vocabulary:
        heads.draft_from(vocabulary_ids(folder, vocabulary[1](), model), model.lm_head)
    heads.tree = tree_of(folder / "config.json", data.get("medusa_choices", TREE))
    heads.source = str(folder)
    return heads.eval()


def heads_files(folder):
    """(path of the weights, config.json as a dict, {name: (shape, function that reads)})."""
    paths = [folder / name for name in HEADS_FILES if (folder / name).exists()]
    if not paths:
        raise UserError(f"{folder}: --drafter medusa wants a folder with config.json and "
                        f"{' or '.join(HEADS_FILES)}")
    where = folder / "config.json"
    data = {"medusa_num_layers": 1} | read_json(where)
    for name in ("medusa_num_heads", "medusa_num_layers"):
        if not isinstance(data.get(name), int) or data[name] < 1:
            raise UserError(f"{where}: {name} = {data.get(name)!r}, must be an integer of at least "
                            "1")
    if paths[0].suffix == ".safetensors":
        return paths[0], data, safetensors_entries(paths[0])
    return paths[0], data, pickle_entries(paths[0], {})


def tree_of(where, paths):
    """The tree that a config.json names, checked: paths of choices, each one's parent before it."""
    seen = {()}
    for path in paths if isinstance(paths, (list, tuple)) else [None]:
        fits = isinstance(path, (list, tuple)) and all(isinstance(i, int) and i >= 0 for i in path)
        if not fits or not path or tuple(path[:-1]) not in seen or tuple(path) in seen:
            raise UserError(f"{where}: medusa_choices must be a list of paths such as [0, 1], each "
                            f"after the path without its last choice, {path!r} is not")
        seen.add(tuple(path))
    return [tuple(path) for path in paths]
