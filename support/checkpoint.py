"""Files in and out: Hugging Face model folders, atomic writing. UserError names the file.

    config.json -> LlamaConfig     *.safetensors or pytorch_model*.bin -> Llama, its fingerprint

Nothing of the algorithm. What a config.json asks for and `llama.py` does not do is refused by name.
"""
import ctypes
import hashlib
import math
import warnings
import zipfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from llama import Linear, Llama, LlamaConfig
from support.errors import UserError, require
from support.files import read_json, require_folder, write_atomically
from support.packing import use_fast_norms
from support.terminal import say

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize

# --------------------------------------------------------------------------------------------------
# Writing weights

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
    refuse_lora(Path(folder))
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
        hidden_size=hidden_size, intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"), num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden_size // heads), vocab_size=number("vocab_size"),
        max_position_embeddings=min(context, window),
        rms_norm_eps=number("rms_norm_eps", 1e-6, float),
        rope_theta=number("rope_theta", 10000.0, float, rope if "rope_theta" in rope else data),
        rope_type=rope_type,
        rope_scaling=tuple(number(name, kind=float, source=rope)
                           for name in ROPE_FIELDS[rope_type]),
        tie_word_embeddings=data.get("tie_word_embeddings") or False,
        bos_token_id=data.get("bos_token_id"), eos_token_ids=eos_ids(folder, number("vocab_size")),
        sliding_window=window if window < context else None)
    require(rope_type != "llama3" or rope["low_freq_factor"] < rope["high_freq_factor"],
            f"{path}: low_freq_factor = {rope.get('low_freq_factor')} must be below "
            f"high_freq_factor = {rope.get('high_freq_factor')}")
    require(isinstance(config.tie_word_embeddings, bool),
            f"{path}: tie_word_embeddings = {config.tie_word_embeddings!r}, must be true or false")
    bos = config.bos_token_id
    require(bos is None or type(bos) is int and bos in range(config.vocab_size),  # True is no id
            f"{path}: bos_token_id = {config.bos_token_id!r}, must be below vocab_size = "
            f"{config.vocab_size}")
    require(heads % config.num_key_value_heads == 0,
            f"{path}: num_attention_heads = {heads} is no multiple of num_key_value_heads = "
            f"{config.num_key_value_heads}")
    require(config.head_dim % 2 == 0, f"{path}: head_dim = {config.head_dim} must be even")
    return config


def refuse_lora(folder):
    """UserError if peft saved a LoRA in this folder, beside a model or alone."""
    path = folder / "adapter_config.json"
    require(not path.exists(), f"{path}: a LoRA is not applied; remove the file if it is merged "
            "already, else merge it: from peft import AutoPeftModelForCausalLM as Lora; "
            f"Lora.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained('merged')")


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

    In a context that ends there that is what every row sees anyway.
    """
    kinds = data.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind not in LAYER_TYPES for kind in kinds):
        raise UserError(f"{path}: layer_types = {str(kinds)[:60]} is not implemented, only a list "
                        f"of {' and '.join(LAYER_TYPES)}")
    if data.get("sliding_window") is None and "sliding_attention" in kinds:
        raise UserError(f"{path}: layer_types has sliding_attention, sliding_window must say of "
                        "how many positions")
    return data.get("use_sliding_window") is not False or "sliding_attention" in kinds


def eos_ids(folder, vocab_size):
    """The end-of-sequence ids that config.json and generation_config.json name, ascending."""
    found = set()
    for path in (Path(folder) / "config.json", Path(folder) / "generation_config.json"):
        ids = read_json(path).get("eos_token_id") if path.exists() else None
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(i) is int for i in ids):
            raise UserError(f"{path}: eos_token_id = {ids!r}, must be an integer or a list of "
                            "integers")
        beyond = [i for i in ids if i not in range(vocab_size)]
        for i in beyond:
            say(f"note: {path}: eos_token_id = {i} ends no text, vocab_size is {vocab_size}")
        found |= {*ids} - {*beyond}
    return tuple(sorted(found))


# What generation_config.json may ask for and nothing here does, with the number that asks for
# nothing, as null and an empty list do. The second: if it asks for sampling.
NOT_FOLLOWED = {
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": 0, "suppress_tokens": 0,
    "begin_suppress_tokens": 0, "sequence_bias": 0, "min_length": 0, "min_new_tokens": 0,
    "exponential_decay_length_penalty": 0, "stop_strings": 0, "guidance_scale": 1, "num_beams": 1,
    "penalty_alpha": 0, "dola_layers": 0, "watermarking_config": 0}
NOT_SAMPLED = {"min_p": 0, "top_h": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}


def not_followed(folder):
    """One line, if a folder asks for other tokens than greedy decoding gives; else None."""
    paths = folder / "generation_config.json", folder / "config.json"  # the latter in old folders
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    data, parts = {name: value for name, value in read_json(path).items() if value}, []
    table = NOT_FOLLOWED | (NOT_SAMPLED if "do_sample" in data else {})
    if found := [name for name, neutral in table.items() if data.get(name, neutral) != neutral]:
        parts.append("not followed: " + ", ".join(f"{name} {data[name]!r}"[:60] for name in found))
    if "do_sample" in data:
        flags = {"temperature": 1} | data
        parts.append("to sample as it asks: " + " ".join(
            f"--{name.replace('_', '-')} {flags[name]!r}"
            for name in ("temperature", "top_k", "top_p") if name in flags))
    return f"note: {path}: {'; '.join(parts)}" if parts else None


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

def build(cls, config, device, dtype):
    """A module without weights: shapes first, then memory on `device` that is not initialised."""
    with torch.device("meta"):
        module = cls(config)
    for owner in module.modules():  # what `to_empty` does, which imports sympy
        for name, weight in owner.named_parameters(recurse=False):
            weight = torch.empty(weight.shape, dtype=dtype, device=device)
            setattr(owner, name, torch.nn.Parameter(weight, requires_grad=False))
    if isinstance(module, Llama):
        module.tie()  # moving off the meta device gave each name memory of its own
    return module


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


def trained_weights(module, vocabulary):
    """{name: tensor} of a trained module, in bfloat16, and of the tokens that it drafts (or None).
    """
    tensors = {name: weight.detach().bfloat16() for name, weight in named_weights(module).items()}
    return tensors if vocabulary is None else tensors | {"vocabulary": vocabulary.int()}


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


def file_entries(path, opened):
    """{name: (shape, function that reads it)} of a file of either format."""
    return (safetensors_entries(path) if path.suffix == ".safetensors" else
            pickle_entries(path, opened))


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
    """{name: (shape, function that reads it)} of a file of torch.save, which may hold tensors and
    nothing else.

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


