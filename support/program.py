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


def run_program(name, run, interrupted="interrupted"):
    """run()'s exit status, None is 0; what the user can put right ends as one line and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what cannot take a character gets a ? for it
            stream.reconfigure(errors="replace")
    try:
        return run() or 0
    except KeyboardInterrupt:
        say(f"\n{interrupted}")
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError) as e:
        say(f"{name}: {e}")
        return 2


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
