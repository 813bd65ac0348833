"""Training in several processes: they compute what one computes, and end together."""
import datetime
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from argparse import Namespace
from pathlib import Path

import train_adapter
from support import processes
from support.data import Windows, batches_of
from support.errors import UserError
from support.processes import end_together
from train_adapter import NextTokens, States

import pytest
import torch
from helpers import thorough
from training import SCRIPT, log_of, same_weights, words


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_rank_alone_computes_the_states_of_a_batch(ranks):
    """Guards the time of several processes: the target's pass, by far the dearest part, made again
    by each process that meets a batch in a later pass. And what an update sees must not depend on
    their number."""
    args = Namespace(window=11, batches=4, passes=3, seed=0)  # 2 groups, 3 left
    computed, updates = [], []

    def states(ids, learn):
        computed.append(ids[0, 0].item())
        return States(ids, learn, NextTokens(ids[0]))

    for rank in range(ranks):
        windows = Windows(range(11), 11, 0, lambda window: batches_of(
            [([i] * 5, [True] * 5) for i in window], 5)).numbered(0, 0)
        stream = train_adapter.updates(windows, args, Namespace(states=states), rank=rank,
                                       ranks=ranks)
        updates.append([{s.x[0, 0].item() for s in next(stream)[1]} for _ in range(6)])
    assert len(computed) == len(set(computed)) > 8  # those left over in one pass come in another
    together = [set().union(*parts) for parts in zip(*updates)]
    assert all(len(update) == 4 for update in together)
    assert all(not together[i] & together[i + 1] for i in (0, 2, 4))
    assert together[:2] != together[2:4] != together[4:]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def forked(args, change=lambda: None):
    """Train in two processes, forks of this one, which has PyTorch already; returns their exit
    statuses and what each of them wrote to stderr."""
    out, port, pids = Path(args[args.index("--out") + 1]), free_port(), []
    logs = [out.with_name(f"{out.name} {rank}") for rank in "01"]
    for rank, log in zip("01", logs):
        pids.append(os.fork())
        if pids[-1] == 0:
            status = 70
            try:
                signal.alarm(100)  # ends one that waits for ever
                os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                               "GLOO_SOCKET_IFNAME": "lo"}
                sys.stderr = open(log, "w", buffering=1, encoding="utf-8")
                change()
                status = train_adapter.main(args)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return statuses, [log.read_text(encoding="utf-8") for log in logs]


def torchrun(args):
    """The same as a user does it: a launcher, and two processes that import PyTorch."""
    log = Path(args[args.index("--out") + 1]).with_name("ranks")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr",
        "127.0.0.1", "--master-port", free_port(), "--log-dir", log, "--redirects", "3", SCRIPT,
        *args
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                        "PYTHONPATH": str(SCRIPT.parent)}
    status = subprocess.run(command, capture_output=True, timeout=120, env=env).returncode
    return [status], [path.read_text() for path in sorted(log.rglob("stderr.log"))]


no_gpu = pytest.mark.skipif(torch.cuda.is_available(),
                            reason="where there is a GPU, gradients do not survive a fork")
both = pytest.mark.parametrize("run", [pytest.param(forked, marks=no_gpu),
                                       pytest.param(torchrun, marks=thorough)])


@both
def test_two_processes_train_the_same_adapter(run, train, folder, tmp_path):
    """Guards several GPUs: gradients averaged over batches instead of tokens, batches seen twice,
    files written by both."""
    args = "--updates", 6, "--batches", 4, "--batch-tokens", 300, "--passes", 2
    statuses, errors = run(words(folder, tmp_path / "two", *args))
    assert not any(statuses), errors
    assert train(*args)[0] == 0
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                for name in ("out", "two"))
    assert one["tokens"] == two["tokens"]
    for name, weight in one["weights"].items():
        assert torch.allclose(weight, two["weights"][name], rtol=1e-3, atol=1e-5), name
    assert [line["step"] for line in log_of(tmp_path / "two")[0]] == [*range(1, 7)]


