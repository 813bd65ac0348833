"""What a user gets wrong on the command line of the other programs: one line that names it.

And status 2. Some of them run for hours, so it must come to light before anything is measured or
written.
"""
import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from bench import ablations, authors_methods, choose, gpu, order, rules, spec_bench, speed
from models import make_stories, own_answers
from support import start
from support.errors import UserError
from support.files import write_atomically
from support.program import run_program

import pytest
from helpers import write_adapter, write_model

ROOT = Path(__file__).resolve().parents[1]
TALK = json.dumps([{"conversations": [{"from": "human", "value": "Why?"},
                                      {"from": "gpt", "value": "Because."}]}])
FILES = {
    "prompts.txt": "Once upon a time\nOne day\n", "empty.txt": "\n", "binary.txt": b"\xff\xfe\x00",
    "plain.txt": "Some text.", "bad.jsonl": '{"prompt": "a"}\n{"prompt": \n',
    "turns.jsonl": '{"turns": 5}', "half.jsonl": json.dumps({"prompt": "a \ud83e"}),
    "talk.json": TALK, "cut.json": TALK[:-9]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    write_adapter(folder / "model" / "adapter", write_model(folder / "model"))
    for name, data in FILES.items():
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


MODEL = "--model model --dtype float32 --device cpu "
PROMPTS = MODEL + "--adapter model/adapter --new-tokens 4 --prompts "
ANSWERS = MODEL + "--out own.jsonl --data "
ABLATE = MODEL + "--out results.json --questions "
BENCH = MODEL + "--adapter model/adapter --new-tokens 4 --out results.json --questions "
# Of both programs that read a file of prompts.
BOTH = [(program, line + case, parts) for program, line in ((choose, PROMPTS), (spec_bench, BENCH))
        for case, parts in (
            ("nowhere.txt", ["nowhere.txt", "No such file"]),
            ("bad.jsonl", "bad.jsonl:2"),
            ("turns.jsonl", "turns.jsonl:1"),
            ("half.jsonl", "half.jsonl:1"),
            ("empty.txt", ["empty.txt", "no prompt"]),
            ("prompts.txt --skip 2", ["prompts.txt", "2 prompts", "--skip"]),
            ("binary.txt", ["binary.txt", "cannot be read"]),
            ("prompts.txt --new-tokens 0", "--new-tokens 0"),
            ("prompts.txt --skip 0 --temperature -1", "--temperature -1"),
            ("prompts.txt --model nowhere", ["nowhere", "--model"]),
            ("prompts.txt --adapter nowhere", "nowhere"),
            ("prompts.txt --dtype int8", "--dtype int8"),
            ("prompts.txt --colour", "--colour"))]
BESIDE = "--model model --prompts prompts.txt --python plain.txt "
CASES = BOTH + [
    (choose, PROMPTS + "prompts.txt --each 0", "--each 0"),
    (choose, PROMPTS + "prompts.txt --tree --widths 8", "--widths 8"),
    (choose, PROMPTS + "prompts.txt --tree --widths 999", "--widths 999"),
    (choose, "--prompts prompts.txt", "--model"),
    (choose, MODEL + "--prompts prompts.txt", "--adapter"),
    (choose, PROMPTS + "prompts.txt --adapter random --write", "random"),
    (choose, PROMPTS + "prompts.txt --widths 4 1", "--widths 1"),
    (choose, PROMPTS + "prompts.txt --widths 9", "--widths 9"),
    (speed, MODEL + "--repeats 0", "--repeats 0"),
    (speed, MODEL + "--widths 8 0", "--width 0"),
    (speed, MODEL + "--new-tokens 0", "--new-tokens 0"),
    (speed, MODEL + "--new-tokens 5000", "--new-tokens 5000"),
    (speed, MODEL + "--model nowhere", ["nowhere", "--model"]),
    (speed, MODEL + "--adapter nowhere", "nowhere"),
    (speed, MODEL + "--dtype int8", "--dtype int8"),
    (speed, MODEL + "--colour", "--colour"),
    (speed, "--new-tokens 4", "--model"),
    (order, "--prompts nowhere.txt", "nowhere.txt"),
    (order, "--model nowhere", "nowhere"),
    (order, "--new-tokens 0", "--new-tokens 0"),
    (authors_methods, BESIDE + "--rest .", ["--rest", "--datastore"]),
    (authors_methods, BESIDE + "--lookahead model", ["--lookahead model", "lade/decoding.py"]),
    (authors_methods, BESIDE + "--python nowhere", "--python nowhere"),
    (gpu, "--everything --tiny --out new.json --questions talk.json", "--model"),
    (gpu, "--tiny --shapes 3B", "--shapes"),
    (gpu, "--repeats 0", "--repeats 0"),
    (spec_bench, BENCH + "prompts.txt --methods rest", ["--methods rest", "--datastore"]),
    (choose, "--model model --prompts prompts.txt", "--adapter"),
    (choose, "--model model --prompts prompts.txt --methods lookup --tree", "--tree"),
    (choose, "--model model --adapter model/adapter --prompts prompts.txt --out x", "--out"),
    (rules, "--model model --adapter model/adapter --prompts prompts.txt --temperature 0",
     "--temperature 0"),
    (spec_bench, "--show done/checkpoint.pt", "checkpoint.pt"),
    (spec_bench, "--show talk.json", "talk.json"),
    (spec_bench, BENCH + "prompts.txt --steps 99", "--steps 99"),
    (ablations, ABLATE + "prompts.txt", "--data"),
    (ablations, ABLATE + "prompts.txt --data cut.json", "cut.json:1"),
    (ablations, ABLATE + "prompts.txt --data talk.json --tokens 0", "--tokens 0"),
    (ablations, ABLATE + "prompts.txt --data talk.json --limit 0", "--limit 0"),
    (ablations, ABLATE + "nowhere.txt --data talk.json --only nothing", "nowhere.txt"),
    (own_answers, ANSWERS + "nowhere.json", "nowhere.json"),
    (own_answers, ANSWERS + "cut.json", "cut.json:1"),
    (own_answers, ANSWERS + "half.jsonl --allow-truncated", "half.jsonl:1"),
    (own_answers, ANSWERS + "plain.txt", ["--batch", "no 64 conversations"]),
    (own_answers, ANSWERS + "talk.json", "no 64 conversations"),
    (own_answers, ANSWERS + "talk.json --batch 0", "--batch 0"),
    (own_answers, ANSWERS + "talk.json --model nowhere", "nowhere"),
    (own_answers, ANSWERS + "talk.json --batch 1 --out no/own.jsonl", "no/own.jsonl"),
    (own_answers, MODEL, "--data"),
    (make_stories, "--text no/stories.jsonl --count 1", "no/stories.jsonl"),
    (make_stories, "--text x --count 0", "--count 0"),
    (make_stories, "--out new --resume", ["new/checkpoint.pt", "--resume"]),
    (make_stories, "--out prompts.txt", "prompts.txt"),
    (make_stories, "--out done", ["done/checkpoint.pt", "--resume"]),
    (make_stories, "--out new --samples", "new/training.json")]


def status(program, line):
    return run_program("program", partial(program.main, line.split()))


@pytest.mark.parametrize("program, line, parts", CASES,
                         ids=[f"{case[0].__name__} {case[1]}" for case in CASES])
def test_a_mistake_is_one_line(folder, monkeypatch, capsys, program, line, parts):
    """Guards the other programs: a traceback in place of help, or a line without file or option."""
    monkeypatch.chdir(folder)
    (folder / "done").mkdir(exist_ok=True)
    (folder / "done" / "checkpoint.pt").touch()
    before = sorted(folder.rglob("*"))
    assert status(program, line) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"program: [^\n]+\n", err), err
    assert all(part in err for part in ([parts] if isinstance(parts, str) else parts)), err
    assert sorted(folder.rglob("*")) == before


