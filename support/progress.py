"""What a long training shows and saves: a progress line, a log, checkpoints to go on from.

Nothing of the algorithm.
"""
import contextlib
import io
import json
import math
import os
import signal
import sys
import threading
import time

from support.errors import UserError
from support.files import write_atomically
from support.terminal import is_terminal, say, status

import torch


class Progress:
    """One line on standard error, rewritten in place on a terminal, and a line of JSON in a log.

    `logged` are the log's records so far, without those of a killed run after its last checkpoint.
    A run's state has its `step`, `tokens` and `seconds`, and perhaps how many of these it `waited`
    for text. The speed is that of this process, which may go on from another.
    """

    def __init__(self, log, total, state):
        self.log, self.total, self.first, self.begin = log, total, {**state}, time.perf_counter()
        self.live, self.logged = is_terminal(sys.stderr), trim_log(log, state["step"])

    def report(self, figures, state):
        step, tokens, seconds = (state[name] - self.first[name]
                                 for name in ("step", "tokens", "seconds"))
        speed, waited = tokens / seconds, state.get("waited")
        left = (time.perf_counter() - self.begin) / step * (self.total - state["step"])
        shown = [f"{name} {figures[name]:.3f}" for name in ("loss", "agreement") if name in figures]
        shown += [f"{speed:,.0f} tokens/s", f"{left / 60:.0f} min left"]
        shown += [] if waited is None else [f"{waited / state['seconds']:.0%} waiting for text"]
        bar = "█" * (10 * state["step"] // self.total)
        line = f"{bar:░<10} {state['step']}/{self.total} · {' · '.join(shown)}"
        (status if self.live and state["step"] < self.total else say)(line)
        times = {name: state[name] for name in ("seconds", "waited") if name in state}
        self.write({"step": state["step"], **figures, "tokens_per_second": speed, **times})

    def write(self, record):
        try:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as e:  # a full disk's names no file
            raise UserError(f"{self.log}: cannot be written ({e.strerror})") from None


class Clock:
    """Adds up in a run's state the `seconds` that it trains, without those while the clock is
    `paused`, and how many of them it has `waited` for text."""

    def __init__(self, state):
        self.state, self.begin, self.struck = state, time.perf_counter(), time.perf_counter()

    def waiting(self, windows):
        """The same endless windows. A GPU waits meanwhile: the last update has been waited for."""
        while True:
            begin = time.perf_counter()
            window = next(windows)
            self.state["waited"] += time.perf_counter() - begin
            yield window

    def lap(self):
        """The seconds up to now are the state's."""
        begin, self.begin = self.begin, time.perf_counter()
        self.state["seconds"] += self.begin - begin

    @contextlib.contextmanager
    def paused(self):
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin

    def strikes(self, every):
        """Whether it is `every` seconds, pauses among them, since it did so last."""
        now = time.perf_counter()
        late = now - self.struck >= every
        self.struck = now if late else self.struck
        return late


class Interruption:
    """While it is entered, Ctrl-C and SIGTERM are kept in `signal`, to end by after an update; and
    a closed terminal (SIGHUP) ends nothing, unless torchrun, which it ends, has started this.

    A second one ends at once, if it comes a second later: before that it may be the first one
    again, which torchrun passes on.
    """
    PATIENCE = 1.0  # seconds

    def __init__(self, quiet=False):
        self.quiet, self.process, self.signal, self.waits_until = quiet, os.getpid(), 0, math.inf

    def __enter__(self):
        handlers = {signal.SIGINT: self.catch, signal.SIGTERM: self.catch}
        if hasattr(signal, "SIGHUP"):  # not on Windows
            handlers[signal.SIGHUP] = self.catch if "RANK" in os.environ else signal.SIG_IGN
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # no other one may
            self.before = {number: signal.signal(number, handler)
                           for number, handler in handlers.items()
                           if signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number, _):
        if os.getpid() != self.process:
            return  # a worker: it ends with its training
        if time.monotonic() > self.waits_until:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.waits_until = number, time.monotonic() + self.PATIENCE
            if not self.quiet:
                with contextlib.suppress(RuntimeError):  # it came in the middle of another line
                    say("\nstopping after this update; Ctrl-C again stops at once")


def trim_log(path, step):
    """Drop what a killed run logged after its last checkpoint; returns the records left."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line may be half written
            record = json.loads(line)
            kept += [record] * (record["step"] <= step)
    if path.exists():
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return kept


def save_checkpoint(path, module, optimizers, state):
    """All that a resumed run needs, in one file that is replaced at once."""
    buffer = io.BytesIO()
    torch.save({"weights": module.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                "rng": torch.get_rng_state(), **state}, buffer)
    write_atomically(path, buffer.getvalue())


def read_checkpoint(path):
    """What `save_checkpoint` wrote. UserError if it is nothing of the kind."""
    try:
        # To the CPU, where AdamW counts its steps: on a GPU each would cost a sync.
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state | {"options": dict(state["options"])}
    except Exception as e:  # torch.load raises whatever a damaged file leads it to
        raise UserError(f"{path}: no checkpoint that --resume could go on from "
                        f"({type(e).__name__})") from None


def load_checkpoint(path, module, optimizers, options):
    """Fill module and optimizers, wherever they are; returns the rest of the state.

    UserError unless it was made with the same options.
    """
    state = read_checkpoint(path)
    made_with = state["options"]
    for name, value in options.items():
        if made_with.get(name) != value:
            raise UserError(f"{path}: was made with --{name.replace('_', '-')} "
                            f"{made_with.get(name)}, --resume needs the same, not {value}")
    module.load_state_dict(state.pop("weights"))
    for optimizer, saved in zip(optimizers, state.pop("optimizers")):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state.pop("rng"))
    return state
