"""The shape of a vocabulary entry: digits, punctuation, a capitalised word; how it begins and ends."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from saeflow.sae.kernels import Ids

SHAPES = (
    "a line break",
    "a blank",
    "digits",
    "a capitalised word",
    "a word in capitals",
    "a word",
    "the rest of a word",
    "a capitalised start without a blank",
    "punctuation",
    "anything else",
)
"""Shapes in words; every entry has exactly one. `shape_of` returns places in this list."""

_BREAK, _BLANK, _DIGITS, _CAPITALISED, _CAPITALS, _WHOLE_WORD, _REST, _START, _PUNCTUATION, _OTHER = range(len(SHAPES))


def shape_of(piece: str) -> int:
    """Return the shape of an entry as a place in SHAPES."""
    text = piece.strip()
    if not text:
        return _BREAK if "\n" in piece or "\r" in piece else _BLANK if piece else _OTHER
    if text.isdigit():
        return _DIGITS
    letters = "".join(each for each in text if each.isalpha())
    if not letters:
        return _PUNCTUATION if not any(map(str.isalnum, text)) else _OTHER
    if len(letters) < len(text) - 1:
        return _OTHER
    if letters.isupper() and len(letters) > 1:
        return _CAPITALS
    if letters[0].isupper():
        return _CAPITALISED if piece[0].isspace() else _START
    return _WHOLE_WORD if piece[0].isspace() else _REST


def begins_word(piece: str) -> bool:
    """True unless the entry goes on with a word: it begins with a letter or an apostrophe."""
    return not piece or not (piece[0].isalpha() or piece[0] in "'’")


def beginning(piece: str, n: int) -> str | None:
    """Return the first `n` letters of an entry in lower case, behind its blank; None if it has no more letters."""
    text = piece.lstrip(" ")
    if len(text) <= n or not text[:n].isalpha():
        return None
    return (" " if piece.startswith(" ") else "") + text[:n].lower()


def ending(piece: str, n: int) -> str | None:
    """Return the last `n` letters of an entry in lower case; None if it has no more letters."""
    text = piece.strip(" ")
    return text[-n:].lower() if len(text) > n and text[-n:].isalpha() else None


def numbered(texts: Iterable[str | None]) -> tuple[Ids, list[str]]:
    """Return a number for each text, -1 for None, and the texts by number."""
    places: dict[str, int] = {}
    codes = [-1 if text is None else places.setdefault(text, len(places)) for text in texts]
    return np.array(codes, np.int32), list(places)
