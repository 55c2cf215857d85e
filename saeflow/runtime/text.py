"""Text for people: safe to print in a terminal, short, sizes in words, and names like a mistyped one."""

from __future__ import annotations

import codecs
import csv
import difflib
import re
from collections.abc import Iterable

LEAST_ALIKE = 0.4
"""Names less alike than this (difflib's ratio, 0 to 1) are not suggested."""
HOSTILE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufff9-\ufffb]")
_LINE_BREAK = re.compile(r"\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]")


def sanitise(text: str) -> str:
    """Return the text on one line without anything a terminal obeys: line breaks as ↵, tabs as ⇥, others as symbols."""
    return HOSTILE.sub(_visible, _LINE_BREAK.sub("↵", text))


def _visible(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code == 9:
        return "⇥"
    if code < 32:
        return chr(0x2400 + code)
    return "␡" if code == 127 else f"⟨U+{code:04X}⟩"


def harmless_lines(text: str) -> str:
    """Sanitise each line of a message."""
    return "\n".join(map(sanitise, text.split("\n")))


def is_utf8(text: str) -> bool:
    """True if the text can be written: names of files that are not UTF-8 hold halves of characters."""
    return not re.search("[\ud800-\udfff]", text)


def encoding_of(first: bytes) -> str:
    """Return the encoding that a byte order mark tells, without the mark; UTF-8 if there is none."""
    if first.startswith(codecs.BOM_UTF32_LE):  # begins as the mark of UTF-16 does
        return "utf-32"
    return "utf-16" if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decoded_text(content: bytes) -> str:
    """Return a text in UTF-8 or, by its mark, in UTF-16. Raises UnicodeDecodeError."""
    return content.decode(encoding_of(content))


def separator_of(first: str, column: str | None = None) -> str:
    """Return the sign that parts the cells of a table in text, by its first line.

    It is the first sign that makes a column of that name, or the one of most columns.
    """
    headers = {each: next(csv.reader([first], delimiter=each), []) for each in ",;\t|"}
    fits = (each for each, header in headers.items() if column in header)
    return next(fits, max(headers, key=lambda each: len(headers[each])))


def brief(text: str, longest: int = 80) -> str:
    """Return the beginning of a text of any length."""
    return text if len(text) <= longest else text[:longest] + "…"


def human_bytes(n_bytes: float) -> str:
    """Return a size in words, e.g. `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Return at most `n` names that look like this one, the most alike first."""
    return difflib.get_close_matches(brief(name), list(names), n=n, cutoff=LEAST_ALIKE)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a hint as a sentence: the nearest names, or all names if none is near."""
    names = list(names)
    near = nearest(name, names)
    return f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(names) or 'none'}."
