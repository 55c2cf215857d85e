"""The packages of saeflow and their files, as each `__init__.py` describes them."""

from __future__ import annotations

import ast
from pathlib import Path

from _generate import ROOT, code, table

ORDER = [
    "runtime", "recipe", "store", "corpus", "model", "activations", "sae", "train", "features", "query", "classes",
    "meaning", "browser", "pipeline", "cli",
]  # fmt: skip
"""A package imports only packages before it."""


def page() -> str:
    packages = [name for name in ORDER if (ROOT / "saeflow" / name / "__init__.py").is_file()]
    summary = [(f"[`{name}`](#{name})", _docstring(name)[0]) for name in packages]
    return "\n\n".join([table(["package", "what it is for"], summary), *map(_package, packages)])


def _package(name: str) -> str:
    first, rows = _docstring(name)
    inside = [f"{name}/{path.parent.name}" for path in sorted((ROOT / "saeflow" / name).glob("*/__init__.py"))]
    parts = [f"### `{name}` {{ #{name} }}", first, table(["file", "what it does"], rows)]
    for folder in inside:
        about, files = _docstring(folder)
        parts += [f"`{folder}`: {about}", table(["file", "what it does"], files)]
    return "\n\n".join(parts)


def _docstring(name: str) -> tuple[str, list[tuple[str, str]]]:
    """The first line, and what it says of each file."""
    path = Path(ROOT, "saeflow", name, "__init__.py")
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    first, _, rest = text.partition("\n")
    lines = [line.split(maxsplit=1) for line in rest.splitlines() if line.strip()]
    return first, [(code(words[0]), words[1]) for words in lines if len(words) == 2]
