"""Answers for people and programs: tables in the terminal, CSV, JSON and Parquet.

Text of a corpus is not trusted. In the terminal nothing of it is obeyed: no escape sequence, no
direction mark, no markup. In CSV no text cell starts a formula where the comma is the separator.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saeflow.runtime.errors import UserError
from saeflow.runtime.text import HOSTILE, sanitise

Format = Literal["table", "csv", "json", "jsonl", "parquet"]

_MARKED = re.compile("«([^«»]*)»")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_ROWS_AT_ONCE = 10_000
_GAP = 3
_NARROWEST_CONTEXT = 24
_NARROWEST_TEXT = 12
_WIDEST_BESIDE_CONTEXT = 32


def render_table(table: pa.Table, console: Console | None = None, max_rows: int | None = None) -> None:
    """Print a table that fits the console, or one record under the other where no table would fit.

    The token marked in a `context` column stays in sight, highlighted.
    """
    console = console or Console(highlight=False)
    shown = table if max_rows is None else table.slice(0, max_rows)
    columns = [
        _Column(name, _is_number(field.type), [_cell(name, value) for value in column.to_pylist()])
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
    """One row a row; contexts take the room that is left, on one line."""
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
    """One row after the other, its columns as lines."""
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
    return _in_context(cell, room) if name == "context" else Text(cell)


def _is_number(type: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_decimal(type))


def _cell(name: str, value: object) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if name.startswith(("n_", "count")) else str(value)
        case float():
            return _number(value)
        case bytes():
            return value.hex()
        case str():
            return _visible_spaces(sanitise(value)) if name == "piece" else sanitise(value)
        case list() | dict():
            return sanitise(json.dumps(_plain(value), ensure_ascii=False))
    return sanitise(str(value))


def _number(value: float) -> str:
    """Four significant digits, without an exponent where that stays short."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 1e-4 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.3e}"


def _visible_spaces(piece: str) -> str:
    """Spaces at the ends of a token matter, and a terminal does not show them."""
    inner = piece.strip(" ")
    if not inner:
        return "␣" * len(piece)
    before = len(piece) - len(piece.lstrip(" "))
    return "␣" * before + inner + "␣" * (len(piece) - before - len(inner))


def _in_context(cell: str, room: int) -> Text:
    """The marked token highlighted, with as much on either side as there is room for."""
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


def format_of(target: Path | None) -> Format:
    """What a file's name promises; a table where it promises nothing."""
    known: dict[str, Format] = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet"}
    return known.get(target.suffix.lower(), "table") if target is not None else "table"


def write(table: pa.Table, format: Format, target: Path | None = None, console: Console | None = None) -> None:
    """Write an answer in a format, to a file or to standard output; on a screen no text of it is obeyed.

    What Python, or Parquet, cannot hold, such as the year 99999 or an interval, is written as DuckDB's text of it.
    """
    table = _as_text(table, _fits_parquet if format == "parquet" else _fits_python)
    if format == "table":
        if target is None:
            return render_table(table, console)
        with target.open("w", encoding="utf-8") as file:
            return render_table(table, Console(file=file, width=160, highlight=False))
    if target is not None:
        with target.open("wb") as file:
            return _write_bytes(table, format, file)
    sys.stdout.flush()
    if format == "csv" and sys.stdout.isatty():
        table = _harmless(table)
    _write_bytes(table, format, sys.stdout.buffer)
    sys.stdout.buffer.flush()
    return None


def _as_text(table: pa.Table, fits: Callable[[pa.ChunkedArray], bool]) -> pa.Table:
    for place, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if not fits(column):
            table = table.set_column(place, name, _text_of(name, column))
    return table


