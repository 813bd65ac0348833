"""Kangaroo's adapters: one besides the paper's, a head of fewer tokens, new ones, their folders.

    folder with config.json and weights -> load_adapter -> an adapter for this target

Nothing of the algorithm; an adapter's forward pass is in kangaroo.py.
"""
import math
import os
from dataclasses import replace
from pathlib import Path

from kangaroo import Adapter
from llama import MLP, Linear, RMSNorm, Rows
from support.checkpoint import (
    build,
    file_entries,
    fingerprint_of,
    first_of,
    is_constant,
    load_weights,
    named_weights,
    read_config,
    refuse_lora,
    refuse_misfit,
    vocabulary_ids,
)
from support.errors import UserError, require
from support.files import read_json, require_folder
from support.packing import use_fast_norms

import torch
import torch.nn as nn


class LayerAdapter(Adapter):
    """An adapter with an MLP behind its attention: one full layer of a Llama, then the norm."""

    def __init__(self, config):
        super().__init__(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, positions, cache=None):
        rows = Rows.at(self.config, positions, x, cache)
        x = x + self.self_attn(self.input_layernorm(x), rows, cache)
        return self.norm(x + self.mlp(self.post_attention_layernorm(x)))


# By the name in an adapter's config.json. The first is the paper's.
ADAPTERS = {"attention": Adapter, "layer": LayerAdapter}


class PartialHead(nn.Module):
    """The rows of an LM head for the N token ids `vocabulary`: a cheaper draft step.

    Gives (…, hidden_size) -> logits (…, vocab_size), −inf for all other tokens.
    """

    def __init__(self, lm_head, vocabulary):
        super().__init__()
        weight = lm_head.weight
        self.vocabulary, self.vocab_size = vocabulary, len(weight)
        self.rows = Linear(weight.shape[1], rows=len(vocabulary))
        self.rows.weight = nn.Parameter(weight[vocabulary], requires_grad=False)

    def forward(self, x):
        logits = self.rows(x)
        every = logits.new_full((*x.shape[:-1], self.vocab_size), -math.inf)
        return every.index_copy_(-1, self.vocabulary, logits)


UNSURE = 0.3  # of the target's final norm: what a new adapter begins with


def new_adapter(cls, model, norm=None):
    """An adapter in float32 that begins as the target's final norm alone, times `norm` (UNSURE).

    Its residual branches start at zero. What it then says of the exit state is wrong, and with the
    target's own norm it says that with a trained model's certainty, which may have to be unlearned
    first (docs/lab.md has the trial).
    """
    adapter = cls(replace(model.config, num_hidden_layers=1))
    for name, weight in named_weights(adapter).items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.zero_()
        elif weight.dim() > 1:
            weight.data.normal_(std=weight.shape[1] ** -0.5)
    adapter.norm.weight.data.copy_((UNSURE if norm is None else norm) * model.norm.weight)
    return use_fast_norms(adapter.to(model.norm.weight.device))


# --------------------------------------------------------------------------------------------------
# Folders

MODELS = Path(__file__).parents[1] / "models"
ADAPTER_FILES = "adapter.safetensors", "pytorch_model.bin"
# What an adapter's config.json may choose: for a chain, and under the key `tree` for a tree.
SETTINGS = {"steps": int, "threshold": (int, float), "top_candidates": int, "nodes": int,
            "width": int}


