"""Answers as CSV and JSON.

In CSV, no text cell starts a formula if the spreadsheet's separator is the comma. In JSON, control and direction
characters are escaped, so that the text is harmless in a terminal too. pyarrow's and DuckDB's own CSV and JSON writers
have no such guards, and write nested values, bytes, true and false differently.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.runtime.errors import UserError
from saeflow.runtime.text import HOSTILE, sanitise

ROWS_AT_ONCE = 10_000
"""Rows turned into text at a time: as Python objects they take many times their room in a table."""

_STARTS_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def is_number(type: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_decimal(type))


def as_csv(table: pa.Table, rows_at_once: int = ROWS_AT_ONCE) -> Iterator[str]:
    """Yield the table as CSV. A text cell that begins with = + - @, a tab or a line break gets a ' in front."""
    yield _csv_line([_no_formula(name) for name in table.column_names])
    for piece in _row_slices(table, rows_at_once):
        rows = zip(*(column.to_pylist() for column in piece.columns), strict=True)
        yield "".join(_csv_line([_csv_cell(value) for value in row]) for row in rows)


def as_json(table: pa.Table, rows_at_once: int = ROWS_AT_ONCE) -> Iterator[str]:
    """Yield the table as an array of objects, one row a line."""
    before = "[\n"
    for row in _json_rows(table, rows_at_once):
        yield before + row
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


def as_json_lines(table: pa.Table, rows_at_once: int = ROWS_AT_ONCE) -> Iterator[str]:
    """Yield the table as objects, one row a line."""
    for row in _json_rows(table, rows_at_once):
        yield row + "\n"


def for_python(table: pa.Table) -> pa.Table:
    """Return the table; columns that Python cannot hold, such as the year 99999, as DuckDB's text of them."""
    return _replace_misfits(table, _fits_python)


def for_parquet(table: pa.Table) -> pa.Table:
    """Return the table; columns that Parquet cannot hold, such as an interval, as DuckDB's text of them."""
    return _replace_misfits(table, _fits_parquet)


def harmless_for_terminal(table: pa.Table) -> pa.Table:
    """Return the table with its texts sanitised: CSV, unlike JSON, has no way to escape a control character."""
    columns = [column if is_number(column.type) else _sanitise_column(column) for column in table.columns]
    return pa.table(columns, [sanitise(name) for name in table.column_names])


def as_json_value(value: object) -> object:
    """Return a value that JSON knows: bytes as hexadecimal digits, and null for a number that is not finite."""
    match value:
        case dict():
            return {str(key): as_json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [as_json_value(item) for item in value]
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


def _row_slices(table: pa.Table, n_rows: int) -> Iterable[pa.Table]:
    return (table.slice(start, n_rows) for start in range(0, len(table), n_rows))


def _json_rows(table: pa.Table, rows_at_once: int) -> Iterator[str]:
    for piece in _row_slices(table, rows_at_once):
        for row in piece.to_pylist():
            text = json.dumps(as_json_value(row), ensure_ascii=False, allow_nan=False)
            yield HOSTILE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _csv_line(cells: list[object]) -> str:
    """Write one line. Python's writer quotes a carriage return only if its line end has one, so that is cut off."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow(cells)
    return out.getvalue().removesuffix("\r\n") + "\n"


def _csv_cell(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float, decimal.Decimal)):
        return value
    return _no_formula(_cell_as_text(value))


def _cell_as_text(value: object) -> str:
    plain = as_json_value(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _no_formula(text: str) -> str:
    return "'" + text if text.startswith(_STARTS_FORMULA) else text


def _sanitise_column(column: pa.ChunkedArray) -> pa.Array:
    cells = (None if value is None else _cell_as_text(value) for value in column.to_pylist())
    return pa.array([cell if cell is None else sanitise(cell) for cell in cells], pa.string())


def _replace_misfits(table: pa.Table, fits: Callable[[pa.ChunkedArray], bool]) -> pa.Table:
    """Replace columns that do not fit by DuckDB's text of them."""
    for place, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if not fits(column):
            table = table.set_column(place, name, _text_of_column(name, column))
    return table


def _text_of_column(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        with duckdb.connect() as connection:
            found = connection.from_arrow(pa.table({"x": column})).project("x::varchar as x").to_arrow_table()
    except (duckdb.Error, pa.ArrowException):
        raise UserError(f"{name} is of the type {column.type}, which cannot be written. Cast it to varchar.") from None
    return found.column(0)


def _fits_python(column: pa.ChunkedArray) -> bool:
    leaves = list(_leaf_types(column.type))
    if any(map(pa.types.is_interval, leaves)) or not any(map(pa.types.is_temporal, leaves)):
        return not any(map(pa.types.is_interval, leaves))
    try:
        for start in range(0, len(column), ROWS_AT_ONCE):
            column.slice(start, ROWS_AT_ONCE).to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        return False
    return True


def _fits_parquet(column: pa.ChunkedArray) -> bool:
    try:
        pq.write_table(pa.table({"x": column.slice(0, 0)}), io.BytesIO())
    except pa.ArrowException:
        return False
    return True


def _leaf_types(type: pa.DataType) -> Iterator[pa.DataType]:
    if not type.num_fields:
        yield type
    for place in range(type.num_fields):
        yield from _leaf_types(type.field(place).type)