def digest_of(module):
    """Tells a module's weights from others."""
    return digest(weight.detach().cpu() for weight in module.parameters())


def fingerprint(samples):
    """Tells one Llama from another, of {name: sample}.

    Whatever file the weights are in and of whichever dtype: they go by way of bfloat16 to float16,
    which is where two copies of one model, each rounded, meet. (A small bfloat16 number is rounded
    again, or lost, in float16.)
    """
    return digest(samples[name].half() for name in sorted(samples))


# --------------------------------------------------------------------------------------------------
# Model folders

# In transformers' order.
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
               "pytorch_model.bin.index.json")


def is_constant(name):
    return name.endswith("rotary_emb.inv_freq")  # old checkpoints store it


def load_llama(folder, device="cpu", dtype=torch.float32, config=None):
    """A Llama from a Hugging Face folder: config.json, and the files that `weight_files` finds.

    Weights are cast to `dtype` one tensor at a time. config: if config.json has been read.
    """
    folder = Path(folder)
    require_folder(folder, "--model")
    config, tensors = weights_in(folder, config or read_config(folder))
    model = build(Llama, config, device, dtype)
    model.fingerprint = fingerprint(load_weights(model, tensors, folder))
    return use_fast_norms(model).eval()


def weights_in(folder, config):
    """(the LlamaConfig, {name: (shape, function that reads the tensor)}) of a model folder."""
    tensors, opened = {}, {}
    for path in weight_files(folder):
        tensors |= {name.removeprefix("model."): entry
                    for name, entry in file_entries(path, opened).items() if not is_constant(name)}
    if config.tie_word_embeddings:
        config = untie_other_head(folder, config, tensors)
    return config, tensors


def fingerprint_of(folder):
    """The fingerprint of a model folder that has not been loaded."""
    _, tensors = weights_in(folder, read_config(folder))
    return fingerprint({name: sample(read()) for name, (_, read) in tensors.items()})


def untie_other_head(folder, config, tensors):
    """The LlamaConfig of a tied model: not tied if the files hold another head than the embedding.

    What they hold twice, or by the head's name alone, is left in `tensors` as the embedding.
    """
    head = tensors.pop("lm_head.weight", None)
    if head is None or equal(head, tensors.setdefault("embed_tokens.weight", head)):
        return config
    say(f"note: {folder}: lm_head.weight is used, it is not the embedding's matrix, though "
        "config.json says tie_word_embeddings")
    tensors["lm_head.weight"] = head
    return replace(config, tie_word_embeddings=False)


def equal(a, b):
    """Whether two entries (shape, function that reads) are of the same numbers."""
    return a is b or tuple(a[0]) == tuple(b[0]) and bool((a[1]() == b[1]()).all())


def weight_files(folder):
    """The paths of the files that a model's weights are in."""
    path = first_of(folder, MODEL_FILES)
    require(path, f"{folder}: weights are missing, looked for {', '.join(MODEL_FILES)}")
    return shards(path) if path.suffix == ".json" else [path]


def first_of(folder, names):
    """The path of the first of these files that the folder has, or None.

    A line says so if it has more: they may be of an older save.
    """
    found = [name for name in names if (folder / name).exists()]
    if len(found) > 1:
        say(f"note: {folder}: the weights are those of {found[0]}, not of {', '.join(found[1:])}")
    return folder / found[0] if found else None


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


def refuse_misfit(folder, config, data, model):
    """UserError unless what was trained for a model is of this one's shape, and for its weights.

    config: the LlamaConfig that it was trained with; data: its config.json.
    """
    for name in ("hidden_size", "num_attention_heads", "head_dim", "vocab_size"):
        theirs, ours = getattr(config, name), getattr(model.config, name)
        require(theirs == ours, f"{folder}: the adapter has {name} = {theirs}, the model {ours}")
    require(data.get("target", model.fingerprint) == model.fingerprint,
            f"{folder / 'config.json'}: trained for another model (fingerprint "
            f"{data.get('target')}, this one has {model.fingerprint}); remove `target` to use it "
            "all the same")


def vocabulary_ids(folder, ids, model):
    """The token ids that are drafted, of a file, checked, on the model's device."""
    size = model.config.vocab_size
    require(not ids.is_floating_point() and ids.dim() == 1 and len(ids) and ids.min() >= 0
            and ids.max() < size,
            f"{folder}: vocabulary must be a list of token ids below vocab_size = {size}")
    return ids.long().to(model.norm.weight.device)
