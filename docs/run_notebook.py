"""Run kangaroo.ipynb from top to bottom and store what its cells put out. Needs no Jupyter.

    python docs/run_notebook.py

A cell puts out what it prints and then, as in Jupyter, the value of a last line that is an
expression: its picture, if it has one, and its repr.
"""
import ast
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

NOTEBOOK = Path(__file__).with_name("kangaroo.ipynb")


def run(notebook):
    """Execute a notebook's code cells and replace their outputs; returns their namespace."""
    space, cells = {"__name__": "__main__"}, notebook["cells"]
    for count, cell in enumerate((c for c in cells if c["cell_type"] == "code"), 1):
        printed, value = execute("".join(cell["source"]), space, f"cell {count}")
        cell |= {"execution_count": count, "outputs": []}
        if printed:
            cell["outputs"].append({"output_type": "stream", "name": "stdout",
                                    "text": printed.splitlines(True)})
        if value is not None:
            data = {"image/svg+xml": [value._repr_svg_()]} if hasattr(value, "_repr_svg_") else {}
            cell["outputs"].append({"output_type": "execute_result", "execution_count": count,
                                    "data": data | {"text/plain": [repr(value)]}, "metadata": {}})
    return space


def execute(source, space, name):
    """Run a cell's source in `space`: what it prints, and the value of its last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, name, "exec"), space)
        value = eval(compile(ast.Expression(last.value), name, "eval"), space) if last else None
    return printed.getvalue(), value


if __name__ == "__main__":
    sys.path.insert(0, str(NOTEBOOK.parents[1]))
    from support.files import write_atomically
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    run(found)
    text = json.dumps(found, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    write_atomically(NOTEBOOK, text.encode())
