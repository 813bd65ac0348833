"""A drafter of one's own, in one file: what it takes to have it in Python, on the command line, in
bench/ and on the replay page.

The file is TOY. It has an Entry in drafters/table.py, and nothing else is changed.
"""
import importlib
import json
import re

import kangaroo
from bench import choose
from drafters.table import DRAFTERS, Entry, Part
from llama import Sampler
from support import replay, start
from support.decoder import load
from support.errors import UserError
from support.program import run_program

import pytest
from helpers import config_json, write_adapter, write_model

PROMPT = "Once upon a time"
HERE = dict(device="cpu", dtype="float32")
TOY = '''
"""Proposes, token after token, the one that followed most often in other texts."""
import json
from pathlib import Path

from drafters.method import Method
from kangaroo import Draft, NoDrafter
from support.errors import require


class Counts(dict):
    """{token: (the token that follows it most often, how often)}"""


class ToyDrafter(Method, NoDrafter):
    grid = [{"width": width, "steps": width - 1, "least": least}
            for width in (2, 4) for least in (1, 2)]

    def __init__(self, model, counts, least=1):
        super().__init__(model)
        self.counts, self.least = counts, least

    @classmethod
    def usual(cls, decoder):
        return {"steps": 5, "least": 1}

    @classmethod
    def make(cls, decoder, settings):
        return cls(decoder.model, decoder.counts, settings.least)

    @classmethod
    def load(cls, path, decoder):
        require(Path(path).is_file(), f"{path}: no such file, --counts wants one")
        counts = Counts((int(token), found) for token, found in
                        json.loads(Path(path).read_text()).items())
        counts.source = str(path)
        return counts

    @classmethod
    def describe(cls, decoder, settings):
        return f"toy with {Path(decoder.counts.source).name}, least {settings.least}"

    def draft(self, ids, n_max, cache):
        tokens = [ids[-1]]
        while len(tokens) <= n_max and self.counts.get(tokens[-1], (0, 0))[1] >= self.least:
            tokens.append(self.counts[tokens[-1]][0])
        return Draft(tokens[1:])
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder without an end-of-sequence token; the file counts.json, of what the model says
    at T 5, lies elsewhere."""
    folder = tmp_path_factory.mktemp("own")
    config = write_model(folder / "model")
    write_adapter(folder / "model" / "adapter", config)
    (folder / "model" / "config.json").write_text(
        json.dumps(config_json(config) | {"eos_token_id": []}))
    ids = load(folder / "model", **HERE).generate(PROMPT, "none", 60)[1]["ids"]
    counts = {}
    for token, later in zip(ids, ids[1:]):
        counts[token] = later, 1 + counts.get(token, (0, 0))[1]
    (folder / "counts.json").write_text(json.dumps(counts))
    (folder / "prompts.txt").write_text(f"{PROMPT}\nOne day she met\n")
    return folder


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The class, which is to be had by its name."""
    (tmp_path / "toy_drafter.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.sys.modules, "toy_drafter", raising=False)
    cls = importlib.import_module("toy_drafter").ToyDrafter
    part = Part("counts", "counts", "--counts", "FILE", "which token follows which", "counts.json")
    monkeypatch.setitem(DRAFTERS, "toy", Entry("toy_drafter.ToyDrafter", ("steps", "least"), part))
    return cls


@pytest.fixture
def cli(folder, capfd):
    """Run the program; returns (exit status, stdout, stderr)."""
    def run(*args):
        words = ["--model", folder / "model", "--device", "cpu", "--dtype", "float32", "--prompt",
                 PROMPT, "--max-new-tokens", 40, "--drafter", "toy", *args]
        return start.main([str(word) for word in words]), *capfd.readouterr()
    return run


def test_in_python(toy, folder):
    """By its name and as an instance, with its setting, and with a text that is vanilla's."""
    found = load(folder / "model", **HERE, drafter="toy", counts=folder / "counts.json")
    assert found.counts.source == str(folder / "counts.json")
    for sampler in (None, Sampler(1.0, seed=3)):
        vanilla = found.generate(PROMPT, "none", 40, sampler)[0]
        text, statistics = found.generate(PROMPT, "toy", 40, sampler)
        assert text == vanilla and max(statistics["drafted"]) == 5 and "trees" not in statistics
        own = toy(found.model, found.counts)
        text, own = found.generate(PROMPT, own, 40, sampler, steps=5)
        assert text == vanilla
        assert {**own, "seconds": 0} == {**statistics, "seconds": 0}
        assert sampler or any(own["accepted"])
    assert not any(found.generate(PROMPT, "toy", 40, least=99)[1]["drafted"])
    assert vars(found.settings("toy", least=2)) == {"steps": 5, "least": 2}
    assert found.describe("toy").endswith("drafter toy with counts.json, least 1 · width 6")
    with pytest.raises(TypeError, match="'most'.*toy has steps, least"):
        found.generate(PROMPT, "toy", most=1)
    with pytest.raises(UserError, match="^--steps 8: must be from 0 to 5"):
        found.generate(PROMPT, "toy", steps=8)


def test_its_part_in_the_models_folder(toy, folder):
    """Where its Part says; False leaves it out; it is asked for by its own flag."""
    assert load(folder / "model", **HERE).counts is None
    where = folder / "model" / "counts.json"
    where.write_text("{}")
    try:
        assert load(folder / "model", **HERE).counts.source == str(where)
        without = load(folder / "model", **HERE, counts=False)
    finally:
        where.unlink()
    assert without.counts is None
    with pytest.raises(UserError, match="^no counts for .*: give --counts FILE$"):
        without.generate(PROMPT, "toy")


def test_on_the_command_line(toy, folder, cli):
    """--drafter, its own flag, --compare, --json."""
    status, out, err = cli("--counts", folder / "counts.json", "--compare", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["identical"] and len(result["ids"]) == 40 and sum(result["accepted"])
    assert "drafter toy with counts.json, least 1 · width 6" in err
    status, out, err = cli("--counts", folder / "counts.json", "--steps", 2, "--json")
    assert status == 0 and max(json.loads(out)["drafted"]) == 2
    assert json.loads(out)["ids"] == result["ids"]


def test_its_flags_in_the_help(toy, cli, capfd):
    """A name among the drafters, and its flag with what it is for."""
    with pytest.raises(SystemExit):
        cli("--help")
    out = " ".join(capfd.readouterr().out.split())
    assert "kangaroo, medusa, lookahead, lookup, sps, rest, none, toy (default: kangaroo)" in out
    assert "--counts FILE which token follows which (default: the model's)" in out


@pytest.mark.parametrize("args, words", [
    ([], ["no counts for", "give --counts FILE"]),
    (["--counts", "absent"], ["absent: no such file", "--counts"]),
    (["--drafter", "lookup", "--counts", "x"], ["--counts x", "is for --drafter toy"]),
    (["--counts", "x", "--threshold", 0], ["--threshold", "--drafter toy", "steps, least"]),
    (["--tree", "--counts", "x"], ["--tree", "toy"]),
    (["--counts", "x", "--nodes", 3], ["--nodes"])])
def test_what_does_not_fit_on_the_command_line(toy, folder, cli, monkeypatch, args, words):
    """One line that names the flag, as for the drafters that come along."""
    monkeypatch.chdir(folder)
    (folder / "x").write_text("{}")
    status, out, err = cli(*args)
    assert (status, out) == (2, "") and re.fullmatch(r"kangaroo\.py: [^\n]+\n", err), err
    assert all(word in err for word in words), err


def test_without_its_place_in_drafters(folder, cli):
    """What the other tests rest on: it is not known by itself."""
    status, _, err = cli()
    assert status == 2 and "--drafter toy: no such drafter" in err


def test_on_the_replay_page(toy, folder, cli, tmp_path):
    """A trace of its own, beside that of another drafter."""
    page, counts = tmp_path / "page.html", ("--counts", folder / "counts.json")
    for args in (counts, ("--drafter", "none")):
        status, _, err = cli("--trace", page, *args)
        assert status == 0, err
    traces = {trace["drafter"]: trace for trace in replay.read_page(page)}
    assert traces.keys() == {"toy", "none"}
    assert traces["toy"]["text"] == traces["none"]["text"]
    assert "toy with counts.json" in traces["toy"]["settings"]
    assert any(r["accepted"] for r in traces["toy"]["rounds"])


def test_in_choose(toy, folder, tmp_path, capsys):
    """bench/choose.py tries its grid and writes the best, as for the drafters that come along."""
    words = ["--model", folder / "model", "--prompts", folder / "prompts.txt", "--skip", 0,
             "--methods", "toy,lookup", "--counts", folder / "counts.json", "--new-tokens", 12,
             "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "best.json"]
    assert run_program("choose.py", lambda: choose.main([str(word) for word in words])) == 0, (
        capsys.readouterr().err)
    out = capsys.readouterr().out
    for least in (1, 2):
        assert len(re.findall(f"toy +.*toy with counts.json, least {least}, width [24]", out)) == 2
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["toy"] in toy.grid and best["lookup"]["width"] in (2, 4, 8)
    at = words.index("--counts")
    del words[at:at + 2]
    assert run_program("choose.py", lambda: choose.main([str(word) for word in words])) == 0
    assert "toy: no counts for" in capsys.readouterr().out


def test_a_drafter_needs_four_names(folder):
    """Without Method and NoDrafter: `depth`, `prefill`, `draft`, `observe`, as NoDrafter has it."""
    found = load(folder / "model", **HERE)

    class Bare:
        depth = 0

        def prefill(self, ids, cache, sampler):
            return found.model.embed(ids)

        def draft(self, ids, n_max, cache):
            return kangaroo.Draft(ids[1:][:n_max], confidence=[0.5] * len(ids[1:][:n_max]))

        def observe(self, hidden, choices, path):
            pass

    text, statistics = found.generate(PROMPT, Bare(), 20)
    assert text == found.generate(PROMPT, "none", 20)[0] and any(statistics["drafted"])