def test_prompts_beyond_the_context_are_cut(folder, tmp_path, monkeypatch, capsys):
    """Guards measurements: a prompt longer than the context has no room in the cache.

    And nothing to take the median of.
    """
    config = json.loads((folder / "model" / "config.json").read_text())
    for name in ("model", "model/adapter"):
        (tmp_path / name).mkdir()
        for file in (folder / name).glob("*.*"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    short = config | {"max_position_embeddings": 64}
    (tmp_path / "model" / "config.json").write_text(json.dumps(short))
    (tmp_path / "long.txt").write_text("Once upon a time " * 40)
    monkeypatch.chdir(tmp_path)
    assert status(choose, PROMPTS + "long.txt --skip 0") == 0
    assert "1 prompts" in capsys.readouterr().out
    assert status(spec_bench, BENCH + "long.txt") == 2  # there a cut would be another question
    assert "must have from 1 to 63 (max_position_embeddings 64)" in capsys.readouterr().err


def test_choose_writes_what_it_found_best(folder, monkeypatch, capsys):
    """Guards --write: other settings than those printed, or the rest of config.json lost."""
    monkeypatch.chdir(folder)
    path = folder / "model" / "adapter" / "config.json"
    before = path.read_text()
    assert status(choose, PROMPTS + "prompts.txt --skip 0 --widths 4 --write") == 0
    out = capsys.readouterr().out
    steps, threshold = re.search(r"best: γ (\d), η ([\d.]+), width 4: ", out).groups()
    assert out.endswith(f" --width 4 --steps {steps} --threshold {threshold} --prompt …\n")
    found = {"steps": int(steps), "threshold": float(threshold), "width": 4}
    assert json.loads(path.read_text()) == json.loads(before) | found
    path.write_text(before)


def test_choose_compares_widths(folder, monkeypatch, capsys):
    """Guards --widths: drafts longer than a step has rows, or a command with another width than
    that of the best settings."""
    monkeypatch.chdir(folder)
    assert status(choose, PROMPTS + "prompts.txt --skip 0 --widths 2 4") == 0
    out = capsys.readouterr().out
    tables = re.split(r", width (?=[24];)", out)[1:]
    assert [re.findall(r"(?m)^ {7}(\d) ", table) for table in tables] == [["1"], ["1", "2", "3"]]
    width, steps = re.search(r"--width (\d) --steps (\d) ", out).groups()
    assert int(steps) < int(width) and f"best: γ {steps}, " in out and f", width {width}: " in out


def test_order_decodes_the_prompts_of_a_file(folder, monkeypatch, capsys):
    """Bugs: the file's questions taken for texts; the usual attention left on for the next dtype.

    In order of position no row may differ.
    """
    monkeypatch.chdir(folder)
    line = "--model model --adapter model/adapter --new-tokens 4 --prompts prompts.txt"
    assert status(order, line) == 0
    out, err = capsys.readouterr()
    assert len(re.findall(r"in order of position  +0 of 8 rows", out)) == 2
    assert len(re.findall(r"in order of slot", out)) == 2 and "warning" not in err


PROGRAM = """
import os, sys
from support.program import run_program
from support.terminal import say

def run():
    with open(sys.argv[1], "w") as file:
        say("for people")
        os.write(2, b"from C")
        file.write("kept")
        print("and these", file=sys.stderr)
        print("result" + "," * sys.stdout.isatty())

sys.exit(run_program("program", run))
"""
PEOPLE = "for people\nfrom Cand these\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("redirected, status, out, err", [
    ("2>&-", 0, "result\n", ""), ("<&- >&- 2>&-", 0, "", ""), (">&-", 0, "", PEOPLE),
    (">/dev/full", 2, "", PEOPLE + "program: [Errno 28] No space left on device\n")])
