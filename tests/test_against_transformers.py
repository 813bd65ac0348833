"""Logits against the published implementation, where it is installed (pip install transformers)."""
import json
from dataclasses import replace

from support.checkpoint import load_llama

import pytest
import torch
from helpers import TINY, config_json, hf_tensors, random_model, save_file

transformers = pytest.importorskip("transformers",
                                   reason="the package transformers is not installed")

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "changes, rope_scaling", [
        ({}, None),
        ({"tie_word_embeddings": True}, None),
        ({"num_key_value_heads": 4}, None),
        ({"head_dim": 16}, None),
        ({"num_key_value_heads": 1, "rope_theta": 5e5}, LLAMA3),
        ({}, {"type": "linear", "factor": 4.0}),
    ], ids=["GQA", "tied", "multi-head", "wide heads", "llama3 rope", "linear rope"])
def test_logits_are_those_of_transformers(tmp_path, changes, rope_scaling):
    """Our own oracle shares our layers; this one shares nothing: the halves of RoPE, the order of
    norms, GQA's grouping."""
    config = replace(TINY, **changes)
    save_file(hf_tensors(random_model(config, 3)), tmp_path / "model.safetensors")
    data = config_json(config) | {
        "architectures": ["LlamaForCausalLM"], "rope_scaling": rope_scaling, "eos_token_id": 2
    }
    (tmp_path / "config.json").write_text(json.dumps(data))
    ids = torch.randint(config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(load_llama(tmp_path)(ids), theirs(ids).logits, atol=1e-4)


def test_a_window_is_exact_up_to_its_end(tmp_path):
    """Guards against a context that ends one token late, where transformers' window drops a key, or
    early. Their default for a Mistral that names no window counts too."""
    config = replace(TINY, num_hidden_layers=2, max_position_embeddings=5000)
    save_file(hf_tensors(random_model(config, 3)), tmp_path / "model.safetensors")
    data = config_json(config) | {"model_type": "mistral", "eos_token_id": 2}
    for window, n in (({"sliding_window": 8}, 8), ({}, 4096)):
        (tmp_path / "config.json").write_text(json.dumps(data | window))
        ours = load_llama(tmp_path)
        assert ours.config.max_position_embeddings == ours.config.sliding_window == n
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        ids = torch.randint(40, (1, n + 1), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            difference = (ours(ids) - theirs.eval()(ids).logits).abs().amax(-1)[0]
        assert difference[:n].max() < 1e-4 < 1e-3 < difference[n]
