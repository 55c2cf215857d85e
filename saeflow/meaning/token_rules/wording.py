"""Rules in words. Text of the corpus in them is quoted, short, on one line, and harmless to a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from saeflow.runtime.text import sanitise

_LONGEST_QUOTE = 60
"""Characters of the corpus in one quotation."""


def quoted(text: str) -> str:
    """Return the text in double quotes: line breaks and tabs as escapes, the beginning of a long text left out."""
    short = text if len(text) <= _LONGEST_QUOTE else "…" + text[-_LONGEST_QUOTE:]
    escaped = short.replace("\\", "\\\\").replace('"', '\\"')
    for sign, name in (("\r", "\\r"), ("\n", "\\n"), ("\t", "\\t")):
        escaped = escaped.replace(sign, name)
    harmless = sanitise(
        "".join(each if each.isprintable() or each in "\u200d" else f"⟨U+{ord(each):04X}⟩" for each in escaped)
    )
    return f'"{harmless}"'


def either(names: Sequence[str]) -> str:
    """Return names as a list in words: `a`, `a or b`, `a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