def test_streams_that_are_closed_or_full(tmp_path, redirected, status, out, err):
    """Guards standard output: lines for people in it. And a file that takes the place of a stream,
    a traceback, or Python's status 120, which says nothing."""
    (tmp_path / "program.py").write_text(PROGRAM)
    line = f"{sys.executable} {tmp_path / 'program.py'} {tmp_path / 'file'} {redirected}"
    done = subprocess.run(line, shell=True, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)
    assert (tmp_path / "file").read_text() == "kept"


def test_what_is_for_people_need_not_be_read(folder, monkeypatch, capsys):
    """Guards --json: an error after the last object, because the reader of the summary has left."""
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    words = [*MODEL.split(), "--json", "--prompt", "a", "--max-new-tokens", "2"]
    monkeypatch.chdir(folder)
    assert start.main(words) == 0 and json.loads(capsys.readouterr().out)["ids"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    """Guards /dev/null and pipes: as root, a file was put in the place of one."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is no file that could be replaced"):
        write_atomically(tmp_path / "pipe", b"")
    assert (tmp_path / "pipe").is_fifo()


def run_with_torch(tmp_path, instead, line):
    """A program where importing PyTorch does something else; the finished process."""
    (tmp_path / "torch.py").write_text(instead, encoding="utf-8")
    return subprocess.run([sys.executable, *line.split()], cwd=ROOT, text=True, capture_output=True,
                          stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(tmp_path)})


@pytest.mark.parametrize("line, status", [
    ("kangaroo.py --help", 0), ("kangaroo.py a --top-p 2 --temperature 1", 2),
    ("kangaroo.py a --drafter lookup --tree", 2), ("kangaroo.py a --chat none --width 99", 2),
    ("kangaroo.py a --dtype float8", 2), ("kangaroo.py --prompts absent", 2),
    ("kangaroo.py --model absent a", 2),
    ("train_adapter.py --help", 0), ("train_adapter.py --model absent --data a --out b", 2)])
def test_errors_of_the_command_line_need_no_pytorch(tmp_path, line, status):
    """Guards the second that importing it takes."""
    done = run_with_torch(tmp_path, "raise SystemExit('imported')", line)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == (status == 2), done.stderr


@pytest.mark.parametrize("program", [
    "kangaroo.py a", "bench/choose.py",
    "train_adapter.py --model models/stories --data LICENSE --out {} --exit-layer 1"])
def test_an_interruption_while_pytorch_is_imported_is_quiet(tmp_path, program):
    """Guards Ctrl-C in the first seconds, when nothing of ours has begun: a traceback."""
    done = run_with_torch(tmp_path, "raise KeyboardInterrupt", program.format(tmp_path / "out"))
    assert done.returncode in (130, -2) and done.stderr == "\ninterrupted\n", done.stderr


def test_decoding_on_a_cpu_does_not_import_the_compiler():
    """Guards start-up: nn.Embedding on the meta device imported torch._dynamo, a third of it."""
    code = ("import sys; from support.start import main; main(['a', '--device', 'cpu', "
            "'--max-new-tokens', '2']); print('torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout.endswith("False\n"), done.stderr


@pytest.mark.parametrize("module", ["llama", "kangaroo", "train_adapter", "support.decoder"])
def test_importing_is_quiet(tmp_path, module):
    """PyTorch warns of a missing NumPy, which nothing here needs: two lines about somebody else's
    files were the first that a user of the Python interface saw."""
    warns = "import warnings; warnings.warn('Failed to initialize NumPy: …'); raise SystemExit"
    done = run_with_torch(tmp_path, warns, f"-c __import__('{module}')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("module", ["llama", "kangaroo", "train_adapter", "support.decoder"])
def test_threads_do_not_wait_in_a_loop_for_long(tmp_path, module, monkeypatch):
    """Guards two programs at once, whose threads took the cores from one another: OpenMP reads how
    long they may when PyTorch is imported."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # which importing support has set here
    reads = "import os; print(os.environ['GOMP_SPINCOUNT']); raise SystemExit"
    done = run_with_torch(tmp_path, reads, f"-c __import__('{module}')")
    assert done.stdout == "3000\n", done.stderr
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert run_with_torch(tmp_path, reads, f"-c __import__('{module}')").stdout == "7\n"
