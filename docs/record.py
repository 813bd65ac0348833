"""Records vanilla decoding and Kangaroo, and draws their race as an animated picture.

    python docs/record.py --out docs/race.svg [--prompt TEXT] [--new-tokens N] [--runs N]

Both write the same text. A drafted token appears, dim, when the drafter has it; when the model has
verified it, it turns green, or gives way to the model's own. All times are measured in this run: of
several decodes of each, taking turns, the one of median length. The picture is slower by a factor,
which it names. It moves by CSS alone, and stands still at the end for who wants less motion.
"""
import argparse
import sys
import time
from html import escape
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.decoder import load
from support.errors import UserError
from support.files import write_atomically
from support.program import Parser, run_program
from support.watch import WatchedDrafter

import torch

COLUMNS, SIZE, LINE, PANE = 42, 14, 21, 400  # a pane's characters a line; the others in pixels
CHAR, MARGIN, TOP = 0.6 * SIZE, 20, 76
PLAY, REST = 9.0, 4.0  # seconds that the slower one takes in the picture, and of rest after it


# --------------------------------------------------------------------------------------------------
# The recording

class Round(NamedTuple):
    tokens: list    # the ids that were committed
    accepted: int   # how many of them were drafted
    draft: list     # the drafted ids
    drafted: list   # seconds since the beginning, of each drafted token
    verified: float


def record(decoder, ids, method, new_tokens):
    """[Round] of a decode."""
    settings, grown, rounds = decoder.settings(method), [], []
    drafter = WatchedDrafter(decoder.drafter(method, settings),
                           lambda tokens: grown.append((len(tokens), time.perf_counter())))
    begin = time.perf_counter()
    for round_ in decoder.rounds(ids, drafter, new_tokens, settings=settings):
        now, draft = time.perf_counter(), round_.draft.tokens
        first = [next(t for n, t in grown if n > i) - begin for i in range(len(draft))]
        rounds.append(Round(round_.tokens, round_.accepted, draft, first, now - begin))
        grown.clear()
    return rounds


