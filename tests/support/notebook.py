"""Runs a notebook as Jupyter does, cell by cell in one process, and shows what a person would see.

python -m tests.support.notebook FILE.ipynb
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any


def cells(path: Path, kind: str = "code") -> dict[str, str]:
    """Return the cells of a kind by their ids, in order."""
    found = json.loads(path.read_text("utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in found if cell["cell_type"] == kind}


def run(path: Path) -> None:
    """Run the code cells. Prints a line for each picture, and the last expression of a cell as Jupyter shows it."""
    import matplotlib

    matplotlib.use("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell, text in cells(path).items():
        print(f"--- {cell}", flush=True)
        *body, last = ast.parse(text, cell).body
        is_shown = isinstance(last, ast.Expr) and not text.rstrip().endswith(";")
        exec(compile(ast.Module([*body] if is_shown else [*body, last], []), cell, "exec"), names)
        if is_shown:
            assert isinstance(last, ast.Expr)
            show(eval(compile(ast.Expression(last.value), cell, "eval"), names))
        draw()


def show(value: object) -> None:
    if hasattr(value, "_repr_html_"):
        print(f"html {len(value._repr_html_())}")
    elif value is not None:
        print(repr(value))


def draw() -> None:
    """Draw each open picture, and close it."""
    import matplotlib.pyplot as plt

    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
        print("picture")
    plt.close("all")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
