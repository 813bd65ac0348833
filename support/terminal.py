"""What is printed: lines for people, text in colour, and drafts that can be wiped again.

    say, status           a line for people, on standard error; one until there is something else
    Screen.write, .show   text that stays, on standard output
    Screen.draft          a draft, dim, behind it; the next text wipes it

A draft goes to standard error, if both are one terminal: so standard output is the text, whether or
not drafts are shown. A draft never reaches the end of its line, so wiping it is a step to the left
and to erase what follows; nothing depends on where the terminal wraps or scrolls. What does not fit
is not shown, a line break is ↵, and what has no certain width is ·. Control characters of a text
never reach a terminal, which would obey them. Nothing of the algorithm.
"""
import contextlib
import os
import shutil
import sys
import unicodedata

GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"
WIPE = "\r\033[K"  # the line that the cursor is on
# Control characters, as signs: ␛ and so on; those from 128 on have none.
SIGNS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
SIGNS |= {127: "␡"} | {code: f"\\x{code:x}" for code in range(128, 160)}


def is_terminal(stream):
    """Whether a stream is a terminal that knows escape sequences."""
    return (stream is not None and stream.isatty()
            and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown"))


def harmless(text, stream):
    """The text, with signs for control characters if the stream is any terminal."""
    return text.translate(SIGNS) if stream is not None and stream.isatty() else text


# --------------------------------------------------------------------------------------------------
# Lines for people

standing = False  # whether a status is on the screen


def to_people(text, end=""):
    """Print on standard error. That nobody reads it ends nothing."""
    if sys.stderr is not None:  # print would take standard output in its place
        with contextlib.suppress(OSError, ValueError):  # no reader any more; closed; a full disk
            print(text, end=end, file=sys.stderr, flush=True)


def say(text, style=""):
    """A line that stays."""
    wipe_status()
    text = harmless(text, sys.stderr)
    to_people(style + text + PLAIN if style and in_colour(sys.stderr) else text, "\n")


def status(text):
    """On a terminal: a line that stands there until something else is said or `wipe_status`."""
    global standing
    if is_terminal(sys.stderr):  # what wraps could not be wiped
        standing = True
        to_people(WIPE + harmless(text, sys.stderr)[:shutil.get_terminal_size().columns - 1])


def wipe_status():
    global standing
    if standing:
        to_people(WIPE)
        standing = False


# --------------------------------------------------------------------------------------------------
# The text

def in_colour(stream):
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


class Screen:
    """Standard output, and where its cursor stands. What is wanted: drafts, or nothing at all."""

    def __init__(self, show_drafts=False, silent=False):
        self.silent, self.colour = silent, in_colour(sys.stdout)
        self.drafts = show_drafts and self.colour and one_terminal()
        self.column = self.drafted = 0  # of the cursor; of the draft behind it

    def write(self, text, style=""):
        """Print text that stays, where a draft was."""
        self.wipe()
        text = harmless(text, sys.stdout)
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
            to_people(DIM + shown + PLAIN)

    def wipe(self):
        if self.drafted:
            to_people(f"\033[{self.drafted}D\033[K")
            self.drafted = 0


def one_terminal():
    """Whether both outputs are one terminal."""
    try:
        return os.ttyname(sys.stdout.fileno()) == os.ttyname(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # no terminal; a stream without a file
        return False


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
