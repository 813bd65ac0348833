"""What goes wrong in a training: a user's mistakes, interruptions, weights that are not finite."""
import io
import json
import re
import signal
import sys

import train_adapter
from drafters.adapters import ADAPTERS
from support import progress, training_options
from support.data import is_held_out
from train_adapter import LOSSES

import pytest
import torch
from training import LONG, same_weights, sentences, share_gpt, stop_at


@pytest.mark.parametrize("args, parts",
                         [(["--model", "nowhere"], ["nowhere", "--model"]),
                          (["--exit-layer", 4], ["--exit-layer 4", "4 layers"]),
                          (["--exit-layer", -1], "--exit-layer -1"),
                          (["--exit-layer", "two"], "--exit-layer"),
                          (["--updates", 0], "--updates 0"),
                          (["--loss", "mse"], ["--loss mse", *LOSSES]),
                          (["--learn", "all"], ["--learn all", "target, text"]),
                          (["--architecture", "mlp"], ["mlp", "layer"]),
                          (["--max-length", 601], ["--max-length 601", "--batch-tokens 600"]),
                          (["--passes", 0], "--passes 0"), (["--window", 1], "--window 1"),
                          (["--workers", -1], "--workers -1"),
                          (["--save-every", -1], "--save-every -1"),
                          (["--vocabulary", 0], "--vocabulary 0"),
                          (["--vocabulary", -5], "--vocabulary -5"),
                          (["--vocabulary", 341], ["--vocabulary 341", "340"]),
                          (["--eval-documents", 0], "--eval-documents 0"),
                          (["--eval-prompts", -1], "--eval-prompts -1"), (["--lr", -1], "--lr -1"),
                          (["--lr", "nan"], "--lr nan"),
                          (["--architecture", "medusa"], ["--architecture medusa",
                                                          "drafters/train_medusa.py"]),
                          (["--learn", "text", "--loss", "hard"], ["--loss hard", "--learn text"]),
                          (["--chat", "alpaca"], ["--chat alpaca", "chatml"]),
                          (["--init", "nowhere"], "nowhere"), (["--norm", 0], "--norm 0"),
                          (["--norm", 1, "--init", "x"], ["--norm 1", "--init"]),
                          (["--dtype", "int8"], "--dtype int8"),
                          (["--device", "tpu"], "--device tpu"), (["--colour"], "--colour"),
                          (["--max-length", 2], "--max-length 2"),
                          (["--seed", 2 ** 64], "--seed 18446744073709551616"),
                          (["--resume"], ["--resume", "checkpoint.pt"]),
                          (["--lr", 1e30], ["--lr 1e+30", "--dtype"])])
def test_a_wrong_option_is_refused(train, args, parts):
    """Guards a user's mistake: a traceback, a line that does not name the option, or hours of
    training for something else."""
    status, err = train(*args)
    lines = err.splitlines()
    assert status == 2 and lines[-1].startswith(
        "train_adapter.py: ") and "Traceback" not in err, err
    assert all(part in lines[-1] for part in ([parts] if isinstance(parts, str) else parts)), err


def test_the_options_know_every_loss_and_architecture():
    """They are told before PyTorch is there, in which the functions and classes are written."""
    assert training_options.LOSSES == tuple(train_adapter.LOSSES)
    assert training_options.ARCHITECTURES == tuple(ADAPTERS)


def test_weights_that_are_not_finite_are_not_saved(train, tmp_path):
    """Guards a run that diverges: hours more of NaN, and an adapter of NaN in place of the last
    good checkpoint."""
    status, err = train("--lr", 1e30, "--save-every", 0)
    weights = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["weights"]
    assert status == 2 and not (tmp_path / "out" / "adapter.safetensors").exists(), err
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_saves_and_says_how_to_go_on(train, killed, tmp_path, monkeypatch, number):
    """Guards Ctrl-C and SIGTERM: a traceback, or a promise of a checkpoint where there is none. A
    closed terminal ends nothing; torchrun may send a signal twice."""
    status, err = stop_at(2, lambda: train(*LONG), monkeypatch, [signal.SIGHUP, number, number])
    assert status == 128 + number and err.endswith(
        "\ninterrupted after update 2, --resume goes on from there\n")
    if number == signal.SIGTERM:
        assert train(*LONG, "--resume")[0] == 0
        assert same_weights(tmp_path / "out", killed[0])


