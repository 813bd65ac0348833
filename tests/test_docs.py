"""The docs point at what is there: links, functions, tests and options that they name; their
experiment runs."""
import re
from pathlib import Path
from xml.etree import ElementTree

from drafters.table import DRAFTERS
from llama import Sampler
from support import replay
from support.decoder import load

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = {
    path: path.read_text(encoding="utf-8")
    for path in ROOT.glob("**/*.py")
    if ".venv" not in path.parts
}


def anchors(path):
    """The anchors that GitHub gives a page's headings, and those written out above them."""
    text = path.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles} | set(
        re.findall(r'<a id="([\w-]+)"></a>', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    """Files, headings, and functions by name: [`Class.method`](file.py) is defined in that file."""
    text = page.read_text(encoding="utf-8")
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists() and ROOT in [file, *file.parents], f"{page.name}: {target}"
        if file.suffix == ".html":  # of the replay page: the methods whose traces it shows
            assert set(anchor.split(",")) <= {
                "", *DRAFTERS}, f"{page.name}: {target}"
        else:
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}"
        symbols = re.findall(r"`([A-Za-z_][\w.]*)`", label) if file.suffix == ".py" else []
        for part in (part for symbol in symbols if not symbol.endswith(".py")
                     for part in symbol.split(".")):
            assert re.search(rf"^ *(class|def) {part}\b", CODE[file],
                             re.MULTILINE), f"{page.name}: {label}"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda path: path.name)
def test_a_page_is_on_the_path(page):
    """What one can do after it, something to try, the next page; docs/README.md says when."""
    text = page.read_text(encoding="utf-8")
    assert text.split("\n\n")[1].startswith("After this page you "), page.name
    assert "\n**Try**: " in text, page.name
    assert re.match(r"Next: \[[^\]]+\]\(\w+\.md\)\.$", text.splitlines()[-1]), page.name
    path = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert page.name == "README.md" or f"({page.name})" in path, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_names_exist(page):
    """Tests and options that a page names."""
    text, everything = page.read_text(encoding="utf-8"), "\n".join(CODE.values())
    for test in re.findall(r"\btest_\w+\b(?!\.py)", text):
        assert f"def {test}(" in everything, f"{page.name}: {test}"
    for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+",
                             re.sub(r"(?m)^(pip|hf|torchrun|python -m) (.*\\\n)*.*$", "", text)):
        assert f'"{option}"' in everything or option in (
            "--local-dir", "--nproc-per-node"), f"{page.name}: {option}"


def test_the_experiment_runs(capsys):
    """The experiment of docs/lossless.md prints a line a dtype and function; with one row nothing
    differs."""
    code = re.search(r"```python\n(.*?)```",
                     (ROOT / "docs" / "lossless.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(
        re.search(r"n = 1 … 8: \[0(, \d+){7}\] of \d+ values differ$", line) for line in lines)


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_interface_of_the_docs(capsys):
    """docs/usage.md's lines on use from Python, as they stand: they print the text and a
    compression rate, and the ids are vanilla's."""
    space = {}
    exec(python_blocks("docs/usage.md")[0], space)
    out = capsys.readouterr().out
    assert "Once upon a time" in out
    decoder, ids = space["decoder"], space["statistics"]["ids"]
    vanilla = decoder.rounds(decoder.encode("Once upon a time"), "none", max_new_tokens=len(ids),
                             sampler=Sampler(0.8, seed=1))
    assert [token for r in vanilla for token in r.tokens] == ids


def test_the_drafter_of_the_docs(capsys):
    """docs/drafters.md: the worked drafter runs, gives vanilla's ids, in fewer rounds."""
    space = {}
    for block in python_blocks("docs/drafters.md"):
        exec(block, space)
    assert "identical to vanilla: True" in capsys.readouterr().out
    assert len(space["rounds"]) < sum(len(r.tokens) for r in space["rounds"])


def test_the_pictures_are_self_contained():
    """SVG files without scripts, fonts or images from elsewhere, with a title for screen readers
    and colours for the dark."""
    pictures = list((ROOT / "docs").glob("*.svg"))
    assert pictures
    for path in pictures:
        text = path.read_text(encoding="utf-8")
        assert "<title" in text
        assert not re.search(r"<script|href|url\((?!#)|@import|@font-face", text), path


def test_the_recording_shows_both_texts(monkeypatch):
    """docs/record.py: what is seen at the end is the text, in both panes and without overlaps;
    times go up. The committed picture is small enough for a front page."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import record

    decoder = load(device="cpu")
    ids = decoder.encode("Once upon a time")
    runs = record.recorded(decoder, ids, 24, 1)
    text = decoder.tokenizer.decode(
        ids + [token for round_ in runs["none"] for token in round_.tokens])
    for rounds in runs.values():
        found, _ = record.pieces(decoder, ids, rounds)
        seen = sorted((p.row, p.column, p.text) for p in found if p.kind != "draft")
        assert "".join(word for *_, word in seen) == "".join(text.split())
        assert all(a[0] < b[0] or a[1] + len(a[2]) <= b[1] for a, b in zip(seen, seen[1:]))
        drafts = [p for p in found if p.kind == "draft"]
        assert bool(drafts) == (rounds is runs["kangaroo"])
        assert all(0 < p.start < p.end for p in drafts)
        assert all(p.column + len(p.text) <= record.COLUMNS for p in found)
    picture = ElementTree.fromstring(record.draw(decoder, ids, runs))
    assert len(picture.findall(".//{*}title")) == 1
    assert (ROOT / "docs" / "race.svg").stat().st_size < 300_000


def test_the_example_page_is_of_today():
    """The committed page has today's template around its data; `python docs/make.py` writes it."""
    path = ROOT / "docs" / "example.html"
    traces = replay.read_page(path)
    assert replay.page(traces) == path.read_text(encoding="utf-8")
    assert len({trace["text"] for trace in traces}) == 1 and all(t["identical"] for t in traces)
