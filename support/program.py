"""How every program here begins and ends: its parser, its flags, and errors as one line.

Nothing of the algorithm.
"""
import argparse
import contextlib
import os
import re
import shutil
import sys

from support.errors import UserError
from support.terminal import say


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, as all errors are, in place of the usage
        if match := re.match("argument (--[^:]*): expected .*one argument", message):
            message += f"; if it begins with - write {match[1]}=-…"
        raise UserError(message)


def refuse_below_one(args, *names):
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")


def open_closed_streams():
    """A standard stream that was closed leads nowhere.

    Else print would take standard output for standard error, and the next file that is opened would
    be one of them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def run_program(name, run):
    """run()'s exit status, None is 0; what the user can put right ends as one line and status 2."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what cannot take a character gets a ? for it
            stream.reconfigure(errors="replace")
    try:
        status = run() or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as e:
        text, status = e.args or ("interrupted", 130)
        say(f"\n{text}")
        return status
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        return 141
    except (UserError, OSError) as e:
        say(f"{name}: {e}")
        return 2
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # Python would try again, and end with status 120
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def options(parser, title=None):
    """Two functions that add options, under a title: option(name, metavar, text, default, **more),
    and flag(name, text, *names, **more), which takes no value.

    The help tells the default; one that depends on other things is told in the text.
    """
    group = parser.add_argument_group(title) if title else parser

    def option(name, metavar, text, default=None, **more):
        text += "" if default is None else f" (default: {default})"
        group.add_argument(name, metavar=metavar, default=default, help=text, **more)

    def flag(name, text, *names, action="store_true"):
        group.add_argument(*names, name, help=text, action=action)

    return option, flag


def formatter(prog):
    """Help as wide as the terminal, up to 100 columns; line breaks of a description stay."""
    width = min(100, shutil.get_terminal_size().columns)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=23, width=width)
