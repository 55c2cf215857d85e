"""Tokens in their context on a terminal: a line for each, the token in the middle, shaded by the feature's value.

Without colours, the tokens at which the feature fires are in brackets with its value.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from rich.cells import cell_len
from rich.color import Color
from rich.style import Style
from rich.text import Text

from saeflow.runtime.terminal import Terminal
from saeflow.runtime.text import sanitise

_MARKED = re.compile("«([^«»]*)»")
_N_SHADES = 9
_ABOVE, _BELOW = ((150, 140, 125), (255, 140, 0)), ((125, 135, 150), (60, 160, 255))
"""The weakest and the strongest shade above and below zero. Black letters are readable on all of them."""
_LONGEST_PIECE = 1_000


@dataclass(frozen=True)
class Context:
    """A token, and the text on either side of it."""

    before: Text
    token: Text
    after: Text

    def line(self, left: int, width: int) -> Text:
        """Return the context in `width` cells, of which `left` are in front of the token."""
        before, token = _last(self.before, left), _first(self.token, width - left)
        after = _first(self.after, width - left - token.cell_len)
        return Text.assemble(" " * (left - before.cell_len), before, token, after)


def context_lines(contexts: Sequence[Context], width: int) -> list[Text]:
    """Return a line of at most `width` cells for each context. The tokens begin one below the other."""
    before, token, after = _widths(contexts)
    token = min(token, 2 * width // 3)
    left = min(before, max((width - token) // 2, width - token - after))
    return [context.line(left, width) for context in contexts]


def full_width(contexts: Sequence[Context]) -> int:
    """Return how many cells a line takes if nothing is cut."""
    return sum(_widths(contexts))


def _widths(contexts: Sequence[Context]) -> list[int]:
    parts = ([each.before for each in contexts], [each.token for each in contexts], [each.after for each in contexts])
    return [max((text.cell_len for text in part), default=0) for part in parts]


def marked_context(cell: str) -> Context:
    """Return the context of a token that is between « and »."""
    found = _MARKED.search(cell)
    if found is None:
        return Context(Text(), Text(), Text(cell))
    before, after = cell[: found.start()], cell[found.end() :]
    return Context(Text(before, "dim"), Text(found[0], "bold yellow"), Text(after, "dim"))


def shaded_contexts(table: pa.Table, console: Terminal) -> list[Context] | None:
    """Return the context of each row of an answer that has `pieces` and `feature_values`; None for other answers.

    The token in the middle is the one at `place`, from 1, or the strongest if there is no such column.
    """
    if not {"pieces", "feature_values"} <= set(table.column_names):
        return None
    rows = [_context_of(row) for row in table.to_pylist()]
    if None in rows:
        return None
    spans = [row for row in rows if row is not None]
    values = [value for _, values, _ in spans for value in values]
    in_colour = console.color_system is not None and not console.no_color
    shade = _Shade(max(map(abs, values), default=0), any(value < 0 for value in values), in_colour)
    return [shade.context(*span, console.width) for span in spans]


def _context_of(row: dict[str, Any]) -> tuple[list[str], list[float], int] | None:
    """Return the row's texts, values, and the place of its token from 0; None if the lists are of other kinds."""
    pieces, values = row["pieces"] or [], row["feature_values"] or []
    are_lists = isinstance(pieces, list) and isinstance(values, list) and len(pieces) == len(values)
    if not are_lists or not all(isinstance(p, str | None) and isinstance(v, int | float | None)
                                for p, v in zip(pieces, values, strict=True)):  # fmt: skip
        return None
    numbers = [value if value and math.isfinite(value) else 0 for value in values]
    place = row.get("place")
    if not isinstance(place, int) or not 1 <= place <= len(pieces):
        place = 1 + max(range(len(pieces)), key=lambda i: abs(numbers[i]), default=0)
    return [piece or "" for piece in pieces], numbers, place - 1


@dataclass(frozen=True)
class _Shade:
    """How values are drawn: the largest magnitude, whether any is negative, and whether there are colours."""

    most: float
    is_signed: bool
    in_colour: bool

    def context(self, pieces: list[str], values: list[float], place: int, reach: int) -> Context:
        """Return the context of the token at `place`, at most `reach` tokens in either direction."""
        first = max(place - reach, 0)
        marks = [
            self.mark(piece, value, number == place)
            for number, (piece, value) in enumerate(zip(pieces, values, strict=True))
            if first <= number <= place + reach
        ]
        parts = marks[: place - first], marks[place - first : place - first + 1], marks[place - first + 1 :]
        return Context(*(Text().join(part) for part in parts))

    def mark(self, piece: str, value: float, is_centre: bool) -> Text:
        """Return a token as it is shown. A space in front of it stays outside of its mark."""
        level = math.ceil(_N_SHADES * abs(value) / self.most) if self.most else 0
        if not is_centre and level <= (0 if self.in_colour else 1):
            return Text(sanitise(_shortened(piece)))
        space, word = _word(sanitise(_shortened(piece)))
        sign = "+" if self.is_signed else ""
        if not self.in_colour:
            return Text(f"{space}[{word} {value:{sign}.{4 if is_centre else 2}g}]")
        direction = ("-" if value < 0 else "+") if self.is_signed and level else ""
        return Text.assemble(space, (direction + word, _style(level, value < 0) + Style(bold=is_centre or None)))


def _style(level: int, is_below: bool) -> Style:
    if not level:
        return Style(underline=True)
    weak, strong = _BELOW if is_below else _ABOVE
    share = (level - 1) / (_N_SHADES - 1)
    shade = [low + share * (high - low) for low, high in zip(weak, strong, strict=True)]
    return Style(color="#000000", bgcolor=Color.from_rgb(*shade))


def _shortened(piece: str) -> str:
    if len(piece) <= _LONGEST_PIECE:
        return piece
    return f"{piece[: _LONGEST_PIECE // 2]}…{piece[-_LONGEST_PIECE // 2 :]}"


def _word(piece: str) -> tuple[str, str]:
    """Return the spaces in front of a token, and the token: visible even if it is only a space or an accent."""
    word = piece.lstrip(" ")
    if not word:
        return "", "␣" * len(piece)
    return piece[: len(piece) - len(word)], "◌" * bool(unicodedata.combining(word[0])) + word


def _first(text: Text, width: int) -> Text:
    """Return the beginning of a text in so many cells, with … if it is cut."""
    text = text.copy() if width > 0 else Text()
    text.truncate(max(width, 1), overflow="ellipsis")
    return text


def _last(text: Text, width: int) -> Text:
    """Return the end of a text in so many cells, with … if it is cut. A letter and its accents stay together."""
    if text.cell_len <= width:
        return text
    plain, start, room = text.plain, len(text), width - 1
    while start and (room := room - cell_len(plain[start - 1])) >= 0:
        start -= 1
    while start < len(plain) and not cell_len(plain[start]):
        start += 1
    return Text.assemble("…" if width > 0 else "", text[start:])
