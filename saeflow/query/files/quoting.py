"""Values, names and paths as SQL text."""

from __future__ import annotations

import math
import operator
import re

from saeflow.runtime.text import HOSTILE


def unglobbed(path: str) -> str:
    """Return the path as a glob that matches only itself: read_parquet expands `*`, `?` and `[` even in a list."""
    return re.sub(r"[*?\[]", r"[\g<0>]", path)


def whole(value: int) -> str:
    """Return a whole number as SQL. Raises ValueError or TypeError for what is none: a record may hold anything."""
    return literal(operator.index(value))


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def literal(value: object) -> str:
    """Return a value as SQL on one line, without anything that a terminal would obey."""
    match value:
        case None:
            return "null"
        case bool() | int():
            return str(value).lower()
        case float() if math.isfinite(value):
            return repr(value)
        case dict():
            return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(literal, value)) + "]"
    text = str(value).encode("utf-8", "replace").decode().replace("'", "''")
    if not HOSTILE.search(text):
        return f"'{text}'"
    doubled = text.replace("\\", "\\\\")
    escaped = HOSTILE.sub(lambda found: "".join(f"\\x{byte:02x}" for byte in found[0].encode()), doubled)
    return f"E'{escaped}'"
