"""Tiny random models, in memory and as Hugging Face folders. Nothing here is downloaded."""
import ctypes
import json
import os
from contextlib import contextmanager
from dataclasses import replace

from drafters.rest import Datastore, suffix_order
from kangaroo import Adapter
from llama import KVCache, Llama, LlamaConfig, Sampler
from support.checkpoint import build, named_weights
from support.datastore import join_documents
from support.graphs import exact_kernels
from support.packing import pack, use_fast_norms

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(),
                                                  reason="there is no GPU"))
]
exact_kernels()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TINY = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=8, vocab_size=40, max_position_embeddings=1024)


# A falsifying example is printed with all its numbers, the seeds among them; weights and prompts
# follow from these. HYPOTHESIS_PROFILE=thorough tries three times as many examples and all cases of
# what is exhaustive by nature; hurried does not shrink a falsifying one, for tests/mutations.py.
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "kangaroo")
settings.register_profile("kangaroo", max_examples=33, deadline=None, print_blob=True)
settings.register_profile("thorough", parent=settings.get_profile("kangaroo"), max_examples=100)
settings.register_profile("hurried", parent=settings.get_profile("kangaroo"),
                          phases=[Phase.explicit, Phase.generate])
settings.load_profile(PROFILE)


thorough = pytest.mark.skipif(PROFILE != "thorough", reason="takes long: see docs/README.md")


def some(cases, step):
    """All cases in the thorough profile, every step-th in the others."""
    return list(cases)[::1 if PROFILE == "thorough" else step]


def examples(n):
    """For a slow property: n examples in the thorough profile, a third of them in the others."""
    return settings(max_examples=n if PROFILE == "thorough" else max(6, n // 3))


samplers = st.builds(
    Sampler,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 4]),
    top_p=st.sampled_from([0.5, 0.95, 1.0]),
    seed=st.integers(0, 99))


def random_weights(module, seed):
    """Matrices that keep the size of what passes through, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data.copy_(noise / p.shape[-1] ** 0.5 if p.dim() > 1 else 1 + 0.1 * noise)
    return module


def random_model(config=TINY, seed=0, dtype=torch.float32, device="cpu", packed_for=None):
    """A random Llama; `packed_for` is the width that its weights are packed for, with the norms
    that a loaded model has; None leaves all as llama.py defines it."""
    model = build(Llama, config, device, dtype)
    model.tie()
    random_weights(model, seed)
    return pack(use_fast_norms(model), packed_for) if packed_for else model


def random_adapter(model, seed=0):
    weight = model.norm.weight
    return random_weights(
        build(Adapter, replace(model.config, num_hidden_layers=1), weight.device, weight.dtype),
        seed)


class PerfectAdapter:
    """The remaining layers of the target: it drafts what the target says, or with `sign` −1 what
    the target likes least."""
    source = "perfect"

    def __init__(self, model, exit_layer, sign=1):
        self.model, self.exit_layer, self.sign, self.config = model, exit_layer, sign, model.config

    def __call__(self, x, positions, cache):
        return self.sign * self.model.norm(
            self.model.run_layers(x, positions, cache, self.exit_layer, len(self.model.layers)))


class NoisyAdapter(PerfectAdapter):
    """Right about half the time: drafts of every length get accepted in part."""

    def __call__(self, x, positions, cache):
        h = super().__call__(x, positions, cache)
        lucky = torch.tensor([hash((p, 7)) % 3 > 0 for p in positions.tolist()], device=h.device)
        return torch.where(lucky[:, None], h, -h)


def datastore(documents):
    tokens = join_documents(documents)
    return Datastore(tokens, suffix_order(tokens))


@contextmanager
def block(size):
    """KV-cache views that grow by `size` positions, so that short texts cross many edges."""
    before, KVCache.BLOCK = KVCache.BLOCK, dict.fromkeys(KVCache.BLOCK, size)
    try:
        yield
    finally:
        KVCache.BLOCK = before


DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8"}


def save(tensors):
    """The bytes of a safetensors file: header length, JSON header, data. (safetensors' own writer
    needs NumPy.)"""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape),
            "data_offsets": [end, end := end + t.nbytes]
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = (ctypes.string_at(t.data_ptr(), t.nbytes) for t in tensors.values())
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def save_file(tensors, path):
    path.write_bytes(save(tensors))


def config_json(config):
    """The config.json of a model of this shape."""
    data = {
        "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
        "eos_token_id": list(config.eos_token_ids)
    }
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
              "rms_norm_eps", "rope_theta", "tie_word_embeddings", "bos_token_id")
    return data | {name: getattr(config, name) for name in fields}


def hf_tensors(model):
    """The model's weights under Hugging Face's names, as save_file wants them."""
    return {(name if name == "lm_head.weight" else f"model.{name}"): weight.detach().clone().
            contiguous()
            for name, weight in named_weights(model).items()}


TEXT = [
    "Once upon a time a small kangaroo lived by the river.",
    "She liked to jump over stones, and the stones liked it too.",
    "One day she met an old turtle who had lost his hat.",
    "“Where did you see it last?” asked the kangaroo. Über den Fluß!"
]


def write_model(folder, config=TINY, seed=0, chat_template=None):
    """A model folder as Hugging Face lays it out, with a sentencepiece vocabulary (byte fallback)
    of its own.

    Returns the config that it was written with: TINY's shape, the vocabulary's size and special
    tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = 340  # 256 bytes, 3 special tokens, and some pieces
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20), model_prefix=str(folder / "tokenizer"), vocab_size=size,
        model_type="bpe", byte_fallback=True, character_coverage=0.98, hard_vocab_limit=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2)
    (folder / "tokenizer.vocab").unlink()
    config = replace(config, vocab_size=size, bos_token_id=1, eos_token_ids=(2,))
    save_file(hf_tensors(random_model(config, seed)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json(config)))
    if chat_template:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat_template}))
    return config


def write_adapter(folder, config, exit_layer=1, seed=0):
    """An adapter folder that fits a target of this shape."""
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, num_hidden_layers=1)
    adapter = random_weights(build(Adapter, config, "cpu", torch.float32), seed)
    weights = {name: w.detach().clone().contiguous() for name, w in named_weights(adapter).items()}
    save_file(weights, folder / "adapter.safetensors")
    (folder / "config.json").write_text(
        json.dumps(config_json(config) | {"exit_layer": exit_layer}))