def test_nobody_need_read_the_progress(train, tmp_path, monkeypatch):
    """Guards hours of training: ended by a closed terminal, `| head` or a full disk."""
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    assert train()[0] == 0 and (tmp_path / "out" / "adapter.safetensors").exists()


def test_a_second_interruption_does_not_wait(train, tmp_path, monkeypatch):
    """Guards Ctrl-C: a user who waits for an update of minutes; a promise of what is not there."""
    monkeypatch.setattr(progress.Interruption, "PATIENCE", -1)
    status, err = stop_at(2, train, monkeypatch, [signal.SIGINT] * 2)
    assert status == 130 and err.endswith("\ninterrupted\n")
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def report_three_updates(folder):
    states = [{"step": step, "tokens": 100 * step, "seconds": 2.5 * step, "waited": 0.0}
              for step in range(4)]
    progress = train_adapter.Progress(folder / "log.jsonl", 3, states[0])
    for state in states[1:]:
        progress.report({"loss": 1.0, "acceptance": 0.5, "agreement": 0.5}, state)
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1]) == {
        "step": 3, "loss": 1.0, "acceptance": 0.5, "agreement": 0.5, "tokens_per_second": 40.0,
        "seconds": 7.5, "waited": 0.0}


def test_progress_stays_on_one_line_of_a_terminal(tmp_path, monkeypatch):
    """Guards the progress line: wider than the terminal it cannot be rewritten, and each update
    leaves a line behind."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    report_three_updates(tmp_path)
    _, *live, last = sys.stderr.getvalue().split("\r\033[K")
    bars = ["█" * n + "░" * (10 - n) for n in (3, 6, 10)]
    assert [line[:10] for line in live] == bars[:2] and all(len(line) == 49 for line in live)
    assert last.startswith(bars[2]) and last.count("\n") == 1
    monkeypatch.setenv("TERM", "dumb")  # it knows no codes: a line an update
    monkeypatch.setattr(sys, "stderr", Terminal())
    report_three_updates(tmp_path)
    assert [line[:10] for line in sys.stderr.getvalue().splitlines()] == bars
    assert "\033" not in sys.stderr.getvalue()


@pytest.mark.parametrize("name", ["out", "out/deeper"])
def test_a_file_in_place_of_the_folder_is_refused(refused, tmp_path, name):
    """Guards --out: a traceback where a file is in the way."""
    (tmp_path / "out").write_text("a file")
    refused(["--out", "out"], out=name)


def test_a_required_option_is_missed(capfd):
    """Guards the parser: its usage text and SystemExit in place of one line."""
    assert train_adapter.main(["--model", "m"]) == 2
    err = capfd.readouterr().err
    assert re.fullmatch(r"train_adapter\.py: [^\n]+\n", err) and "--data" in err


def test_prompts_beyond_the_context_are_no_crash(train, tmp_path):
    """Guards evaluations: prompts longer than the context leave nothing to decode, or to divide
    by."""
    prompt = next(p for i in range(1000) if is_held_out(p := f"{i} {sentences(0, 90)}"))
    chats = [share_gpt(i) for i in range(40)]
    kept = [chat for chat in chats if not is_held_out(chat["conversations"][0]["value"])]
    long = {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": "Yes."}]}
    (tmp_path / "data.json").write_text(json.dumps([long, *kept]))
    status, err = train("--data", tmp_path / "data.json")
    assert status == 0 or status == 2 and "held-out" in err.splitlines()[-1], err
