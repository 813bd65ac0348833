"""What is printed: lines for people, text in colour, and drafts that can be wiped again.

    say                   a line for people, on standard error
    Screen.write, .show   text that stays, on standard output
    Screen.draft          a draft, dim, behind it; the next text wipes it

A draft goes to standard error, if both are one terminal: so standard output is the text, whether or
not drafts are shown. A draft never reaches the end of its line, so wiping it is a step to the left
and to erase what follows; nothing depends on where the terminal wraps or scrolls. What does not fit
is not shown, a line break is ↵, and what has no certain width is ·. Nothing of the algorithm.
"""
import contextlib
import os
import shutil
import sys
import unicodedata

GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"


def say(text, end="\n"):
    """A line for people, on standard error. That nobody reads it ends nothing."""
    if sys.stderr is not None:  # print would take standard output in its place
        with contextlib.suppress(OSError, ValueError):  # no reader any more; closed; a full disk
            print(text, end=end, file=sys.stderr, flush=True)


class Screen:
    """Standard output, and where its cursor stands. What is wanted: drafts, or nothing at all."""

    def __init__(self, show_drafts=False, silent=False):
        self.silent = silent
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.drafts = show_drafts and self.colour and can_wipe()
        self.column = self.drafted = 0  # of the cursor; of the draft behind it

    def write(self, text, style=""):
        """Print text that stays, where a draft was."""
        self.wipe()
        if text and not self.silent:
            print(style + text + PLAIN if self.colour and style else text, end="", flush=True)
        if self.drafts:
            self.column = column_after(text, self.column, shutil.get_terminal_size().columns)

    def show(self, text, drafted):
        """Print a piece of the text, green if it was drafted."""
        self.write(text, GREEN if drafted else "")

    def draft(self, text):
        """Show a draft in the place of the one before."""
        if not self.drafts:
            return
        self.wipe()
        # Behind the last column a terminal may have wrapped or not.
        room, shown = shutil.get_terminal_size().columns - 1 - self.column, ""
        for char in map(certain, text):
            if self.drafted + width(char) > room:
                break
            shown, self.drafted = shown + char, self.drafted + width(char)
        if shown:
            print(DIM + shown + PLAIN, end="", file=sys.stderr, flush=True)

    def wipe(self):
        if self.drafted:
            print(f"\033[{self.drafted}D\033[K", end="", file=sys.stderr, flush=True)
            self.drafted = 0


def can_wipe():
    """Whether both outputs are one terminal, which can move its cursor."""
    try:
        same = os.ttyname(sys.stdout.fileno()) == os.ttyname(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # no terminal; a stream without a file
        return False
    return same and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


def width(char):
    """The columns of a character: 0, 1 or 2."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def certain(char):
    """A character of a draft, or one that stands for it: a mark, a control or none at all."""
    if char == "\n":
        return "↵"
    return "·" if unicodedata.category(char)[0] in "CM" else char


def column_after(text, column, columns):
    """Where the cursor stands after text; `columns` is behind the last one, before it wraps."""
    for char in text:
        if char in "\r\n":
            column = 0
        elif char == "\t":
            column = min(column // 8 * 8 + 8, columns - 1)
        elif column + width(char) > columns:
            column = width(char)
        else:
            column += width(char)
    return column
