"""Pages of the site that are made from the code when the site is built. Read `hook` first.

hook       put each made text in the place of its mark
recipe     settings, from the pydantic models
commands   the `saeflow` command, from its parser
questions  named questions and checks, from the headers of `sql/`
measured   tables of the figures in `docs/benchmarks/`
house      packages and their files, from the docstrings of `saeflow/`
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table; columns named in `right` are set to the right."""
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in [header, rule, *rows])


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    """Text as code, with ticks that its own ticks cannot end."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"
