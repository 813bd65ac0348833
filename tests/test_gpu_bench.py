"""bench/gpu.py does on the CPU, with tiny shapes, what it does on a GPU.

Its figures mean nothing here.
"""
import json
import re

import pytest
import torch
from helpers import write_adapter, write_model

from bench import gpu
from kangaroo import NoDrafter, generate
from llama import UserError


def test_it_runs_with_tiny_shapes(tmp_path, monkeypatch, capsys):
    """All sections: a shape, the shipped model (a tiny one here), questions by dtype.

    And all tokens are vanilla's.
    """
    model, questions = tmp_path / "model", tmp_path / "questions.jsonl"
    write_adapter(model / "adapter", write_model(model))
    asked = [{"category": "qa", "turns": [f"Who is number {i}?"]} for i in range(9)]
    questions.write_text("\n".join(map(json.dumps, asked)))
    monkeypatch.setattr(gpu, "DEFAULT_MODEL", model)
    assert gpu.main(["--tiny", "--model", str(model), "--questions", str(questions), "--answers",
                     "3", "--new-tokens", "9"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall("tokens identical to vanilla's: True", out)) == 6  # 3 models, 2 contexts
    assert len(re.findall("3 of 3 answers identical", out)) == 6  # 3 dtypes, greedy and sampled
    assert len(re.findall("reached|missed", out)) == 4 + 1


@pytest.fixture(scope="module")
def bench():
    return gpu.Bench(gpu.random_decoder("tiny", *gpu.TINY_SHAPES["tiny"], torch.device("cpu"),
                                        torch.float32), repeats=1)


@pytest.fixture(scope="module")
def text(bench):
    """A prompt of one token, and what vanilla decoding makes of it."""
    model = bench.plain.model
    return [5] + [t for r in generate(model, NoDrafter(model), [5], 400) for t in r.tokens]


@pytest.mark.parametrize("rate", gpu.RATES)
def test_acceptance_is_as_asked_for(bench, text, rate):
    """The drafter that knows the text reaches the compression rate that it is told.

    With and without stopping early.
    """
    assert sum(gpu.acceptance(rate, 6) ** w for w in range(7)) == pytest.approx(rate)
    for stops in (True, False):
        drafter = bench.controlled(text, rate, stops, 6, graphs=False)
        _, tokens, found = bench.decode(drafter, [5], 400)
        assert tokens == text[1:]
        assert found == pytest.approx(rate, rel=0.06)  # the edges of views cut some drafts


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--tiny"):
        gpu.main([])
