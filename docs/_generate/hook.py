"""MkDocs calls this: each mark `<!-- made: NAME WORDS -->` of a page is replaced by what the code says.

The pages stay readable without a build, and the tests call `made` to see the texts that readers see.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

if str(Path(__file__).parents[1]) not in sys.path:  # MkDocs loads this file by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

from _generate import ROOT, commands, house, measured, questions, recipe

MARK = re.compile(r"<!-- made: (.+?) -->")


def _file(name: str) -> str:
    """A page of the repository that lies outside of docs/, without its title; code stays code, links become text."""
    text = (ROOT / name).read_text("utf-8").partition("\n")[2]
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]+\)", r"\1", text)


def _notebook(name: str) -> str:
    """The cells of a notebook, without its title."""
    cells = json.loads((ROOT / name).read_text("utf-8"))["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
    return "\n\n".join(f"```python\n{text}\n```" if is_code else text for text, is_code in texts).partition("\n")[2]


MAKERS = {
    "recipe": recipe.page,
    "commands": commands.page,
    "questions": questions.page,
    "checks": questions.checks,
    "bars": measured.bars,
    "queries": measured.queries,
    "queries_by_size": measured.queries_by_size,
    "buckets": measured.buckets,
    "synth": measured.synth,
    "toys": measured.toys,
    "l0": measured.l0,
    "defaults": measured.defaults,
    "low_precision": measured.low_precision,
    "compression": measured.compression,
    "house": house.page,
    "file": _file,
    "notebook": _notebook,
}


def made(text: str) -> str:
    """A page's Markdown with its marks replaced."""

    def make(mark: re.Match[str]) -> str:
        name, *words = mark[1].split()
        return MAKERS[name](*words)

    return MARK.sub(make, text)


def on_page_markdown(markdown: str, **about: Any) -> str:
    return made(markdown)
