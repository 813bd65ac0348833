"""Do the tests see the bugs that this kind of code has? Run by hand, some minutes:  python tests/mutations.py

Plants each bug in a copy of the code, runs the property tests on it, and reports the first test that turned red. Fails if a
bug goes unseen, or if a line to replace is no longer there.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ["tests/test_drafter.py", "tests/test_lossless.py", "tests/test_sampling.py"]
MUTATIONS = [  # what is wrong, file, line as it is, line as it becomes
    ("verifier positions off by one", "kangaroo.py",
     "*one_shape(draft.hidden, start, cache, width)", "*one_shape(draft.hidden, start + 1, cache, width)"),
    ("adapter positions off by one", "kangaroo.py",
     "*one_shape(rows, self.seen, self.cache, self.width)", "*one_shape(rows, self.seen + 1, self.cache, self.width)"),
    ("adapter keeps rejected positions", "kangaroo.py",
     "self.seen = min(self.seen, start)", "pass"),
    ("adapter misses the last token of a full accept", "kangaroo.py",
     "self.seen = min(self.seen, start)", "self.seen = start"),
    ("verifier's noise keyed by draft index", "kangaroo.py",
     "choices = sampler.choose(logits, start + 1)", "choices = sampler.choose(logits, 0)"),
    ("drafter's noise keyed by draft index", "kangaroo.py",
     "self.sampler.choose(logits, position + 1)", "self.sampler.choose(logits, len(tokens))"),
    ("the width dropped for a single row", "llama.py",
     "positions = torch.arange(start, start + width, device=x.device)",
     "width = width if x.shape[1] > 1 else 1; positions = torch.arange(start, start + width, device=x.device)"),
    ("a draft crosses the edge of a view", "llama.py",
     "return min(width - 1, -(start + width) % KVCache.BLOCK)", "return width - 1"),
    ("the view depends on the live rows", "llama.py",
     "cache.view(start + width)", "cache.view(start + x.shape[1])"),
    ("a draft of one token too many at the end", "kangaroo.py",
     "min(steps, end - len(ids) - 1, room_for_draft(start, width))", "min(steps, end - len(ids), room_for_draft(start, width))"),
    ("the unsure token is not verified", "kangaroo.py",
     "return Draft(tokens, self.states[:, start:position + 1], confidence)",
     "return Draft(tokens[:-1], self.states[:, start:max(position, start + 1)], confidence[:-1])"),
    ("greedy takes the last of equals", "llama.py",
     "return logits.max(-1).indices", "return logits.shape[-1] - 1 - logits.flip(-1).max(-1).indices"),
]


def run_with(file, old, new):
    """The first red test of a copy of the code in which `old` stands as `new`; None if all are green."""
    with tempfile.TemporaryDirectory() as folder:
        for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "tests"]:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, Path(folder) / path.name)
        source = (ROOT / file).read_text(encoding="utf-8")
        if source.count(old) != 1:
            sys.exit(f"{file}: {old!r} stands there {source.count(old)} times, it must be once: mend tests/mutations.py")
        (Path(folder) / file).write_text(source.replace(old, new), encoding="utf-8")
        result = subprocess.run([sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *TESTS], cwd=folder,
                                capture_output=True, text=True, env=os.environ | {
            "HYPOTHESIS_PROFILE": "hurried", "HYPOTHESIS_STORAGE_DIRECTORY": folder, "OMP_NUM_THREADS": "1"})
        red = re.search(r"^FAILED (\S+)", result.stdout, re.M)
        if result.returncode not in (0, 1) or (result.returncode == 1 and not red):
            sys.exit(f"pytest itself failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
        return red and red[1]


def main():
    unseen = 0
    for name, *mutation in MUTATIONS:
        begin = time.perf_counter()
        red = run_with(*mutation)
        unseen += not red
        print(f"{'seen  ' if red else 'UNSEEN'} {time.perf_counter() - begin:4.0f} s  {name:48} {red or ''}", flush=True)
    print(f"{len(MUTATIONS) - unseen} of {len(MUTATIONS)} bugs turned a test red")
    sys.exit(bool(unseen))


if __name__ == "__main__":
    main()
