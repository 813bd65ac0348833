"""Files in and out: JSON, and writing that is never seen half done. Needs no PyTorch."""
import json
import os
import re
import secrets
import shutil
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
    """Write bytes so that at any moment `path` holds all of the old ones or all of the new ones.

    Of two writers at once the later wins. Nothing is left of a write that fails.
    """
    path = Path(path)
    require(path.is_file() or not path.exists(), f"{path}: is no file that could be replaced")
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # no other writer's
    try:
        try:
            with open(part, "xb") as file:
                if os.path.isfile(path):
                    shutil.copymode(path, part)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:  # a half that stayed would keep a full disk full
            part.unlink(missing_ok=True)
    except OSError as e:
        kept = "; the one before is kept" if os.path.isfile(path) else ""
        raise UserError(f"{path}: cannot be written ({e.strerror}){kept}") from None


def remove_parts(folder):
    """Remove what writers that were killed have left in a folder that no other one writes to."""
    for part in Path(folder).glob(f"*.{'[0-9a-f]' * 8}.tmp"):
        part.unlink()


def lock(file, wait=True):
    """Whether an open file or folder is this process's alone, until it is closed or that ends.

    What cannot be locked, as on Windows or on some file systems, counts as its own.
    """
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def require_folder(folder, flag, wanted="a Hugging Face folder, with config.json and weights"):
    """UserError unless there is such a folder; of a name on the Hugging Face hub it tells how to
    get it."""
    hint, name = "", str(folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).parent.is_dir():
        hint = f"; to fetch it: hf download {name} --local-dir {Path(name).name}"
    require(Path(folder).is_dir(), f"{folder}: no such folder, {flag} wants {wanted}{hint}")
    files = "config.json", "adapter_config.json"  # the second, a LoRA's, is refused by its own name
    require(any((Path(folder) / name).exists() for name in files),
            f"{folder}: holds no config.json, {flag} wants {wanted}")