@no_gpu
def test_two_processes_resume_in_a_later_epoch(folder, tmp_path):
    """Guards --resume: another order of documents in the second epoch, another batch for each
    process, a pass begun anew."""
    save = train_adapter.save_checkpoint

    def save_and_die(path, module, optimizers, state):
        save(path, module, optimizers, state)
        if state["step"] == 10:
            os._exit(9)

    def change():
        train_adapter.save_checkpoint = save_and_die

    args = ["--updates", 14, "--batches", 2, "--batch-tokens", 300, "--passes", 3, "--window", 6,
            "--save-every", 0]
    assert forked(words(folder, tmp_path / "one go", *args))[0] == [0, 0]
    out = words(folder, tmp_path / "out", *args)
    assert forked(out, change)[0] == [9, 2]
    state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 10 and state["window"] > 0
    statuses, errors = forked([*out, "--resume"])
    assert statuses == [0, 0], errors
    assert same_weights(tmp_path / "out", tmp_path / "one go")


@both
def test_if_one_process_fails_all_end(run, folder, tmp_path):
    """Guards several processes: one that waits for ever, or ends in a traceback, because another
    could not write."""
    (tmp_path / "out" / "log.jsonl").mkdir(parents=True)
    statuses, errors = run(words(folder, tmp_path / "out", "--save-every", 0, "--updates", 500))
    assert all(statuses) and len(errors) == 2 and not any("Traceback" in error
                                                          for error in errors), errors
    assert re.search(r"train_adapter\.py: [^\n]*Is a directory: '[^\n]*log\.jsonl'\n$", errors[0])
    assert not errors[1] or re.fullmatch(  # if it is empty, torchrun was faster
        r"train_adapter\.py: process 1 stops, because another one has \([^\n]+\)\n", errors[1])


@pytest.mark.parametrize("words", [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:9",
    "NCCL communicator was aborted on rank 1.",
    "NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network error\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely.",
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed.",
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(OpType=ALLREDUCE)"])
def test_a_dead_peer_is_told_in_one_line(monkeypatch, words):
    """Guards several GPUs: NCCL says it in other words than gloo, and they ended in a traceback;
    and any other RuntimeError is a bug, whose traceback is needed."""
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"^process 1 stops, because another one has \([^\n]+\)$"):
        with end_together():
            raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="shapes"), end_together():
        raise RuntimeError("shapes do not fit")


@no_gpu
def test_an_evaluation_may_outlast_the_timeout(folder, tmp_path):
    """Guards several processes: the others wait in a collective while the first evaluates, whose
    timeout then ends the run, with a traceback and without a checkpoint."""
    evaluate = train_adapter.Training.evaluate

    def change():
        processes.TIMEOUT = datetime.timedelta(seconds=2)
        train_adapter.Training.evaluate = lambda self: time.sleep(3) or evaluate(self)

    args = words(folder, tmp_path / "out", "--updates", 1)
    statuses, errors = forked(args, change)
    assert statuses == [0, 0], errors
    assert (tmp_path / "out" / "adapter.safetensors").exists()
    assert [line["step"] for line in log_of(tmp_path / "out")[1]] == [1]


@pytest.mark.parametrize("rank", "01")
@pytest.mark.parametrize("args, part", [(["--batches", 3], "--batches 3"),
                                        (["--max-length", 2], "--max-length 2"),
                                        (["--window", 1], "--window 1")])
def test_all_processes_find_the_same_fault(train, monkeypatch, tmp_path, rank, args, part):
    """Guards several processes: one that waits for another which has stopped, and says nothing."""
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(processes.dist, name, lambda *args, **more: None)
    status, err = train(*args)
    assert status == 2 and err.splitlines()[-1].startswith(
        f"train_adapter.py: {part}: ") and "Traceback" not in err
    assert not list((tmp_path / "out").iterdir())
