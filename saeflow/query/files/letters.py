"""Letters whose bytes several tokens share, and text that is cut: as `sql/functions` treats them."""

from __future__ import annotations

import re

LONGEST = 1_000
"""Bytes of an entry that answers show: as in `short_text.sql` and `short_digits.sql`."""

_CONTINUED = re.compile(rb"[\x80-\xbf]{1,3}")
_OPEN = re.compile(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")
_EACH_LETTER = re.compile(
    rb"[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}|.", re.DOTALL
)


def letter_rest(content: bytes) -> bytes:
    """Return the bytes at the start that only continue a letter begun before them."""
    found = _CONTINUED.match(content)
    return found[0] if found else b""


def open_letter(content: bytes) -> bytes:
    """Return the bytes at the end that begin a letter without finishing it."""
    found = _OPEN.search(content[-3:])
    return found[0] if found else b""


def lossy_text(content: bytes) -> str:
    """Return bytes as text; those that are not UTF-8 become the replacement character."""
    text = as_text(content)
    return "".join(as_text(letter) or "�" for letter in _EACH_LETTER.findall(content)) if text is None else text


def short_bytes(content: bytes) -> bytes:
    """Return bytes, those of a very long entry cut as `short_digits.sql` cuts them."""
    if len(content) <= LONGEST:
        return content
    begun = content[:LONGEST]
    return begun[: LONGEST - len(open_letter(begun))] + "…".encode() + open_letter(content)


def as_text(content: bytes) -> str | None:
    """Return bytes as text, None if they are not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None
