"""Files in and out: JSON, and writing that is never seen half done. Needs no PyTorch."""
import json
import os
import re
from pathlib import Path

from support.errors import UserError, require


def read_json(path):
    """The object in a JSON file, as a dict."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a JSON {type(data).__name__}, an object is needed")
    return data


def write_json(path, data):
    write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())


def write_atomically(path, data):
    """Write bytes so that at any moment `path` holds all of the old ones or all of the new ones."""
    path = Path(path)
    try:
        with open(path.with_name(path.name + ".tmp"), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None


def require_folder(folder, flag, wanted="a Hugging Face folder, with config.json and weights"):
    """UserError unless there is such a folder; of a name on the Hugging Face hub it tells how to
    get it."""
    hint, name = "", str(folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).parent.is_dir():
        hint = f"; to fetch it: hf download {name} --local-dir {Path(name).name}"
    require(Path(folder).is_dir(), f"{folder}: no such folder, {flag} wants {wanted}{hint}")
