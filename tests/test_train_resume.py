"""No run is lost or mispaired: checkpoints, --resume, and who writes which file."""
import errno
import json
import os
import shutil
import time

import train_adapter
from support import files, training_text
from support.errors import UserError

import pytest
import torch
from helpers import write_model
from training import LONG, log_of, same_weights, share_gpt, stop_at


@pytest.fixture
def resumable(killed, tmp_path):
    """A copy of the killed run's folder where `train` writes."""
    return shutil.copytree(killed[1], tmp_path / "out")


def test_a_killed_run_resumes_exactly(train, killed, resumable):
    """Guards --resume: optimizer, order, place in a window or learning rate lost; a log with steps
    doubled or half written."""
    state = torch.load(resumable / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and state["update"] > 0, "not killed inside a window"
    assert len(log_of(resumable)[0]) == 5, "not killed between two checkpoints"
    assert not (resumable / "adapter.safetensors").exists()
    with open(resumable / "log.jsonl", "a") as file:
        file.write('{"step": 5, "held_out": {}}\n{"step": 6, "lo')
    status, err = train(*LONG, "--resume", "--eval-every", 2)
    assert status == 0, err
    assert same_weights(resumable, killed[0])
    updates, held_out = log_of(resumable)
    assert [line["step"] for line in updates] == [*range(1, 13)]
    assert [line["step"] for line in held_out] == [*range(2, 13, 2)]  # none missing, none twice
    assert [line["loss"] for line in updates] == [line["loss"] for line in log_of(killed[0])[0]]
    assert not list(resumable.glob("*.tmp"))


def test_a_stopped_run_on_the_text_resumes_exactly(train, tmp_path, monkeypatch):
    """Guards --resume of --learn text: its place, its documents or its optimizer lost."""
    args = [*LONG, "--learn", "text", "--vocabulary", 60]
    assert train(*args, out="one go")[0] == 0
    assert stop_at(8, lambda: train(*args), monkeypatch)[0] == 130
    assert train(*args, "--resume")[0] == 0
    assert same_weights(tmp_path / "out", tmp_path / "one go")
    assert log_of(tmp_path / "out")[0][-1]["loss"] == log_of(tmp_path / "one go")[0][-1]["loss"]


def test_a_finished_run_resumes_to_the_same(train, killed, tmp_path):
    """Guards --resume of a run that was stopped between its last checkpoint and its adapter."""
    out = shutil.copytree(killed[0], tmp_path / "out")
    (out / "adapter.safetensors").unlink()
    status, err = train(*LONG, "--resume")
    assert status == 0 and same_weights(out, killed[0]), err


def test_another_seed_gives_another_adapter(train, killed, tmp_path):
    """Guards the comparisons here: adapters that are equal because nothing was trained."""
    assert train(*LONG, "--seed", 1)[0] == 0
    assert not same_weights(tmp_path / "out", killed[0])


@pytest.mark.parametrize("option, value", [("--lr", 0.02), ("--passes", 3),
                                           ("--loss", "acceptance"), ("--vocabulary", 60),
                                           ("--batches", 1), ("--architecture", "layer"),
                                           ("--seed", 7), ("--updates", 13), ("--chat", "chatml"),
                                           ("--dtype", "bfloat16"), ("--learn", "text")])
def test_other_options_are_refused_on_resuming(refused, resumable, option, value):
    """Guards --resume: a run that goes on with other options and equals neither run."""
    refused(["checkpoint.pt", option, str(value)], *LONG, option, value, "--resume")


def test_other_documents_are_refused_on_resuming(refused, resumable, tmp_path):
    """Guards --resume: a run that goes on with as many other documents, at a place that means
    nothing there."""
    (tmp_path / "chats.json").write_text(
        json.dumps([share_gpt(i + 1000 * (i == 7)) for i in range(40)]))
    refused(["checkpoint.pt", "--data"], *LONG, "--resume", "--data", tmp_path / "chats.json")


def test_another_beginning_is_refused_on_resuming(refused, resumable, adapter):
    """Guards config.json: an adapter that tells of another --init than the one it was begun
    from."""
    refused(["checkpoint.pt", "--init"], *LONG, "--resume", "--init", adapter)


def test_what_it_began_from_may_move(train, adapter, tmp_path, monkeypatch):
    """Guards --resume with --init: compared by its name, or needed though the checkpoint has it."""
    begin = shutil.copytree(adapter, tmp_path / "begin")
    monkeypatch.chdir(tmp_path)
    args = [*LONG, "--init", begin]
    assert train(*args, out="one go")[0] == 0
    assert stop_at(2, lambda: train(*args), monkeypatch)[0] == 130
    assert stop_at(2, lambda: train(*LONG, "--resume", "--init", "begin"), monkeypatch)[0] == 130
    shutil.rmtree(begin)
    assert train(*args, "--resume")[0] == 0 and same_weights(tmp_path / "out", tmp_path / "one go")
    facts = [json.loads((tmp_path / out / "config.json").read_text())["training"]["init"]
             for out in ("out", "one go")]
    assert facts[0] == facts[1] and facts[0]["updates"] == 30


def test_another_model_is_refused_on_resuming(refused, resumable, tmp_path):
    """Guards --resume: a half-trained adapter trained on for another model of the same shape."""
    write_model(tmp_path / "other", seed=1)
    refused(["checkpoint.pt", "--model"], *LONG, "--resume", "--model", tmp_path / "other")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing", "other"])
def test_a_damaged_checkpoint_is_refused(refused, resumable, damage):
    """Guards --resume: a traceback, or a new start without a word, where the checkpoint is not
    one."""
    path = resumable / "checkpoint.pt"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:len(data) // 2], "text": b"no checkpoint"}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    elif damage == "other":
        torch.save({"weights": {}}, path)
    refused("checkpoint.pt", *LONG, "--resume")


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json"])
def test_a_run_is_not_overwritten(refused, train, tmp_path, monkeypatch, name):
    """Guards a long run: lost because the same command line was given again without --resume; or
    an adapter, or any model, in the folder that is named. If it may be lost, --resume must not go
    on from it."""
    (tmp_path / "out").mkdir()
    for file in (name, "log.jsonl"):
        (tmp_path / "out" / file).write_text('{"step": 7}')
    refused([name, "--out", "--resume", "--overwrite"])
    assert all(file.read_text() == '{"step": 7}' for file in (tmp_path / "out").iterdir())
    monkeypatch.setattr(train_adapter, "take_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("--overwrite")
    assert (tmp_path / "out" / "log.jsonl").read_text() == ""
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_two_trainings_do_not_share_a_folder(refused, tmp_path, monkeypatch):
    """Guards --out: two runs that write one log and one checkpoint."""
    (tmp_path / "out").mkdir()
    other = os.open(tmp_path / "out", os.O_RDONLY)
    assert files.lock(other)
    refused(["--out", "another training"])
    os.close(other)


def test_a_full_disk_keeps_the_last_checkpoint(train, killed, tmp_path, monkeypatch):
    """Guards a long run: half a checkpoint that stays, and keeps the disk full, so that not even
    --resume begins; or that of a kill."""
    save = train_adapter.save_checkpoint

    def full(*args):
        if args[-1]["step"] == 6:
            monkeypatch.setattr(os, "fsync", no_space)
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_adapter, "save_checkpoint", full)
        status, err = train(*LONG, "--save-every", 0)
    assert status == 2 and err.endswith("checkpoint.pt: cannot be written (No space left on "
                                        "device); the one before is kept\n")
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint.pt", "log.jsonl"}
    (tmp_path / "out" / "checkpoint.pt.0123abcd.tmp").touch()  # of a kill
    assert train(*LONG, "--resume")[0] == 0 and same_weights(tmp_path / "out", killed[0])
    assert not list((tmp_path / "out").glob("*.tmp"))


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_of_two_writers_the_later_wins(tmp_path, monkeypatch):
    """Guards two programs that write one file: one that fails, or half of each; and who may read
    the file."""
    path, fsync = tmp_path / "results.json", os.fsync

    def meanwhile(file):
        monkeypatch.setattr(os, "fsync", fsync)
        files.write_atomically(path, b"the other's")
        path.chmod(0o640)
        assert path.read_bytes() == b"the other's"

    monkeypatch.setattr(os, "fsync", meanwhile)
    files.write_atomically(path, b"mine")
    (tmp_path / "new").touch()
    assert path.read_bytes() == b"mine" and path.stat().st_mode == (tmp_path / "new").stat().st_mode
    path.chmod(0o640)
    files.write_atomically(path, b"mine")
    assert path.stat().st_mode & 0o777 == 0o640 and len(list(tmp_path.iterdir())) == 2


def test_it_saves_before_it_evaluates(train, tmp_path, monkeypatch):
    """Guards hours of training against an evaluation that fails."""
    def fail(*args):
        raise UserError("the evaluation fails")
    monkeypatch.setattr(train_adapter.Training, "evaluate", fail)
    status, err = train("--updates", 3, "--eval-every", 2)
    assert status == 2 and err.endswith("the evaluation fails\n")
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 2


def test_when_it_saves_and_what_time_it_counts(train, tmp_path, monkeypatch):
    """Guards a machine that is lost after a while: more than --save-every seconds lost with it. And
    figures of speed: saving and evaluating in them, what it waits for text untold, or those of a
    run that was stopped without its first part."""
    now, saved, save = [0.0], {}, train_adapter.save_checkpoint
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(seconds, where, name):
        function = getattr(where, name)

        def slowly(*args):
            now[0] += seconds
            return function(*args)
        monkeypatch.setattr(where, name, slowly)

    monkeypatch.setattr(train_adapter, "save_checkpoint",
                        lambda *args: saved.update({args[-1]["step"]: args[-1]["tokens"]})
                        or save(*args))
    takes(10, train_adapter, "take_step")
    takes(1, training_text, "batches_of")  # with --workers 0, of the one window
    takes(0.5, train_adapter, "save_checkpoint")
    takes(0.25, train_adapter.Training, "evaluate")
    args = ["--updates", 9, "--passes", 9, "--eval-every", 4, "--save-every", 25]
    assert stop_at(7, lambda: train(*args), monkeypatch)[0] == 130
    assert [*saved] == [3, 4, 6, 7]  # the 4th before it evaluates, the 7th because it ends
    err = train(*args, "--resume")[1]
    assert [*saved] == [3, 4, 6, 7, 8, 9] and err.count(" · 2% waiting for text\n") == 2, err
    updates, _ = log_of(tmp_path / "out")
    assert [line["waited"] for line in updates] == [1] * 7 + [2] * 2
    assert [line["seconds"] for line in updates] == [10 * line["step"] + line["waited"]
                                                     for line in updates]
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["training"]
    assert facts["seconds"] == 92 and facts["waited"] == 2
    assert facts["tokens"] == saved[9]
    assert updates[6]["tokens_per_second"] == saved[7] / 71
    assert updates[8]["tokens_per_second"] == (saved[9] - saved[7]) / 21  # of this process


@pytest.mark.filterwarnings("ignore:for .*no-op")
def test_a_resumed_optimizer_counts_on_the_cpu(tmp_path):
    """Guards a GPU against a sync for each weight in each update: AdamW's step counts there too if
    the checkpoint is read to the device."""
    module = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    train_adapter.save_checkpoint(tmp_path / "c.pt", module, [optimizer], {"options": {}})
    module = torch.nn.Linear(3, 3, device="meta")  # stands in for a GPU
    optimizer = torch.optim.AdamW(module.parameters())
    train_adapter.load_checkpoint(tmp_path / "c.pt", module, [optimizer], {})
    for state in optimizer.state.values():
        assert state["step"].device.type == "cpu" and state["step"].item() == 1
        assert state["exp_avg"].device.type == "meta"
