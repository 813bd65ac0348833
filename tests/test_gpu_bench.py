"""bench/gpu.py does on the CPU, with tiny shapes, what it does on a GPU; its figures mean nothing
here."""
import json
import re

import pytest
import torch
from helpers import one_thread, write_adapter, write_model  # noqa: F401

from bench import gpu
from kangaroo import NoDrafter, generate
from llama import Llama, UserError


def test_it_runs_with_tiny_shapes(tmp_path, monkeypatch, capsys):
    """All sections: a shape, the shipped model (a tiny one here), questions by dtype; and all
    tokens are vanilla's."""
    config = write_model(tmp_path / "model")
    write_adapter(tmp_path / "model" / "adapter", config)
    questions = [json.dumps({"category": "qa", "turns": [f"Who is number {i}?"]}) for i in range(9)]
    (tmp_path / "questions.jsonl").write_text("\n".join(questions))
    monkeypatch.setattr(gpu, "DEFAULT_MODEL", tmp_path / "model")
    assert gpu.main([
        "--tiny", "--model",
        str(tmp_path / "model"), "--questions",
        str(tmp_path / "questions.jsonl"), "--answers", "3", "--new-tokens", "9"
    ]) == 0
    out = capsys.readouterr().out
    assert len(re.findall("tokens identical to vanilla's: True", out)) == 6  # 3 models, 2 contexts
    assert len(re.findall("3 of 3 answers identical", out)) == 6  # 3 dtypes, greedy and sampled
    assert len(re.findall("reached|missed", out)) == 4 + 1


@pytest.mark.parametrize("rate", gpu.RATES)
def test_acceptance_is_as_asked_for(rate):
    """The drafter that knows the text reaches the compression rate that it is told, with and
    without stopping early."""
    assert sum(gpu.acceptance(rate, 6) ** w for w in range(7)) == pytest.approx(rate)
    config, exit_layer = gpu.TINY_SHAPES["tiny"]
    args = type("Arguments", (), {"repeats": 1})
    model = gpu.random_llama(Llama, config, torch.device("cpu"), torch.float32)
    adapter = gpu.random_llama(gpu.Adapter, gpu.replace(config, num_hidden_layers=1),
                               torch.device("cpu"), torch.float32)
    bench = gpu.Bench(model, adapter, exit_layer, args)
    text = [5] + [t for r in generate(model, NoDrafter(model), [5], 400) for t in r.tokens]
    for stops in (True, False):
        drafter = bench.drafter(gpu.ControlledDrafter, graphs=False).control(text, rate, stops, 6)
        _, tokens, found = bench.decode(drafter, [5], 400)
        assert tokens == text[1:] and found == pytest.approx(
            rate, rel=0.06)  # the edges of views cut some drafts


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--tiny"):
        gpu.main([])
