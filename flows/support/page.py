"""Text and pictures as markdown for Prefect's pages. Markup in texts of a corpus or names of files has no effect."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from saeflow.runtime.text import human_bytes, sanitise

PICTURE_BYTES = 200_000
"""Largest picture that is shown on the page itself."""

_MARKUP = re.compile(r"[!-+\--/:-@\[-`{-~]")
"""ASCII punctuation but the comma. Prefect's pages obey backslashes, but not entities."""


def plain(text: str) -> str:
    """Return text that markdown shows as it is, without links, pictures, tags, tables or emphasis."""
    return _MARKUP.sub(r"\\\g<0>", sanitise(text).strip())


def shown(name: str, value: Any) -> str:
    """Return a number as a person reads it; `…bytes` with a unit."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return sanitise(str(value))
    if name.endswith("bytes"):
        return human_bytes(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def cell(name: str, value: Any) -> str:
    """Return what `shown` returns as markdown, which Prefect expects in the cells of a table."""
    return shown(name, value) if isinstance(value, int | float) else plain(str(value))


def table(facts: Mapping[str, Any]) -> str:
    """Return a markdown table of names and numbers."""
    rows = [f"| {plain(name.replace('_', ' '))} | {cell(name, value)} |" for name, value in facts.items()]
    return "\n".join(["| what | value |", "| --- | ---: |", *rows])


def commands(lines: Iterable[str]) -> str:
    """Return a markdown block of commands to copy."""
    return "\n".join(["```sh", *map(sanitise, lines), "```"])


def picture(name: str, path: Path) -> str:
    """Return the picture with its path; of a large one, only the path."""
    content = path.read_bytes()
    if len(content) > PICTURE_BYTES:
        return plain(str(path))
    return f"![{plain(name)}](data:image/png;base64,{base64.b64encode(content).decode()})\n\n{plain(str(path))}"
