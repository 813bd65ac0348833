"""docs/kangaroo.ipynb: runs without Jupyter, and puts out again what was committed.

The cells that take longest are run in the thorough profile only; no other needs them.
"""
import copy
import json
import subprocess
import sys

from docs.run_notebook import NOTEBOOK, execute, run
from llama import Sampler, generate_naive

import pytest
from helpers import PROFILE

ROOT = NOTEBOOK.parents[1]
COMMITTED = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CELLS = {cell["id"]: cell for cell in COMMITTED["cells"]}
CODE = {name: cell for name, cell in CELLS.items() if cell["cell_type"] == "code"}
LONG = () if PROFILE == "thorough" else ("bits", "part", "sample", "eta")
SILENT = "setup", "picture"  # they prepare, and put out nothing


def test_it_runs_and_says_what_was_committed(monkeypatch):
    """The cells in order, without Jupyter: the text and pictures that are stored.

    Which bits change in another shape, and so where texts part, is the processor's affair: the
    cells that show it are tagged `varies`, and what must hold in them is asserted here. All other
    choices have margins far above what rounding changes from one processor to another.
    """
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    notebook = copy.deepcopy(COMMITTED)
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["id"] not in LONG]
    space = run(notebook)
    ids, model, tokens = space["prompt"], space["model"], space["tokens"]
    assert space["reference"] == ids + generate_naive(model, ids, 60, Sampler())
    assert tokens(space["rounds"]) == tokens(space["vanilla"])
    assert len(space["rounds"]) < len(space["vanilla"]) / 4
    if not LONG:
        (text, alone), (other, together) = space["decode_twice"](space["eight"])
        assert text == other and all(alone[p].equal(together[p]) for p in alone)
    for cell in notebook["cells"]:
        if "varies" not in cell["metadata"].get("tags", ()):
            assert cell.get("outputs") == CELLS[cell["id"]].get("outputs"), (
                f"{cell['id']}: if this is right, store it with python docs/run_notebook.py")


def test_it_is_a_notebook():
    """The fields of nbformat 4.5; code cells that were run, in order, and are small."""
    assert (COMMITTED["nbformat"], COMMITTED["nbformat_minor"]) == (4, 5)
    assert COMMITTED["metadata"]["kernelspec"]["name"] == "python3"
    assert len(CELLS) == len(COMMITTED["cells"])  # every id once
    for cell in CELLS.values():
        fields = {"cell_type", "id", "metadata", "source"}
        more = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == fields | more
        assert all(len(line) <= 100 + line.endswith("\n") for line in cell["source"]), cell["id"]
    assert [cell["execution_count"] for cell in CODE.values()] == list(range(1, len(CODE) + 1))
    for name, cell in CODE.items():
        assert len(cell["source"]) <= 60 and bool(cell["outputs"]) == (name not in SILENT), name
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not any(place in text for place in (str(ROOT), "/home/", "/root/", "/tmp/", "/Users/"))


def test_every_step_teaches():
    """After each cell one thing to look at, and one exercise with a folded answer."""
    for name in CODE.keys() - {*SILENT}:
        text = "".join(CELLS[f"{name}-after"]["source"])
        for part in ("**Look**", "**Exercise.**", "<details><summary>Answer</summary>\n\n",
                     "\n\n</details>"):
            assert text.count(part) == 1, f"{name}: {part}"


def test_outside_a_checkout_it_fetches_one(tmp_path, monkeypatch):
    """The first cell, as in Colab: it clones and installs; without an address it says so."""
    source, calls = "".join(CODE["setup"]["source"]), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    with pytest.raises(AssertionError, match="REPOSITORY"):
        execute(source.replace(source.splitlines()[0], 'REPOSITORY = ""'), {}, "setup")
    execute(source.replace(source.splitlines()[0], 'REPOSITORY = "address"'), {}, "setup")
    (clone, install), folder = calls, str(tmp_path / "kangaroo")
    assert clone[:2] == ["git", "clone"] and clone[-2:] == ["address", folder]
    assert "sentencepiece" in install and sys.path[0] == folder
