"""Training Medusa's heads: what each learns, how their tree is chosen, and that no run is lost."""
import json
from argparse import Namespace

from drafters import train_medusa
from drafters.medusa import TREE, load_heads
from drafters.train_medusa import MedusaTarget, MedusaTraining, sparse_tree
from support import processes
from support.checkpoint import load_llama
from train_adapter import measure_batch

import pytest
import torch
from helpers import TEXT, write_model
from test_lookahead import CIRCLE, rule
from test_medusa import perfect_heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads") / "model"
    write_model(folder)
    return folder


def test_a_tree_is_the_likeliest_paths():
    """By the products of how often a choice was right; each path after the one that it goes on."""
    tree = sparse_tree([[0.5, 0.3, 0.1], [0.4, 0.05], [0.9]], 6)
    assert tree == [(0,), (1,), (0, 0), (0, 0, 0), (1, 0), (1, 0, 0)]
    assert sparse_tree([[0.5]], 9) == [(0,)]
    for i, path in enumerate(TREE):  # the one for heads that name none
        assert len(path) == 1 or path[:-1] in TREE[:i]
    assert len(set(TREE)) == len(TREE) == 15


def sums_over(heads, target, states):
    parts = list(MedusaTraining.parts(Namespace(adapter=heads, target=target), [states], 2.0))
    assert [scale for *_, scale in parts] == [2.0, 2.0 * 0.8, 2.0 * 0.8 ** 2]
    return sum(measure_batch(head, target, shifted) for head, shifted, _ in parts).tolist()


def test_a_head_learns_what_the_target_says_later():
    """Guards the shift: heads that are right by construction agree with the target at every
    position that has one so far before it, and with their order turned round at none."""
    model = rule(CIRCLE)
    heads = perfect_heads(model, CIRCLE, 3)
    target = MedusaTarget(model, 2)
    target.draft_logits = lambda x: x  # these heads have projections of their own
    learn = torch.ones(2, 20, dtype=torch.bool)
    learn[0, :9] = False
    states = target.states(torch.arange(40).view(2, 20) % 12, learn)
    _, _, agreed, positions = sums_over(heads, target, states)
    assert agreed == positions == 3 * 11 + 19 + 18 + 17
    assert target.choose_tree(heads, [states], 3) == [(0,), (0, 0), (0, 0, 0)]
    heads.heads = heads.heads[::-1]
    _, _, agreed, _ = sums_over(heads, target, states)
    assert agreed == 11 + 18  # the middle one is where it was


def test_the_tree_of_heads_that_err():
    """Guards the shares that the tree is chosen by: where the first head's second choice is right
    twice as often as its first, and the second head is never right, no node hangs deep."""
    model = rule(CIRCLE)
    target = MedusaTarget(model, 2)
    heads = perfect_heads(model, CIRCLE, 2)
    states = target.states(torch.arange(20)[None] % 12, torch.ones(1, 20, dtype=torch.bool))
    best, asked = states.goal.best, []

    def logits(x):  # of 19 positions for the first head, then of 18 for the second
        asked.append(len(x))
        out = torch.full((len(x), model.config.vocab_size), -1.0)
        if len(x) == 19:
            out[range(19), (best[1:] + 1) % 12] = 1.0
            out[range(19), best[1:]] = 0.5
            out[:6] = out[:6].where(out[:6] < 0, 1.5 - out[:6])  # the first six the other way round
        else:
            out[range(18), (best[2:] + 1) % 12] = 1.0
            out[range(18), (best[2:] + 2) % 12] = 0.5
        return out

    target.draft_logits = logits
    assert target.choose_tree(heads, [states], 3, candidates=2)[:2] == [(1,), (0,)]
    assert asked == [19, 18]


def words(folder, tmp_path, *args):
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} {text}" for i in range(10)
                                                   for text in TEXT))
    return [str(word) for word in [
        "--model", folder, "--data", tmp_path / "text.txt", "--out", tmp_path / "out",
        "--device", "cpu", "--dtype", "float32", "--max-length", 100,
        "--batch-tokens", 400, "--batches", 2, "--window", 20, "--updates", 12, "--warmup", 2,
        "--lr", 0.02, "--eval-prompts", 1, "--eval-documents", 4, *args]]


@pytest.mark.parametrize("vocabulary", [None, 90])
def test_training_heads(folder, tmp_path, capfd, vocabulary):
    """From text to a folder that the drafter reads: the loss falls, and going on from a checkpoint
    gives the same heads."""
    args = ["--vocabulary", vocabulary] if vocabulary else []
    assert train_medusa.main(words(folder, tmp_path, *args)) == 0
    assert "adapter medusa, 0.00 M parameters" in capfd.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").open()]
    loss = [row["loss"] for row in rows if "loss" in row]
    assert loss[-1] < loss[0]
    model = load_llama(folder)
    heads = load_heads(tmp_path / "out", model)
    assert len(heads.heads) == 3 and not heads.own
    assert (heads.head is None) == (vocabulary is None)
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    assert facts["architecture"] == "medusa" and facts["training"]["updates"] == 12
    assert heads.tree == [tuple(path) for path in facts["medusa_choices"]] != list(TREE)
    weights = (tmp_path / "out" / "medusa_lm_head.safetensors").read_bytes()
    (tmp_path / "out" / "medusa_lm_head.safetensors").unlink()
    assert train_medusa.main(words(folder, tmp_path, *args, "--resume")) == 0
    assert (tmp_path / "out" / "medusa_lm_head.safetensors").read_bytes() == weights


@pytest.mark.parametrize("args, word", [
    (["--exit-layer", 1], "--exit-layer"), (["--init", "x"], "--init"),
    (["--heads", 0], "--heads 0"), (["--learn", "text"], "--learn"), (["--lr", 0], "--lr 0"),
    (["--architecture", "layer"], "--architecture"), (["--resume"], "checkpoint.pt")])
def test_options_that_do_not_fit(folder, tmp_path, capfd, args, word):
    """Guards against options that would do nothing, or would do it for hours."""
    assert train_medusa.main(words(folder, tmp_path, *args)) == 2
    err = capfd.readouterr().err
    assert err.startswith("train_medusa.py: ") and err.count("\n") == 1 and word in err


def test_other_heads_are_refused_on_resuming(folder, tmp_path, capfd):
    """Guards --resume: heads of another number cannot go on from these weights."""
    assert train_medusa.main(words(folder, tmp_path, "--updates", 1)) == 0
    assert train_medusa.main(words(folder, tmp_path, "--updates", 1, "--heads", 2, "--resume")) == 2
    assert "--heads 3, --resume needs the same, not 2" in capfd.readouterr().err


def test_several_processes_are_refused(folder, tmp_path, capfd, monkeypatch):
    """Guards torchrun: every process would train all heads, and write the same files."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(processes.dist, name, lambda *args, **more: None)
    assert train_medusa.main(words(folder, tmp_path)) == 2
    assert "one process" in capfd.readouterr().err
