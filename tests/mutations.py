"""Do the tests see the bugs that this kind of code has? Run by hand, some minutes:  python
tests/mutations.py

Plants each bug in a copy of the code, runs the property tests on it, and reports the first test
that turned red. Fails if a bug goes unseen, or if a line to replace is no longer there.
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
     "one_shape(draft.hidden, start, cache, width, draft.parents)",
     "one_shape(draft.hidden, start + 1, cache, width, draft.parents)"),
    ("adapter positions off by one", "kangaroo.py",
     "*one_shape(rows, self.seen, self.cache, self.width)",
     "*one_shape(rows, self.seen + 1, self.cache, self.width)"),
    ("adapter keeps rejected positions", "kangaroo.py",
     "self.seen += sum(node < seen for node in path)", "self.seen = max(self.seen, start + seen)"),
    ("adapter misses the last token of a full accept", "kangaroo.py",
     "self.seen += sum(node < seen for node in path)", "self.seen += len(path)"),
    ("verifier's noise keyed by draft index", "kangaroo.py",
     "choices = sampler.choose(logits, start + 1, draft.depth())",
     "choices = sampler.choose(logits, 0, draft.depth())"),
    ("drafter's noise keyed by draft index", "kangaroo.py",
     "self.sampler.candidates(logits, start + 1, [node",
     "self.sampler.candidates(logits, 0, [node"),
    ("the width dropped for a single row", "llama.py",
     "    first = 0 if parents is None else 1 + len(parents) - x.shape[1]\n",
     "    first = 0 if parents is None else 1 + len(parents) - x.shape[1]\n    width = width if x.shape[1] > 1 else 1\n"
     ),
    ("a draft crosses the edge of a view", "llama.py",
     "return min(width - 1, -(start + width) % KVCache.BLOCK)", "return width - 1"),
    ("the view depends on the live rows", "llama.py", "cache.view(start + width)",
     "cache.view(start + 1 + len(parents or []))"),
    ("a draft of one token too many at the end", "kangaroo.py",
     "min(steps, end - len(ids) - 1, room_for_draft(start, width))",
     "min(steps, end - len(ids), room_for_draft(start, width))"),
    ("the unsure token is not verified", "kangaroo.py", "nodes += sure or best", "nodes += sure"),
    ("greedy takes the last of equals", "llama.py",
     "return self.perturbed(logits, position, depth).max(-1).indices",
     "return logits.shape[-1] - 1 - self.perturbed(logits, position, depth).flip(-1).max(-1).indices"
     ),
]
TREE_TESTS = ["tests/test_tree.py"]
TREE_MUTATIONS = [
    ("the mask includes a sibling", "llama.py", "device=positions.device) > positions[:, None]",
     "device=positions.device) > positions[:, None] + (cache.slots is not None)"),
    ("RoPE's position is the slot, not the depth", "llama.py", "angle = positions[:, None].float()",
     "angle = (positions if cache is None or cache.slots is None else cache.slots)[:, None].float()"
     ),
    ("values are summed in the order of slots", "llama.py",
     "    shared = max(0, S - KVCache.BLOCK - T)\n", "    shared = max(0, S - KVCache.BLOCK - T)\n"
     "    mask = torch.full_like(rows.mask, -math.inf).scatter_reduce(1, rows.columns, rows.mask, 'amax')\n"
     "    rows = rows._replace(mask=mask, columns=torch.arange(S, device=q.device).expand(T, S))\n"
     ),
    ("a tree's rows are not moved", "llama.py",
     "kept = self.rows[:, :, :, to_device([start + node for node in path], self.rows.device)]",
     "kept = self.rows[:, :, :, start + 1:start + 1 + len(path)]"),
    ("the parents' rows are moved", "llama.py",
     "kept = self.rows[:, :, :, to_device([start + node for node in path], self.rows.device)]",
     "kept = self.rows[:, :, :, [start + node for node in (0, *path)][:-1]]"),
    ("the adapter's rows are not moved", "kangaroo.py", "        self.cache.keep(start, path)\n",
     ""),
    ("the exit states are not moved", "kangaroo.py",
     "kept = self.states[:, to_device([start + node for node in path], self.states.device)]",
     "kept = self.states[:, start + 1:start + 1 + len(path)]"),
    ("a leaf is taken for a node that the adapter has seen", "kangaroo.py",
     "self.seen += sum(node < seen for node in path)", "self.seen += len(path)"),
    ("verifier's noise keyed by node", "kangaroo.py",
     "choices = sampler.choose(logits, start + 1, draft.depth())",
     "choices = sampler.choose(logits, start + 1)"),
    ("drafter's noise keyed by node", "kangaroo.py", "[node.depth for node in rows], sure",
     "range(first, first + len(rows)), sure"),
    ("the tree grows by a node's own confidence", "kangaroo.py", "node.product * p) for", "p) for"),
    ("a child of another node is accepted", "kangaroo.py", "if edge == (node, token)), 0)",
     "if edge[1] == token and i > node), 0)"),
]
GRAPH_TESTS = ["tests/test_graphs.py"]
GRAPH_MUTATIONS = [
    ("an input is not copied before a replay", "graphs.py", "            static.copy_(tensor)\n",
     "            pass\n"),
    ("an output is not copied after a replay", "graphs.py",
     "return tuple(output.clone() for output in outputs)", "return tuple(outputs)"),
    ("the caller's tensors become the recording's", "graphs.py",
     "inputs = [tensor.clone() for tensor in tensors]", "inputs = list(tensors)"),
    ("recordings are kept after the cache grew", "graphs.py",
     "                self.graphs.forget(memory.rows)\n", ""),
    ("a recording of another view is replayed", "graphs.py", "tuple(x.shape), length, len(columns)",
     "tuple(x.shape), len(columns)"),
    ("a recording of other layers is replayed", "graphs.py", 'self.step(("layers", first, last), ',
     'self.step(("layers",), '),
    ("a recording keeps the first tree's slots", "graphs.py",
     "view.slots, view.columns = slots, columns",
     "view.slots, view.columns = cache.slots, columns"),
    ("a recording keeps the first tree's columns", "graphs.py",
     "view.slots, view.columns = slots, columns",
     "view.slots, view.columns = slots, cache.columns"),
    ("two texts write to one cache", "graphs.py",
     "if config in self.lent and self.lent[config]() is not None:", "if False:"),
    ("a text finds the rows of the last", "graphs.py", "        memory.rows.zero_()",
     "        pass"),
    ("the temperature is not in the key", "graphs.py", "unused.sampler.temperature, ", ""),
    ("a copy from pageable memory", "llama.py", "to_device(depth, x.device) + start",
     "torch.tensor(depth).to(x.device) + start"),
]


def run_with(tests, file, old, new):
    """The first red test of a copy of the code in which `old` stands as `new`; None if all are
    green."""
    with tempfile.TemporaryDirectory() as folder:
        for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "tests"]:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, Path(folder) / path.name)
        source = (ROOT / file).read_text(encoding="utf-8")
        if source.count(old) != 1:
            sys.exit(
                f"{file}: {old!r} stands there {source.count(old)} times, it must be once: mend tests/mutations.py"
            )
        (Path(folder) / file).write_text(source.replace(old, new), encoding="utf-8")
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests], cwd=folder,
            capture_output=True, text=True, env=os.environ | {
                "HYPOTHESIS_PROFILE": "hurried", "HYPOTHESIS_STORAGE_DIRECTORY": folder,
                "OMP_NUM_THREADS": "1"
            })
        red = re.search(r"^FAILED (\S+)", result.stdout, re.M)
        if result.returncode not in (0, 1) or (result.returncode == 1 and not red):
            sys.exit(f"pytest itself failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
        return red and red[1]


def main():
    suites = (TESTS, MUTATIONS), (TREE_TESTS, TREE_MUTATIONS), (GRAPH_TESTS, GRAPH_MUTATIONS)
    unseen, all_mutations = 0, [(tests, *mutation)
                                for tests, mutations in suites
                                for mutation in mutations]
    for tests, name, *mutation in all_mutations:
        begin = time.perf_counter()
        red = run_with(tests, *mutation)
        unseen += not red
        print(
            f"{'seen  ' if red else 'UNSEEN'} {time.perf_counter() - begin:4.0f} s  {name:52} {red or ''}",
            flush=True)
    print(f"{len(all_mutations) - unseen} of {len(all_mutations)} bugs turned a test red")
    sys.exit(bool(unseen))


if __name__ == "__main__":
    main()
