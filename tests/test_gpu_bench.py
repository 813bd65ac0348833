"""bench/gpu.py does on the CPU, with toy sizes, what it does on a GPU.

Its figures mean nothing here.
"""
import json
import shutil
import subprocess
from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace

import train_adapter
from bench import gpu, kernels
from kangaroo import NoDrafter, generate
from support.errors import UserError

import pytest
import torch
from helpers import PROFILE, TEXT, some, write_adapter, write_model


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A tiny model, adapter, questions and text, a page and a results file."""
    folder = tmp_path_factory.mktemp("gpu")
    write_adapter(folder / "model" / "adapter", write_model(folder / "model"))
    asked = [{"category": "qa", "turns": [f"Who is number {i}?"]} for i in range(3)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (folder / "text.txt").write_text("\n\n".join(TEXT * 20), encoding="utf-8")
    shutil.copy(gpu.PAGE, folder / "page.md")
    return {"--model": folder / "model", "--questions": folder / "questions.jsonl",
            "--data": folder / "text.txt", "--page": folder / "page.md",
            "--trained": folder / "trained", "--out": folder / "gpu.json", "--answers": 2,
            "--new-tokens": 7, "--device": "cpu"}


def run(flags, *more):
    words = [str(word) for pair in flags.items() for word in pair]
    return gpu.main(["--tiny", *words, *more])


class TrainedHere:
    """Stands in for the process that trains."""

    def __init__(self, command):
        self.status = train_adapter.main(command[2:])

    def wait(self, seconds):
        return self.status


# Without "tests", which starts a pytest: that one is the next test.
QUICK = "shape-7B", "choices-135M", "equal-float32", "model", "train", "answers"


def test_all_parts_one_after_another(flags, monkeypatch, capsys):
    """Each part is done once; one that was broken off is done by the next run, which has the rest
    already; then the page has figures where it said "not run"."""
    done, broken, context = [], "shape-7B", gpu.Bench.context
    chosen = [*gpu.PARTS] if PROFILE == "thorough" else QUICK
    if chosen is QUICK:
        monkeypatch.setattr(gpu, "PARTS", {name: gpu.PARTS[name] for name in QUICK})
        monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(
            Popen=TrainedHere, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(gpu, "DEFAULT_MODEL", flags["--model"])

    def here(part, argv, minutes):
        done.append(part)
        assert "--everything" in argv and minutes == gpu.MINUTES
        breaks = part == broken and done.count(part) == 1
        with monkeypatch.context() as patched:
            if breaks:
                patched.setattr(gpu.Bench, "context", half)
            with pytest.raises(TimeoutError) if breaks else nullcontext():
                run(flags, "--parts", part)

    def half(self, row, *more):
        """Of the second length of the context a row without speedups."""
        yield from context(self, row, *more) if row["context"] == 16 else islice(
            context(self, row, *more), 1)
        if row["context"] > 16:
            raise TimeoutError

    monkeypatch.setattr(gpu, "measure_apart", here)
    assert run(flags, "--everything") == 1 and done == [*chosen]
    held = json.loads(flags["--out"].read_text())["parts"]
    cut = held.pop(broken)
    assert set(held) == set(chosen) - {broken} and cut["partial"]
    first, second = (row.keys() for row in cut["contexts"])
    assert second == first - {"draft", "cost", "verification", "speedups", "identical"}
    assert "| 7B | 40 |" in flags["--page"].read_text(encoding="utf-8")
    run(flags, "--everything")
    assert done == [*chosen, broken]
    parts = json.loads(flags["--out"].read_text())["parts"]
    assert {name: parts[name] for name in held} == held  # untouched
    assert parts[broken]["contexts"][0] == cut["contexts"][0] and not any(
        "partial" in part for part in parts.values())
    assert all(c["identical"] for part in parts.values() for c in part.get("contexts", []))
    for part in (name for name in chosen if name.startswith(("equal", "answers"))):
        for found in parts[part]["asked"].values():
            assert found["identical"] == found["answers"] == 2
            assert found["identical_without_graphs"] == found["without_graphs"] == 1
    assert parts["train"]["updates"] == 2
    page = flags["--page"].read_text(encoding="utf-8")
    assert "| 7B | 16 |" in page and "| float32, tree, sampled | 2 of 2 | 1 of 1 |" in page
    assert " more goals (" in page and ("24 of 24, reached" in page) == (chosen is not QUICK)
    assert len(parts["choices-135M"]["choices"]) == len(gpu.CHOICES)
    assert page.startswith(gpu.PAGE.read_text(encoding="utf-8").split(gpu.BEGIN)[0])


def test_a_part_in_a_process_of_its_own(tmp_path):
    gpu.measure_apart("tests", [
        "--tiny", "--everything", "--device", "cpu", "--out", str(tmp_path / "gpu.json")], 9)
    tests = json.loads((tmp_path / "gpu.json").read_text())["parts"]["tests"]
    assert tests["passed"] == 1 and tests["exit_status"] == 0


def test_kernels(tmp_path, capsys):
    """All are measured, but for one that a CPU does not have, and a layer's are listed."""
    assert kernels.main(["--tiny", "--device", "cpu", "--out", str(tmp_path / "k.json")]) is None
    found = json.loads((tmp_path / "k.json").read_text())
    missing = [line for line in capsys.readouterr().out.splitlines() if "Error: " in line]
    assert all("flash" in line for line in missing) and len(found["rows"]) == 91
    assert all(row["us"] > 0 for row in found["rows"]) and len(found["layer of GQA"]) > 10


def test_the_page_is_of_the_results_file():
    """The committed page has the tables of docs/results/gpu.json, or says that nothing was run."""
    path = gpu.PAGE.parent / "results" / "gpu.json"
    results = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    text = gpu.PAGE.read_text(encoding="utf-8")
    assert text.split(gpu.BEGIN)[1].split(gpu.END)[0] == gpu.page_of(results)


@pytest.fixture(scope="module")
def bench():
    return gpu.Bench(gpu.random_decoder("tiny", *gpu.TINY_SHAPE, torch.device("cpu"),
                                        torch.float32), repeats=1)


@pytest.fixture(scope="module")
def text(bench):
    """A prompt of one token, and what vanilla decoding makes of it."""
    model = bench.plain.model
    return [5] + [t for r in generate(model, NoDrafter(model), [5], 400) for t in r.tokens]


@pytest.mark.parametrize("rate", some(gpu.RATES, 3))
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


@pytest.mark.parametrize("more, message", [
    (["--everything", "--out", "gpu.json"], "--tiny"), (["--tiny"], "--everything"),
    (["--tiny", "--everything"], "--out"),
    (["--tiny", "--parts", "train", "--out", "gpu.json"], "--model"),
    (["--tiny", "--parts", "equal-float16", "--model", "m", "--out", "gpu.json"], "--questions")])
def test_what_is_missing_is_said(monkeypatch, more, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        gpu.main(more)
