"""Answers on a terminal: a table, or one record under the other if no table fits.

Text of a corpus is not trusted. A terminal obeys nothing of it: no escape sequence, no direction mark, no markup.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from saeflow.cli.answers.contexts import Context, context_lines, full_width, marked_context, shaded_contexts
from saeflow.query.text_formats import as_json_value, is_number
from saeflow.runtime.terminal import LONGEST_WORD, Terminal
from saeflow.runtime.text import sanitise

_COLUMN_GAP = 3
_NARROWEST_CONTEXT = 32
_READABLE_CONTEXT = 48
_WIDEST_BESIDE_CONTEXT = 32
_GO_EARLY = ("piece", "token_id", "position", "n_copies", "high_value", "low_value")
_GO_LATE = ("source", "key")
"""Columns that make room for a readable context, and those that make room for a narrow one. Then the others leave from
the right. The value stays."""


def render_table(table: pa.Table, console: Terminal | None = None, max_rows: int | None = None) -> None:
    """Print a table that fits the console, or one record under the other if no table would fit.

    A context takes one line on a console of any width. Columns beside it that matter less make room.
    """
    console = console or Terminal()
    shown = table if max_rows is None else table.slice(0, max_rows)
    columns = list(_shown_columns(shown, console))
    left_out = list(_make_room(columns, console.width))
    grid = _grid(columns, console.width)
    fits = console.least_width(grid) <= console.width
    for view in [grid] if fits else _records(columns, shown.num_rows, console.width):
        console.print_table(view)
    if left_out:
        console.print(Text(f"No room for: {', '.join(left_out)}. -f csv has every column.", style="dim"))
    if shown.num_rows < table.num_rows:
        console.print(Text(f"{shown.num_rows:,} of {table.num_rows:,} rows shown.", style="dim"))
    elif not table.num_rows:
        console.print(Text("No rows.", style="dim"))


@dataclass(frozen=True)
class _Column:
    name: str
    is_number: bool
    cells: list[str]
    contexts: list[Context] | None = None

    @property
    def width(self) -> int:
        cells = full_width(self.contexts) if self.contexts else max(map(cell_len, self.cells), default=0)
        return max(cell_len(self.name), cells)

    def least_width(self, context: int) -> int:
        """Return the width that keeps words whole, and of a context so many cells."""
        if self.contexts is not None:
            return min(self.width, context)
        words = self.cells if self.is_number else [word for cell in self.cells for word in cell.split()]
        return max(cell_len(self.name), min(max(map(cell_len, words), default=0), LONGEST_WORD))

    def texts(self, width: int) -> list[Text]:
        """Return the cells. A context is cut to the width."""
        return context_lines(self.contexts, width) if self.contexts is not None else list(map(Text, self.cells))


def _shown_columns(table: pa.Table, console: Terminal) -> Iterator[_Column]:
    """Yield the columns as they are shown. `pieces`, with their values and place, are one column: the context."""
    shaded = shaded_contexts(table, console)
    for name, field, column in zip(table.column_names, table.schema, table.columns, strict=True):
        if shaded is not None and name == "pieces":
            yield _Column("context", False, [], shaded)
        elif shaded is None or name not in ("feature_values", "place"):
            cells = [_cell_text(name, value) for value in column.to_pylist()]
            marked = list(map(marked_context, cells)) if name == "context" else None
            yield _Column(sanitise(name), is_number(field.type), cells, marked)


def _make_room(columns: list[_Column], width: int) -> Iterator[str]:
    """Take columns away until contexts have room, those that matter least first. Yields their names."""
    order = [*_GO_EARLY, *_GO_LATE]
    beside = [column for column in reversed(columns) if column.contexts is None and column.name != "value"]
    beside.sort(key=lambda column: order.index(column.name) if column.name in order else len(order))
    for column in beside if any(each.contexts for each in columns) else []:
        context = _READABLE_CONTEXT if column.name in _GO_EARLY else _NARROWEST_CONTEXT
        if sum(each.least_width(context) + _COLUMN_GAP for each in columns) > width:
            columns.remove(column)
            yield column.name


def _grid(columns: list[_Column], width: int) -> Table:
    """Return a table with a line for each row. Contexts take the room that is left, on one line."""
    others = [max(min(c.width, _WIDEST_BESIDE_CONTEXT), c.least_width(0)) for c in columns if c.contexts is None]
    room = max(width - sum(others) - _COLUMN_GAP * len(columns), 1)
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        view.add_column(
            Text(column.name),
            justify="right" if column.is_number else "left",
            no_wrap=column.is_number or column.contexts is not None,
            overflow="fold",
        )
    for row in zip(*(column.texts(room) for column in columns), strict=True):
        view.add_row(*row)
    return view


def _records(columns: list[_Column], n_rows: int, width: int) -> list[Table]:
    """Return a small table for each row, with a line for each column."""
    labels = max(cell_len(column.name) for column in columns)
    cells = [column.texts(max(width - labels - 2, 1)) for column in columns]
    views = []
    for number in range(n_rows):
        view = Table(box=None, show_header=False, pad_edge=False)
        view.add_column(style="bold", no_wrap=True)
        view.add_column(overflow="fold")
        for column, texts in zip(columns, cells, strict=True):
            view.add_row(Text(column.name), texts[number])
        view.add_row()
        views.append(view)
    return views


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