def load_adapter(folder, model, exit_layer=None):
    """An adapter for this target, not packed yet.

    Beside its weights it has `exit_layer`; `head`, a PartialHead, or None for the target's LM head;
    `facts`, its config.json as a dict; and `source`, where it comes from.

    Reads config.json with adapter.safetensors, or with pytorch_model.bin as the published Kangaroo
    adapters have it. `exit_layer` overrides the config's. The name "random" gives an untrained
    adapter, to test with. UserError if it does not fit the model.
    """
    if str(folder) == "random":
        layers = model.config.num_hidden_layers
        facts = {"exit_layer": min(2, layers - 1)}
        return describe(random_adapter(model), "random", facts,
                        exit_layer_of("random", facts, exit_layer, layers))
    folder = Path(folder)
    require_folder(folder, "--adapter", "one with config.json and adapter.safetensors or "
                   "pytorch_model.bin")
    refuse_lora(folder)
    where = folder / "config.json"
    data = read_json(where)
    require("medusa_num_heads" not in data, f"{where}: holds Medusa heads, for --drafter medusa")
    config = read_config(folder)
    refuse_misfit(folder, config, data, model)
    exit_layer = exit_layer_of(where, data, exit_layer, model.config.num_hidden_layers)
    refuse_bad_settings(where, data)
    architecture = data.get("architecture", "attention")
    require(architecture in list(ADAPTERS),  # a list, for JSON may hold what has no hash
            f"{where}: architecture = {architecture!r}, choose from {', '.join(ADAPTERS)}")
    weight = model.norm.weight
    adapter = build(ADAPTERS[architecture], config, weight.device, weight.dtype)
    entries = adapter_entries(folder)
    vocabulary = entries.pop("vocabulary", None)
    load_weights(adapter, entries, folder)
    head = vocabulary and PartialHead(
        model.lm_head, vocabulary_ids(folder, vocabulary[1](), model))
    return describe(use_fast_norms(adapter), str(folder), data, exit_layer, head)


def trained_for(folder):
    """The path of an adapter in models/ that was trained for the model in a folder, or None."""
    try:
        size, found = read_config(folder).hidden_size, None
        for path in sorted(MODELS.glob("**/config.json")):
            data = read_json(path)
            if "target" in data and "exit_layer" in data and data["hidden_size"] == size:
                found = found or fingerprint_of(folder)
                if data["target"] == found:
                    return os.path.relpath(path.parent)
    except UserError:  # of a model that does not load
        pass
    return None


def describe(adapter, source, facts, exit_layer, head=None):
    """The adapter, with what is to be known of it."""
    adapter.source, adapter.facts, adapter.exit_layer, adapter.head = (
        source, facts, exit_layer, head)
    return adapter.eval()


def random_adapter(model):
    """An untrained adapter: norms are ones, matrices keep the size of what passes through."""
    config, weight = replace(model.config, num_hidden_layers=1), model.norm.weight
    adapter = build(ADAPTERS["attention"], config, weight.device, weight.dtype)
    generator = torch.Generator().manual_seed(0)
    for p in adapter.parameters():
        noise = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
        p.copy_(noise if p.dim() > 1 else torch.ones_like(p))
    return use_fast_norms(adapter)


def exit_layer_of(where, data, wanted, n_layers):
    """The layers that draft: `wanted`, else what the adapter's config.json says."""
    exit_layer = data.get("exit_layer") if wanted is None else wanted
    require(exit_layer is not None, f"{where}: names no exit_layer, give --exit-layer (the paper: "
            "2 for 7B, 3 for 13B)")
    require(isinstance(exit_layer, int) and 0 <= exit_layer < n_layers,
            f"exit layer {exit_layer!r}: must be at least 0 and below the model's {n_layers} "
            "layers")
    return exit_layer


def refuse_bad_settings(where, data):
    """UserError unless γ, η and so on are numbers, for the chain and for the tree."""
    tree = data.get("tree", {})
    require(isinstance(tree, dict),
            f"{where}: tree = {tree!r} is no object with the settings of --tree")
    for settings in (data, tree):
        for name, kind in SETTINGS.items():
            require(isinstance(settings.get(name, 0), kind), f"{where}: {name} = "
                    f"{settings.get(name)!r} is not a number that --{name.replace('_', '-')} would "
                    "take")


def adapter_entries(folder):
    """{name: (shape, function that reads the tensor)} of an adapter's folder, named as in it."""
    path = first_of(folder, ADAPTER_FILES) or folder / ADAPTER_FILES[0]
    return {name.removeprefix("layers.0."): entry for name, entry in file_entries(path, {}).items()
            if not is_constant(name)}
