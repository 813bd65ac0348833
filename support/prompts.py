"""Prompts: of the command line, of standard input, of a file. Needs no PyTorch.

    the command line, or a file -> conversations: what the user says, turn by turn
"""
import json
import re
import sys
from pathlib import Path

from support.errors import UserError, require

MARK = "\ufeff"  # a byte order mark, which some editors and shells put before a text


def read_conversations(prompt, file):
    """The turns of --prompt, or of each entry of the file --prompts: lists of texts, none empty."""
    return [turns_of(prompt)] if prompt is not None else [
        turns for _, turns, _ in read_prompts(file, "--prompts ")]


def turns_of(prompt):
    """The one turn of a prompt; "-" is standard input."""
    try:
        prompt = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
        prompt = prompt.removeprefix(MARK)
    except UnicodeError as e:
        raise UserError(f"the prompt is not UTF-8 ({e})") from None
    check_text(prompt)
    return [prompt]


def check_text(text):
    require(text.strip(), "the prompt is empty, it must be some text")
    try:
        text.encode()  # bytes of the command line that are not UTF-8 become lone surrogates
    except UnicodeError as e:
        raise UserError(f"the prompt is not UTF-8 ({e})") from None


def read_prompts(file, flag=""):
    """[(number, turns, entry)] of a file: a text a line, or a JSON object with `prompt`, or with
    Spec-Bench's `turns`, a line; or a JSON list of texts or of such objects.

    number: of the line, or of the element of the list, from 1 on. entry: the object, or {}.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{flag}{file}: cannot be read "
                        f"({getattr(e, 'strerror', None) or e})") from None
    if str(file).endswith(".json") or re.match(r'\s*\[\s*(["{\]]|$)', text):
        entries = read_value(text, file)
        require(isinstance(entries, list), f"{flag}{file}: wants a JSON list of prompts")
        found = [(i, entry, f"{file}, entry {i}") for i, entry in enumerate(entries, 1)]
    else:
        lines = [(i, line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        is_json = str(file).endswith(".jsonl") or lines and lines[0][1].startswith("{")
        found = [(i, read_value(line, f"{file}:{i}") if is_json else line, f"{file}:{i}")
                 for i, line in lines]
    require(found, f"{flag}{file}: holds no prompt")
    return [(i, json_turns(entry, where), entry if isinstance(entry, dict) else {})
            for i, entry, where in found]


def read_value(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid JSON ({e})") from None


def json_turns(entry, where):
    """What the user says in a text, or in an object: a list of texts, most often of one."""
    if isinstance(entry, dict):
        turns = [entry["prompt"]] if entry.get("prompt") else entry.get("turns")
    else:
        turns = [entry]
    require(isinstance(turns, list) and turns and all(map(is_text, turns)),
            f"{where}: wants a text, or an object with a text `prompt`, or with `turns`, a list of "
            "texts")
    return turns


def is_text(turn):
    """A lone surrogate, which JSON can escape, is no text."""
    return isinstance(turn, str) and turn.strip() and not any(
        "\ud800" <= c <= "\udfff" for c in turn)
