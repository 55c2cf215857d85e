"""Answers on a terminal: a table, or one record under the other if no table fits.

Text of a corpus is not trusted. A terminal obeys nothing of it: no escape sequence, no direction mark, no markup.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

import pyarrow as pa
from rich import box
from rich.cells import cell_len, chop_cells
from rich.table import Table
from rich.text import Text

from saeflow.query.text_formats import as_json_value, is_number
from saeflow.runtime.terminal import Terminal
from saeflow.runtime.text import sanitise

_MARKED = re.compile("«([^«»]*)»")
_GAP = 3
_NARROWEST_CONTEXT = 24
_NARROWEST_TEXT = 12
_WIDEST_BESIDE_CONTEXT = 32


def render_table(table: pa.Table, console: Terminal | None = None, max_rows: int | None = None) -> None:
    """Print a table that fits the console, or one record under the other if no table would fit.

    The token marked in a `context` column stays in sight, highlighted.
    """
    console = console or Terminal()
    shown = table if max_rows is None else table.slice(0, max_rows)
    columns = [
        _Column(name, is_number(field.type), [_cell_text(name, value) for value in column.to_pylist()])
        for name, field, column in zip(shown.column_names, shown.schema, shown.columns, strict=True)
    ]
    fits = sum(column.least_width + _GAP for column in columns) <= console.width
    console.print(*(_grid(columns, console.width) if fits else _records(columns, console.width)), sep="\n")
    if shown.num_rows < table.num_rows:
        console.print(Text(f"{shown.num_rows:,} of {table.num_rows:,} rows shown.", style="dim"))
    elif not table.num_rows:
        console.print(Text("No rows.", style="dim"))


@dataclass(frozen=True)
class _Column:
    name: str
    is_number: bool
    cells: list[str]

    @property
    def width(self) -> int:
        return max([cell_len(sanitise(self.name)), *map(cell_len, self.cells)])

    @property
    def least_width(self) -> int:
        if self.name == "context":
            return min(self.width, _NARROWEST_CONTEXT)
        return self.width if self.is_number else max(min(self.width, _NARROWEST_TEXT), cell_len(sanitise(self.name)))


def _grid(columns: list[_Column], width: int) -> list[Table]:
    """Return a table with a line for each row. Contexts take the room that is left, on one line."""
    others = sum(min(c.width, _WIDEST_BESIDE_CONTEXT) + _GAP for c in columns if c.name != "context")
    room = max(width - others - _GAP, _NARROWEST_CONTEXT)
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        view.add_column(
            Text(sanitise(column.name)),
            justify="right" if column.is_number else "left",
            no_wrap=column.is_number or column.name == "context",
            min_width=column.least_width,
            overflow="fold",
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        view.add_row(*(_styled(column.name, cell, room) for column, cell in zip(columns, row, strict=True)))
    return [view]


def _records(columns: list[_Column], width: int) -> list[Table]:
    """Return a small table for each row, with a line for each column."""
    labels = max(cell_len(sanitise(column.name)) for column in columns)
    views = []
    for row in zip(*(column.cells for column in columns), strict=True):
        view = Table(box=None, show_header=False, pad_edge=False)
        view.add_column(style="bold", no_wrap=True)
        view.add_column(overflow="fold")
        for column, cell in zip(columns, row, strict=True):
            view.add_row(Text(sanitise(column.name)), _styled(column.name, cell, max(width - labels - 2, 1)))
        view.add_row()
        views.append(view)
    return views


def _styled(name: str, cell: str, room: int) -> Text:
    return _highlight_token(cell, room) if name == "context" else Text(cell)


def _cell_text(name: str, value: object) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if name.startswith(("n_", "count")) else str(value)
        case float():
            return _four_digits(value)
        case bytes():
            return value.hex()
        case str():
            return _visible_spaces(sanitise(value)) if name == "piece" else sanitise(value)
        case list() | dict():
            return sanitise(json.dumps(as_json_value(value), ensure_ascii=False))
    return sanitise(str(value))


def _four_digits(value: float) -> str:
    """Return four significant digits, without an exponent if that stays short."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 1e-4 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.3e}"


def _visible_spaces(piece: str) -> str:
    """Show spaces at the ends of a token: they matter, and a terminal does not show them."""
    inner = piece.strip(" ")
    if not inner:
        return "␣" * len(piece)
    before = len(piece) - len(piece.lstrip(" "))
    return "␣" * before + inner + "␣" * (len(piece) - before - len(inner))


def _highlight_token(cell: str, room: int) -> Text:
    """Return the marked token highlighted, with as much text on either side as there is room for."""
    found = _MARKED.search(cell)
    if found is None:
        return Text(cell)
    token = found[0]
    rest = max(room - cell_len(token), 0)
    before, after = cell[: found.start()], cell[found.end() :]
    left = min(cell_len(before), max(rest // 2, rest - cell_len(after)))
    return Text.assemble(
        (_last_cells(before, left), "dim"), (token, "bold yellow"), (_first_cells(after, rest - left), "dim")
    )


def _first_cells(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    return chop_cells(text, width - 1)[0] + "…" if width > 2 else ""


def _last_cells(text: str, width: int) -> str:
    return _first_cells(text[::-1], width)[::-1]
