"""Write an answer: as a table on the terminal, or as CSV, JSON or Parquet."""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.cli.answers.screen import render_table
from saeflow.cli.common import Format, whole_file
from saeflow.query.text_formats import as_csv, as_json, as_json_lines, for_parquet, for_python, harmless_for_terminal
from saeflow.runtime.errors import UserError
from saeflow.runtime.terminal import Terminal, write_exactly
from saeflow.runtime.text import brief

TEXT_FORMATS = {"csv": as_csv, "json": as_json, "jsonl": as_json_lines}
FORMAT_OF_ENDING: dict[str, Format] = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet"}


def format_for(target: Path | None) -> Format:
    """Return the format that a file's ending names, or a table."""
    return "table" if target is None else FORMAT_OF_ENDING.get(target.suffix.lower(), "table")


def write_answer(table: pa.Table, format: Format, target: Path | None = None, console: Terminal | None = None) -> None:
    """Write an answer in a format, to a file or to standard output. A terminal obeys no text of it.

    Values that Python or Parquet cannot hold, such as the year 99999 or an interval, become DuckDB's text of them. Two
    columns of one name are refused: only a table on the terminal keeps them apart for a reader.
    """
    if format != "table":
        _refuse_equal_names(table)
    table = for_parquet(table) if format == "parquet" else for_python(table)
    if format == "table":
        _write_table(table, target, console)
    elif target is not None:
        with whole_file(target) as temporary, temporary.open("wb") as file:
            file.writelines(_encoded_pieces(table, format))
    else:
        write_exactly(
            _encoded_pieces(harmless_for_terminal(table) if format == "csv" and sys.stdout.isatty() else table, format)
        )


def _refuse_equal_names(table: pa.Table) -> None:
    for name, n in Counter(table.column_names).items():
        if n > 1:
            raise UserError(
                f"The answer has {n} columns called {brief(name)!r}; a reader of the file would take one for the "
                "other. Give each a name of its own in the query: select x as name."
            )


def _write_table(table: pa.Table, target: Path | None, console: Terminal | None) -> None:
    if target is None:
        render_table(table, console)
        return
    with whole_file(target) as temporary, temporary.open("w", encoding="utf-8") as file:
        render_table(table, Terminal(file=file, width=160))


def _encoded_pieces(table: pa.Table, format: Format) -> Iterator[bytes]:
    if format in TEXT_FORMATS:
        return (text.encode() for text in TEXT_FORMATS[format](table))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return iter([buffer.getvalue()])
