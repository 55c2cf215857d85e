"""Write an answer: as a table on the terminal, or as CSV, JSON or Parquet."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from saeflow.cli.common import Format
from saeflow.cli.screen import render_table
from saeflow.cli.text_formats import ROWS_AT_ONCE, as_csv, as_json, as_json_lines, harmless_for_terminal
from saeflow.runtime.errors import UserError

TEXT_FORMATS = {"csv": as_csv, "json": as_json, "jsonl": as_json_lines}
FORMAT_OF_ENDING: dict[str, Format] = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet"}


def format_of(target: Path | None) -> Format:
    """Return the format that a file's ending names, or a table."""
    return "table" if target is None else FORMAT_OF_ENDING.get(target.suffix.lower(), "table")


def write_answer(table: pa.Table, format: Format, target: Path | None = None, console: Console | None = None) -> None:
    """Write an answer in a format, to a file or to standard output. A terminal obeys no text of it.

    Values that Python or Parquet cannot hold, such as the year 99999 or an interval, become DuckDB's text of them.
    """
    table = _replace_misfits(table, _fits_parquet if format == "parquet" else _fits_python)
    if format == "table":
        _write_table(table, target, console)
    elif target is not None:
        with target.open("wb") as file:
            _write_bytes(table, format, file)
    else:
        sys.stdout.flush()
        if format == "csv" and sys.stdout.isatty():
            table = harmless_for_terminal(table)
        _write_bytes(table, format, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _write_table(table: pa.Table, target: Path | None, console: Console | None) -> None:
    if target is None:
        return render_table(table, console)
    with target.open("w", encoding="utf-8") as file:
        return render_table(table, Console(file=file, width=160, highlight=False))


def _write_bytes(table: pa.Table, format: Format, out: BinaryIO) -> None:
    if format in TEXT_FORMATS:
        out.writelines(text.encode() for text in TEXT_FORMATS[format](table))
    else:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        out.write(buffer.getvalue())


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
