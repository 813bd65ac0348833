"""The house: which room may use which, and how wide a line is."""
import ast
from functools import cache
from pathlib import Path

import pytest
from mutations import BUGS, mutated

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ["llama", "kangaroo", "drafters", "support", "train_adapter", "bench"]
TOP = "models", "docs", "tests"  # on the top floor too
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for folder in ("", "drafters", "support", "bench", "models", "docs")
         for path in (ROOT / folder).glob("*.py")}


@cache
def imports(path):
    """The modules of ours that a file imports when it is imported, or in a function."""
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.If) and "__main__" in ast.dump(node.test):
            continue  # what runs a file as a program is no part of what it is
        for part in ast.walk(node):
            if isinstance(part, ast.ImportFrom):
                names = [part.module, *(f"{part.module}.{alias.name}" for alias in part.names)]
            elif isinstance(part, ast.Import):
                names = [alias.name for alias in part.names]
            else:
                continue
            found |= {name for name in names if name in FILES and FILES[name] != path}
    return found


@cache
def needed(module):
    """All that a module imports, by whatever way."""
    found, new = set(), {module}
    while new:
        new = set().union(*(imports(FILES[name]) for name in new)) - found
        found |= new
    return found


def floor(module):
    """A module of support/ that needs llama.py at most stands beside that. A program that trains
    stands beside train_adapter.py."""
    room = module.split(".")[0]
    if room == "support" and all(name.startswith(("llama", "support.")) for name in needed(module)):
        return FLOORS.index("llama")
    if module == "drafters.train_medusa":
        return FLOORS.index("train_adapter")
    return len(FLOORS) - 1 if room in TOP else FLOORS.index(room)


@pytest.mark.parametrize("module", FILES)
def test_dependencies_run_one_way(module):
    """llama ← kangaroo ← drafters ← support ← train_adapter ← bench, models, docs."""
    for other in imports(FILES[module]):
        assert floor(other) <= floor(module), f"{module} imports {other}"


def test_the_three_files_need_no_other_room():
    """llama.py needs leaves alone; kangaroo.py needs llama.py besides, and what begins it as a
    program."""
    leaves = {module for module, path in FILES.items() if imports(path) <= {"support.errors"}}
    assert imports(FILES["llama"]) <= leaves
    assert imports(FILES["kangaroo"]) - leaves == {"llama"}


@pytest.mark.parametrize("name, lines", [("kangaroo", 320), ("llama", 500),
                                         ("train_adapter", 520)])
def test_the_three_files_have_a_size(name, lines):
    """They are read from top to bottom: what makes one grow moves something else out."""
    assert FILES[name].read_text(encoding="utf-8").count("\n") <= lines


def test_programs_of_bench_share_two_modules():
    """What several programs measure with is in bench/common.py, or, if it is of several methods,
    in bench/methods.py, not in one of them."""
    for module in FILES:
        if module.startswith("bench."):
            assert {name for name in imports(FILES[module]) if name.startswith("bench.")} <= {
                "bench.common", "bench.methods"}, module


def test_there_is_no_circle():
    """No module imports itself, by whatever way."""
    graph = {module: imports(path) for module, path in FILES.items()}

    def visit(module, above):
        assert module not in above, " -> ".join([*above, module])
        for other in graph[module]:
            visit(other, [*above, module])

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("path", [path for folder in (ROOT, *ROOT.iterdir()) if folder.is_dir()
                                  for path in folder.glob("*.py")],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_a_line_has_100_columns(path):
    """Two files side by side, a phone, a projector: longer lines are cut there."""
    lines = path.read_text(encoding="utf-8").split("\n")
    assert not [i for i, line in enumerate(lines, 1) if len(line) > 100]


@pytest.mark.parametrize("tests, name, mutation", [(tests, name, mutation)
                                                   for tests, name, *mutation in BUGS])
def test_a_planted_bug_has_its_line(tests, name, mutation):
    """Guards tests/bugs: a line that was renamed, and a bug that is planted no more."""
    assert (ROOT / tests).exists() and mutated(*mutation), name
