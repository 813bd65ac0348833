"""Training as its tests do it: a tiny model folder, texts, command lines, and runs to go on from.

conftest.py makes the fixtures known to all tests.
"""
import json
import random
import re
import shutil
import signal
from pathlib import Path

import train_adapter

import pytest
import torch
from helpers import TEXT, save_file, write_model
from safetensors.torch import load_file

SCRIPT = Path(train_adapter.__file__).resolve()


def sentences(seed, n):
    return " ".join(random.Random(seed).choices(TEXT, k=n))


def share_gpt(i):
    turns = [("human", f"{i} {sentences(i, 1)}"), ("gpt", sentences(i, 2)),
             ("human", sentences(-i, 1)), ("gpt", sentences(i, 3))]
    return {"id": str(i), "conversations": [{"from": role, "value": text} for role, text in turns]}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model, and 40 documents as ShareGPT and as plain text."""
    folder = tmp_path_factory.mktemp("train")
    write_model(folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    weights["lm_head.weight"] *= 4  # so that it is sure of something, which can be learned
    save_file(weights, folder / "model" / "model.safetensors")
    (folder / "chats.json").write_text(json.dumps([share_gpt(i) for i in range(40)]))
    (folder / "plain.txt").write_text("\n\n".join(f"{i} {sentences(i, 3)}" for i in range(40)))
    return folder


def words(folder, out, *args, data="chats.json"):
    """The words of a command line; later ones win, so `args` may name the defaults again."""
    common = [
        "--model", folder / "model", "--data", folder / data, "--out", out, "--exit-layer", 1,
        "--device", "cpu", "--dtype", "float32", "--chat", "zephyr", "--max-length", 150,
        "--batch-tokens", 600, "--batches", 2, "--window", 20, "--updates", 4, "--warmup", 2,
        "--lr", 0.01, "--eval-prompts", 1, "--eval-documents", 4
    ]
    return [str(word) for word in [*common, *args]]


@pytest.fixture
def train(folder, tmp_path, capfd):
    """Train in this process; returns (exit status, stderr)."""
    def run(*args, out="out", **kwargs):
        status = train_adapter.main(words(folder, tmp_path / out, *args, **kwargs))
        out, err = capfd.readouterr()
        assert out == ""
        return status, err
    return run


@pytest.fixture
def refused(train, recwarn):
    """Check that a command line is refused as a user should see it: status 2, one line that has all
    `parts`."""
    def run(parts, *args, **kwargs):
        status, err = train(*args, **kwargs)
        assert status == 2 and re.fullmatch(r"train_adapter\.py: [^\n]+\n", err), err
        assert not recwarn.list, "a warning would be a second line"
        for part in [parts] if isinstance(parts, str) else parts:
            assert part in err
    return run


def log_of(out):
    """The log's lines on updates, and those on held-out data."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines
            if "held_out" not in line], [line for line in lines if "held_out" in line]


def same_weights(a, b):
    a, b = load_file(a / "adapter.safetensors"), load_file(b / "adapter.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


LONG = ["--updates", 12, "--passes", 2, "--window", 20, "--batch-tokens", 300]


@pytest.fixture(scope="session")
def killed(folder):
    """(the folder of an uninterrupted run, what a kill in update 6 would have left of another,
    which saved and evaluated after update 4)."""
    assert train_adapter.main(words(folder, folder / "one go", *LONG)) == 0
    step, seen = train_adapter.take_step, []

    def kill(*args):
        seen.append(0)
        if len(seen) == 6:
            shutil.copytree(folder / "another", folder / "killed")
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_adapter, "take_step", kill)
        args = words(folder, folder / "another", *LONG, "--eval-every", 2)
        assert train_adapter.main(args) == 0
    return folder / "one go", folder / "killed"


def stop_at(last, train, monkeypatch, signals=(signal.SIGINT,)):
    """Train until signals come in update `last`; (exit status, stderr)."""
    step, seen = train_adapter.take_step, []

    def stop(*args):
        seen.append(0)
        if len(seen) == last:
            for number in signals:
                signal.raise_signal(number)
        return step(*args)

    before = {number: signal.signal(number, signal.default_int_handler) for number in signals}
    with monkeypatch.context() as patch:
        patch.setattr(train_adapter, "take_step", stop)
        result = train()
    for number, handler in before.items():
        assert signal.signal(number, handler) is signal.default_int_handler, "left behind"
    return result


@pytest.fixture(scope="session", params=["attention", "layer"])
def adapter(request, folder):
    """The folder of a trained adapter, `layer` with a vocabulary of 60 tokens."""
    architecture, more = request.param, ["--vocabulary", 60] * (request.param == "layer")
    out = folder / f"adapter {architecture}"
    assert train_adapter.main(
        words(folder, out, "--architecture", architecture, *more, "--updates", 30, "--passes",
              10)) == 0
    return out