def _text_of(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        with duckdb.connect() as connection:
            found = connection.from_arrow(pa.table({"x": column})).project("x::varchar as x").to_arrow_table()
    except (duckdb.Error, pa.ArrowException):
        raise UserError(f"{name} is of the type {column.type}, which cannot be written. Cast it to varchar.") from None
    return found.column(0)


def _fits_python(column: pa.ChunkedArray) -> bool:
    leaves = list(_leaves(column.type))
    if any(map(pa.types.is_interval, leaves)) or not any(map(pa.types.is_temporal, leaves)):
        return not any(map(pa.types.is_interval, leaves))
    try:
        for start in range(0, len(column), _ROWS_AT_ONCE):
            column.slice(start, _ROWS_AT_ONCE).to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        return False
    return True


def _fits_parquet(column: pa.ChunkedArray) -> bool:
    try:
        pq.write_table(pa.table({"x": column.slice(0, 0)}), io.BytesIO())
    except pa.ArrowException:
        return False
    return True


def _leaves(type: pa.DataType) -> Iterator[pa.DataType]:
    if not type.num_fields:
        yield type
    for place in range(type.num_fields):
        yield from _leaves(type.field(place).type)


def _write_bytes(table: pa.Table, format: Format, out: BinaryIO) -> None:
    """Some rows at a time: as Python objects they take many times the room they have in a table."""
    pieces = (table.slice(start, _ROWS_AT_ONCE) for start in range(0, len(table), _ROWS_AT_ONCE))
    match format:
        case "csv":
            out.write(_csv_header(table).encode())
            out.writelines(_csv_rows(piece).encode() for piece in pieces)
        case "json":
            out.writelines(text.encode() for text in _json_array(pieces))
        case "jsonl":
            out.writelines(to_json_lines(piece).encode() for piece in pieces)
        case _:
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd")
            out.write(buffer.getvalue())


def _harmless(table: pa.Table) -> pa.Table:
    """CSV has no way of its own to write a control character, as JSON has."""
    columns = [column if _is_number(column.type) else _harmless_column(column) for column in table.columns]
    return pa.table(columns, [sanitise(name) for name in table.column_names])


def _harmless_column(column: pa.ChunkedArray) -> pa.Array:
    cells = (None if value is None else _csv_text(value) for value in column.to_pylist())
    return pa.array([cell if cell is None else sanitise(cell) for cell in cells], pa.string())


def to_csv(table: pa.Table) -> str:
    """CSV whose text cells no spreadsheet takes for a formula: a leading = + - @, tab or break gets a '."""
    return _csv_header(table) + _csv_rows(table)


def _csv_header(table: pa.Table) -> str:
    return _csv_line([_no_formula(name) for name in table.column_names])


def _csv_rows(table: pa.Table) -> str:
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return "".join(_csv_line([_csv_cell(value) for value in row]) for row in rows)


def _csv_line(cells: list[object]) -> str:
    """The writer quotes a carriage return only where it is part of its line end."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow(cells)
    return out.getvalue().removesuffix("\r\n") + "\n"


def _csv_cell(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float, decimal.Decimal)):
        return value
    return _no_formula(_csv_text(value))


def _csv_text(value: object) -> str:
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _no_formula(text: str) -> str:
    return "'" + text if text.startswith(_FORMULA) else text


def to_json(table: pa.Table) -> str:
    """An array of objects, one row a line."""
    return "".join(_json_array([table]))


def _json_array(pieces: Iterable[pa.Table]) -> Iterator[str]:
    before = "[\n"
    for piece in pieces:
        for row in _json_rows(piece):
            yield before + row
            before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


def to_json_lines(table: pa.Table) -> str:
    return "".join(row + "\n" for row in _json_rows(table))


def _json_rows(table: pa.Table) -> list[str]:
    """Control and direction characters are escaped, so that the text is harmless in a terminal too."""
    rows = (json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) for row in table.to_pylist())
    return [HOSTILE.sub(lambda found: f"\\u{ord(found[0]):04x}", row) for row in rows]


def _plain(value: object) -> object:
    """A value JSON knows: bytes as hexadecimal digits, what is not finite as null."""
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case bytes():
            return value.hex()
        case float():
            return value if math.isfinite(value) else None
        case decimal.Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case datetime.date() | datetime.time():
            return value.isoformat()
        case None | bool() | int() | str():
            return value
    return str(value)
