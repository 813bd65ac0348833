"""--show-drafts: what a terminal shows while tokens are drafted, and what stands there at the end.

The terminal is a real one (a pseudo-terminal), its screen an emulator that knows the few codes
which are used.
"""
import os
import pty
import re
import select
import sys
import threading
import unicodedata
from pathlib import Path

from drafters.medusa import Heads
from drafters.table import DRAFTERS
from llama import Sampler
from support import start, terminal
from support.decoder import load

import pytest
from helpers import datastore, random_weights, write_adapter, write_model
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = str(Path(__file__).parents[1] / "kangaroo.py")
PROMPT = "Once upon a time she met an old turtle by the river, and"


class Emulator:
    """A terminal's screen: rows of cells (characters, style). A wide character is two cells. After
    the last column the cursor waits on it, and wraps with the next character."""

    def __init__(self, columns):
        self.columns, self.rows, self.column, self.style = columns, [{}], 0, ""

    def feed(self, text):
        for count, code, char in re.findall(r"\033\[(\d*)([A-Za-z])|(.)", text, re.DOTALL):
            if code == "m":
                self.style = "" if count == "0" else count
            elif code == "D":
                assert 0 < int(count) <= self.column < self.columns  # no step over an edge
                self.column -= int(count)
            elif code == "K":
                row = self.rows[-1]
                self.rows[-1] = {at: cell for at, cell in row.items() if at < self.column}
            elif char == "\r":
                self.column = 0
            elif char == "\n":
                self.rows.append({})
                self.column = 0
            elif char == "\t":
                self.column = min(self.column // 8 * 8 + 8, self.columns - 1)
            else:
                assert not code, f"unknown code {code}"
                self.put(char)

    def put(self, char):
        cells = 1 + (unicodedata.east_asian_width(char) in "WF")
        if unicodedata.combining(char):
            cells = 0
        if self.column + cells > self.columns:
            self.rows.append({})
            self.column = 0
        row, at = self.rows[-1], self.column
        if cells:
            row[at] = char, self.style
        elif at - 1 in row:
            row[at - 1] = row[at - 1][0] + char, row[at - 1][1]
        if cells == 2:
            row[at + 1] = "", self.style
        self.column += cells

    def cells(self, drafts=True):
        return [{at: cell for at, cell in row.items() if drafts or cell[1] != "2"}
                for row in self.rows]


class Stream:
    """A standard stream that is a terminal, and keeps what was written to it alone."""

    def __init__(self, screen):
        self.screen, self.written = screen, ""

    def isatty(self):
        return True

    def write(self, text):
        self.written += text
        self.screen.feed(text)

    def flush(self):
        pass


TEXTS = st.text("ab \n\té日🦘\u0301", max_size=12)


@given(columns=st.integers(2, 20), prompt=TEXTS, rounds=st.lists(st.tuples(
    st.lists(TEXTS, max_size=3), st.lists(st.tuples(TEXTS, st.booleans()), max_size=3))))
def test_drafts_leave_no_trace(columns, prompt, rounds):
    """At any time a terminal without its dim cells shows the text alone, and the cursor's line ends
    with the draft; standard output is the same with and without drafts."""
    screen, plain = Emulator(columns), Emulator(columns)
    out, err, bare = Stream(screen), Stream(screen), Stream(plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "one_terminal", lambda: True)
        patch.setenv("TERM", "xterm")
        patch.setattr(terminal.shutil, "get_terminal_size",
                      lambda: os.terminal_size((columns, 24)))
        patch.delenv("NO_COLOR", raising=False)
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        shown, alone = terminal.Screen(True), terminal.Screen()
        shown.write(prompt)
        patch.setattr(sys, "stdout", bare)
        alone.write(prompt)
        for drafts, tokens in rounds:
            for draft in drafts:
                patch.setattr(sys, "stdout", out)
                shown.draft(draft)
                assert screen.cells(drafts=False) == plain.cells()
                dim = [at for at, cell in screen.rows[-1].items() if cell[1] == "2"]
                assert dim == list(range(plain.column, plain.column + len(dim)))
                assert screen.column == plain.column + len(dim) < columns or not dim
            for text, drafted in tokens:
                patch.setattr(sys, "stdout", out)
                shown.show(text, drafted)
                patch.setattr(sys, "stdout", bare)
                alone.show(text, drafted)
                assert screen.cells() == plain.cells() and screen.column == plain.column
        shown.wipe()
    assert screen.cells() == plain.cells()
    assert out.written == bare.written and bare.screen is plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal") / "model"
    write_adapter(folder / "adapter", write_model(folder))
    return folder


@pytest.fixture(scope="module")
def decoder(folder):
    """A decoder that has what every drafter needs."""
    decoder = load(folder, device="cpu", dtype="float32", width=16, draft_model=folder)
    config = decoder.model.config
    decoder.heads = random_weights(Heads((3, 1, config.hidden_size, config.vocab_size)), 0)
    documents = [decoder.encode(text) for text in ("She met an old turtle.", PROMPT)]
    decoder.datastore = datastore(documents)
    return decoder


def test_the_table_names_what_a_drafter_has(decoder):
    """Guards drafters/table.py, which the command line believes: a setting that it refuses though
    the drafter has it, or the other way round."""
    for name, entry in DRAFTERS.items():
        assert name == "none" or {*entry.settings} == {*entry.cls.usual(decoder)}, name


@pytest.mark.parametrize("drafter", list(DRAFTERS))
def test_a_draft_is_told_before_it_is_verified(decoder, drafter):
    """Of every drafter: what was told last before a round is its draft, of a tree one path; the
    text stays the same. A chain that grows by tokens is told so."""
    told, rounds, options = [], [], dict(max_new_tokens=40, sampler=Sampler(5.0, seed=1))
    if drafter == "kangaroo":
        options["threshold"] = 0.0
    text, alone = decoder.generate(PROMPT, drafter, **options)
    pieces = []
    for piece in decoder.stream(PROMPT, drafter, **options, on_draft=told.append):
        if not rounds or piece.round is not rounds[-1][0]:
            rounds.append((piece.round, told[:]))
            told.clear()
        assert not told  # between the pieces of a round nothing is drafted
        pieces.append(piece)
    assert "".join(piece.text for piece in pieces) == text
    assert [token for round_, _ in rounds for token in round_.tokens] == alone["ids"]
    ids, grown = decoder.encode(PROMPT), 0
    for round_, texts in rounds:
        draft, path, node = round_.draft, [], 0
        while node in draft.parents:
            node = draft.parents.index(node) + 1
            path.append(draft.tokens[node - 1])
        before = decoder.tokenizer.decode(ids)
        whole = decoder.tokenizer.decode(ids + [token for token in path if token != 2])
        if "\ufffd" not in before + whole:  # half a character is waiting
            assert texts[-1] == whole[len(before):]
        grown += len(texts) > 1
        assert len(texts) == 1 + len(draft.tokens) * (drafter in ("kangaroo", "sps"))
        ids += round_.tokens
    assert bool(grown) == (drafter in ("kangaroo", "sps"))


class Pty:
    """A pseudo-terminal in the place of the standard streams; collects what comes out."""

    def __init__(self, monkeypatch, columns):
        fcntl, pty, struct, termios = map(pytest.importorskip,
                                          ("fcntl", "pty", "struct", "termios"))
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        for name in ("stdout", "stderr", "__stdout__"):
            stream = os.fdopen(os.dup(slave), "w", encoding="utf-8")
            monkeypatch.setattr(sys, name, stream)
        os.close(slave)
        self.got, self.reader = b"", threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        while True:
            try:
                data = os.read(self.master, 4096)
            except OSError:  # all have closed it
                return
            if not data:
                return
            self.got += data

    def close(self):
        for name in ("stdout", "stderr", "__stdout__"):
            getattr(sys, name).close()
        self.reader.join(60)
        os.close(self.master)
        return self.got.decode()


def decode_on_a_terminal(folder, columns, *args, **environment):
    """What a terminal receives, but for the line that stands while the model is loaded, and the
    summary, which has seconds in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NO_COLOR", raising=False)
        patch.delenv("COLUMNS", raising=False)
        patch.setenv("TERM", "xterm-256color")
        for name, value in environment.items():
            patch.setenv(name, value) if value is not None else patch.delenv(name)
        pty = Pty(patch, columns)
        words = ["--model", folder, "--device", "cpu", "--dtype", "float32", "--prompt", PROMPT,
                 "--max-new-tokens", 40, "--temperature", 5, *args]
        words += ["--threshold", 0] if "--drafter" not in args else []  # only Kangaroo has it
        try:
            status = start.main([str(word) for word in words])
        finally:
            text = pty.close()
    assert status == 0, text
    text, loading = re.subn("\r\033\\[Kloading model …\r\033\\[K", "", text)
    assert loading == (environment.get("TERM", "xterm") not in (None, "", "dumb"))
    return text[:text.index("40 tokens in")]


@pytest.mark.parametrize("args", [[], ["--tree"], ["--drafter", "lookup"]], ids=str)
@pytest.mark.parametrize("columns", [20, 43, 80])
def test_on_a_terminal(folder, columns, args):
    """Drafts are seen, wiped, and in the end the screen is that of a decode without them."""
    plain = decode_on_a_terminal(folder, columns, *args)
    text = decode_on_a_terminal(folder, columns, *args, "--show-drafts")
    screens = []
    for received in (plain, text):
        screens.append(Emulator(columns))
        screens[-1].feed(received)
    assert screens[0].cells() == screens[1].cells()
    wiped = re.findall("\033\\[2m([^\033]*)\033\\[0m\033\\[(\\d+)D\033\\[K", text)
    assert len(wiped) > 5
    assert all(len(draft) == int(count) for draft, count in wiped if draft.isascii())
    assert "\033[K" not in plain


@pytest.mark.parametrize("environment", [
    {"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": None}, {"TERM": ""}], ids=str)
def test_plain_where_drafts_cannot_be_wiped(folder, environment):
    """The same bytes as without the flag; no codes where the terminal has none."""
    plain, text = (decode_on_a_terminal(folder, 60, *flag, **environment)
                   for flag in ([], ["--show-drafts"]))
    assert text == plain and "\033" not in text


CONTROL = "\033]0;title\007\033[2J a\rb\x7f\x9b2J\tc\n"


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_control_characters_do_not_reach_a_terminal(folder, capfd, monkeypatch, term):
    """A file of prompts could set its title and clear its screen; a pipe gets what is there."""
    text = decode_on_a_terminal(folder, 80, "--prompt", CONTROL, TERM=term)
    assert text.count("␛]0;title␇␛[2J a␍b␡\\x9b2J\tc\r\n") == 1
    assert not {*re.sub("\033\\[[0-9]*m", "", text)} & {*"\033\a\x7f\x9b\b"}
    assert start.main(["--model", str(folder), "--device", "cpu", "--prompt", CONTROL]) == 0
    assert capfd.readouterr().out.startswith(CONTROL)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    terminal.say("no file \033[2J")
    assert capfd.readouterr().err == "no file ␛[2J\n"


def test_a_conversation_on_a_terminal(folder):
    """A line is answered; Ctrl-C stops an answer and not the program; Ctrl-D ends it."""
    process, master = pty.fork()
    if process == 0:  # pragma: no cover
        os.environ |= {"TERM": "dumb", "COLUMNS": "80"}
        os.execv(sys.executable, [sys.executable, SCRIPT, "--model", str(folder), "--device", "cpu",
                                  "--chat", "chatml", "--max-new-tokens", "300"])
    received = ""

    def wait_for(words):
        nonlocal received
        while words not in received:
            assert select.select([master], [], [], 60)[0], received
            received += os.read(master, 4096).decode("utf-8", "replace")
        received = received.partition(words)[2]

    wait_for("chat template chatml")
    wait_for("> ")
    os.write(master, b"Hello\n")
    wait_for("tokens per pass")
    wait_for("> ")
    os.write(master, b"And now?\n")
    wait_for("And now?\r\n")
    os.write(master, b"\x03")
    wait_for("> ")
    os.write(master, b"\x04")
    assert os.waitpid(process, 0)[1] == 0
    os.close(master)


def test_plain_in_pipes(folder, capfd):
    """Nothing on either stream that would not be there without the flag."""
    outputs = []
    for flag in ([], ["--show-drafts"]):
        words = ["--model", folder, "--device", "cpu", "--prompt", PROMPT, *flag]
        assert start.main(list(map(str, words))) == 0
        out, err = capfd.readouterr()
        outputs.append((out, err[:err.index("128 tokens in")]))
    assert outputs[0] == outputs[1]


def test_not_with_json(capfd):
    assert start.main(["--prompt", "a", "--json", "--show-drafts"]) == 2
    assert "--show-drafts" in capfd.readouterr().err
