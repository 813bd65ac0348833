"""Do the tests see the bugs that this kind of code has? Run by hand, some minutes.

    python tests/mutations.py [WORD …]     # all, or those whose names hold one of the words

Each file of tests/bugs lists what the tests of the same name must see: what is wrong, in which
file, a line as it is, as it becomes. Plants each bug in a copy of the code, two at a time, and
reports the first test that turned red. Fails if a bug goes unseen.
"""
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUGS = [(f"tests/test_{path.stem}.py", *bug)
        for path in sorted((ROOT / "tests" / "bugs").glob("*.py"))
        for bug in runpy.run_path(str(path))["BUGS"]]


def mutated(file, old, new):
    """The text of a file in which `old` stands as `new`."""
    source = (ROOT / file).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{file}: {old!r} stands there {source.count(old)} times"
    return source.replace(old, new)


def run_with(tests, file, old, new):
    """The first red test of a copy of the code so changed; None if all are green."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("bench", "drafters", "support", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        for name in ("docs", "models"):
            (Path(folder) / name).symlink_to(ROOT / name)
        for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
            shutil.copy(path, folder)
        (Path(folder) / file).write_text(mutated(file, old, new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", tests]
        env = os.environ | {"HYPOTHESIS_PROFILE": "hurried",
                            "HYPOTHESIS_STORAGE_DIRECTORY": folder}
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
        red = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.M)
        if result.returncode not in (0, 1) or (result.returncode == 1 and not red):
            sys.exit(f"pytest itself failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
        return red and red[1]


def seen(bug):
    """Plant it, and say whether a test turned red."""
    begin = time.perf_counter()
    tests, name, *mutation = bug
    red = run_with(tests, *mutation)
    seconds = time.perf_counter() - begin
    print(f"{'seen  ' if red else 'UNSEEN'} {seconds:4.0f} s  {name:52} {red or tests}", flush=True)
    return bool(red)


def main(words):
    """Plant the bugs whose names hold one of the words, or all."""
    bugs = [bug for bug in BUGS if not words or any(word in bug[1] for word in words)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(seen, bugs))
    print(f"{sum(found)} of {len(bugs)} bugs turned a test red")
    sys.exit(not all(found))


if __name__ == "__main__":
    main(sys.argv[1:])