def recorded(decoder, ids, new_tokens, runs):
    """{method: [Round]}: of each the run of median length, after one to warm up."""
    methods = "none", "kangaroo"
    found = [{method: record(decoder, ids, method, new_tokens) for method in methods}
             for _ in range(1 + runs)][1:]
    return {method: sorted((run[method] for run in found), key=lambda rounds: rounds[-1].verified)
            [runs // 2] for method in methods}


# --------------------------------------------------------------------------------------------------
# The picture

class Piece(NamedTuple):
    """A token in a pane, seen from one second on, and a draft until another."""
    text: str
    row: int
    column: int
    kind: str  # own, drafted; draft
    start: float
    end: float = None


def places(text):
    """(row, column) of each character, wrapped at words, and of the end."""
    found, row, column = [], 0, 0
    for i, char in enumerate(text):
        word = len(text[i:].split(maxsplit=1)[0]) if text[i:].strip() else 0
        begins = i == 0 or text[i - 1].isspace()
        if begins and not char.isspace() and column + word > COLUMNS:
            row, column = row + 1, 0
        found.append((row, column))
        row, column = (row + 1, 0) if char == "\n" else (row, column + 1)
    return [*found, (row, column)]


def pieces(decoder, ids, rounds):
    """[Piece] of a decode, and its number of rows."""
    decode, done, found = decoder.tokenizer.decode, list(ids), []
    text = decode(ids + [token for round_ in rounds for token in round_.tokens])
    at = places(text)

    def put(before, token, kind, start, end=None, place=None):
        head = len(decode(before))
        label = decode([*before, token])[head:]
        blank = len(label) - len(label.lstrip())
        row, column = (place[0], place[1] + blank) if place else at[min(head + blank, len(at) - 1)]
        label = label.strip()[:max(0, COLUMNS - column)]
        if label:
            found.append(Piece(label, row, column, kind, start, end))
        return row, column + len(label)

    for round_ in rounds:
        place = None  # where the text will be, as far as a draft is accepted; then one by one
        for i, (token, start) in enumerate(zip(round_.draft, round_.drafted)):
            before = done + round_.draft[:i]
            if i == round_.accepted:
                place = at[len(decode(before))]
            after = put(before, token, "draft", start, round_.verified, place)
            place = after if place else None
        for i, token in enumerate(round_.tokens):
            put(done, token, "drafted" if i < round_.accepted else "own", round_.verified)
            done.append(token)
    head = [Piece(word, *at[i], "prompt", 0.0) for i, word in words(decode(ids))]
    return head + found, at[-1][0] + 1


def words(text):
    """(where it begins, word) of each word."""
    i = 0
    for word in text.split():
        i = text.index(word, i)
        yield i, word
        i += len(word)


STYLE = """
svg { --page: #fff; --ink: #1d2129; --soft: #5b6270; --line: #dcdad3; --green: #14733f;
  --blue: #1668b8; }
@media (prefers-color-scheme: dark) { svg { --page: #14161b; --ink: #eceef2; --soft: #a5adba;
  --line: #353a45; --green: #6fd39a; --blue: #6cb2f5; } }
.page { fill: var(--page); stroke: var(--line); }
text { font: SIZEpx ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  fill: var(--ink); white-space: pre; }
.prompt, .note { fill: var(--soft); } .drafted { fill: var(--green); }
.draft { fill: var(--soft); opacity: 0; font-style: italic; }
.title { font: 600 17px system-ui, sans-serif; } .note { font: 13px system-ui, sans-serif; }
.track { fill: var(--line); } .bar { fill: var(--soft); transform-box: fill-box; }
.fast { fill: var(--green); }
@media (prefers-reduced-motion: reduce) { * { animation: none !important; } }
""".replace("SIZE", str(SIZE))


class Clock:
    """CSS for elements that are seen from one measured second to another, in a loop."""

    def __init__(self, slower, total):
        self.slower, self.total, self.rules = slower, total, {}

    def percent(self, seconds):
        return f"{100 * seconds * self.slower / self.total:.2f}%"

    def seen(self, start, end=None):
        """The class of what appears at `start`, and disappears at `end` or where the loop does."""
        until = "98%" if end is None else self.percent(end)
        frames = f"0%{{opacity:0}}{self.percent(start)}{{opacity:1}}{until}{{opacity:0}}"
        return self.rule(frames + "to{opacity:0}", "step-end")

    def grown(self, end):
        """The class of a bar that grows until `end`."""
        return self.rule(f"0%{{transform:scaleX(0)}}{self.percent(end)},98%{{transform:none}}"
                         "98.01%,to{transform:scaleX(0)}", "linear")

    def rule(self, frames, timing):
        return self.rules.setdefault((frames, timing), f"a{len(self.rules)}")

    def css(self):
        return "\n".join(f"@keyframes {name}{{{frames}}}.{name}{{animation:{name} "
                         f"{self.total:.1f}s {timing} infinite}}"
                         for (frames, timing), name in self.rules.items())


def draw(decoder, ids, runs):
    """The picture of {method: [Round]}, as text."""
    seconds = {method: rounds[-1].verified for method, rounds in runs.items()}
    slower = PLAY / max(seconds.values())
    clock, body, rows = Clock(slower, PLAY + REST), [], 0
    for pane, (method, rounds) in enumerate(runs.items()):
        x, took = MARGIN + pane * PANE, seconds[method]
        name = "Kangaroo" if method == "kangaroo" else "Vanilla decoding"
        found, height = pieces(decoder, ids, rounds)
        rows = max(rows, height)
        length = (PANE - 2 * MARGIN) * took / max(seconds.values())
        body += [
            f'<text class="title" x="{x}" y="34">{name}</text>',
            f'<text class="note {clock.seen(took)}" x="{x + PANE - 2 * MARGIN}" y="34" '
            f'text-anchor="end">{took:.2f} s · {len(rounds)} rounds</text>',
            f'<rect class="track" x="{x}" y="45" width="{PANE - 2 * MARGIN}" height="6" rx="3"/>',
            f'<rect class="bar {"fast " * pane}{clock.grown(took)}" x="{x}" y="45" '
            f'width="{length:.1f}" height="6" rx="3"/>']
        for piece in found:
            kind = piece.kind
            if kind != "prompt":
                kind += " " + clock.seen(piece.start, piece.end)
            body.append(f'<text class="{kind}" x="{x + piece.column * CHAR:.1f}" '
                        f'y="{TOP + piece.row * LINE}" textLength="{len(piece.text) * CHAR:.1f}">'
                        f'{escape(piece.text, quote=False)}</text>')
    tokens = sum(len(round_.tokens) for round_ in runs["none"])
    dtype, threads = str(decoder.dtype).removeprefix("torch."), torch.get_num_threads()
    notes = ("Grey: drafted. Green: drafted and accepted. Plain: the model's own.",
             f"{tokens} tokens of the model {decoder.folder.name} on a CPU ({dtype}, threads: "
             f"{threads}), one measured run each, stretched in time by {slower:.2g}.")
    width, height = MARGIN + 2 * PANE, TOP + rows * LINE + 42
    label = (f"Vanilla decoding and Kangaroo write the same {tokens} tokens side by side: vanilla "
             f"decoding takes {seconds['none']:.2f} s and {len(runs['none'])} rounds, Kangaroo "
             f"{seconds['kangaroo']:.2f} s and {len(runs['kangaroo'])}. Drafted tokens appear grey "
             "and turn green when the model accepts them, or are replaced.")
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-labelledby="title">',
        f'<title id="title">{escape(label)}</title>', f"<style>{STYLE}{clock.css()}</style>",
        f'<rect class="page" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="12"/>',
        *body, *(f'<text class="note" x="{MARGIN}" y="{height - 34 + 20 * i}">{escape(note)}</text>'
                 for i, note in enumerate(notes)),
        "</svg>", ""])


def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--out", type=Path, required=True, help="the picture's file")
    option("--prompt", default="Once upon a time", help="default: %(default)s")
    option("--new-tokens", type=int, default=96, help="default: %(default)s")
    option("--runs", type=int, default=5, help="decodes of each method, default: %(default)s")
    args = parser.parse_args(argv)
    if args.runs < 1 or args.new_tokens < 1:
        raise UserError("--runs and --new-tokens must be at least 1")
    if not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: must be in a folder that exists")
    return args


def main(args):
    decoder = load(device="cpu")
    ids = decoder.encode(args.prompt)
    runs = recorded(decoder, ids, args.new_tokens, args.runs)
    texts = [[token for round_ in rounds for token in round_.tokens] for rounds in runs.values()]
    if texts[0] != texts[1]:
        raise SystemExit("the two texts differ")
    write_atomically(args.out, draw(decoder, ids, runs).encode())
    for method, rounds in runs.items():
        print(f"{method}: {len(texts[0])} tokens in {rounds[-1].verified:.3f} s, "
              f"{len(rounds)} rounds")
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    sys.exit(run_program("record.py", lambda: main(parse_arguments(None))))
