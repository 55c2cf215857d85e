"""Text and pictures as markdown for Prefect's pages. What others wrote, in a corpus or in the name of a file, stays
text."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from saeflow.runtime.text import human_bytes, sanitise

PICTURE_BYTES = 200_000
"""A picture up to this size is shown on the page itself."""

_MARKUP = re.compile(r"[!-+\--/:-@\[-`{-~]")
"""ASCII punctuation but the comma. Prefect's pages know backslashes; entities they show as they are written."""


def plain(text: str) -> str:
    """Text that markdown shows as it is: no link, picture, tag, table or emphasis comes of it."""
    return _MARKUP.sub(r"\\\g<0>", sanitise(text).strip())


def shown(name: str, value: Any) -> str:
    """A number as a person reads it; `…bytes` with their unit."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return sanitise(str(value))
    if name.endswith("bytes"):
        return human_bytes(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def cell(name: str, value: Any) -> str:
    """The same as markdown, which Prefect takes the cells of a table for, too."""
    return shown(name, value) if isinstance(value, int | float) else plain(str(value))


def table(facts: Mapping[str, Any]) -> str:
    """A markdown table of names and numbers."""
    rows = [f"| {plain(name.replace('_', ' '))} | {cell(name, value)} |" for name, value in facts.items()]
    return "\n".join(["| what | value |", "| --- | ---: |", *rows])


def commands(lines: Iterable[str]) -> str:
    """Commands to copy, one a line."""
    return "\n".join(["```sh", *map(sanitise, lines), "```"])


def picture(name: str, path: Path) -> str:
    """The picture itself with its path or, where it is large, the path alone."""
    content = path.read_bytes()
    if len(content) > PICTURE_BYTES:
        return plain(str(path))
    return f"![{plain(name)}](data:image/png;base64,{base64.b64encode(content).decode()})\n\n{plain(str(path))}"
