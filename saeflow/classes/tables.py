"""A file or a select, as a table with one row per class and place, in the run's DuckDB connection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import duckdb

from saeflow.query.ask import planned
from saeflow.query.files.quoting import identifier, literal, unglobbed
from saeflow.runtime.errors import UserError
from saeflow.runtime.sql_errors import QUERY_ERRORS, is_of_system, message
from saeflow.runtime.temporary import blaming_temporary_folder
from saeflow.runtime.text import brief, sanitise

Place = Literal["tokens", "characters", "documents"]

MOST_CLASSES = 10_000
"""More classes than this are no classes: somebody named a column of texts or numbers `class`."""

LONGEST_CLASS = 200
"""Most characters of the name of a class."""

_NEEDED_COLUMNS: dict[Place, tuple[str, ...]] = {
    "tokens": ("token_id",), "characters": ("document", "start", "end"), "documents": ("document",),
}  # fmt: skip
_OPTIONAL_COLUMNS: dict[Place, tuple[str, ...]] = {
    "tokens": ("last_token_id", "end_token_id"), "characters": (), "documents": (),
}  # fmt: skip
_BATCH_ROWS = 1 << 16
_WAYS = (
    "Name the place in one of three ways: columns `document`, `start` and `end` (characters from 0, end not included); "
    "`token_id`, with `last_token_id` or `end_token_id` for a range; or `document` alone for whole documents."
)


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read, and how they name a place."""

    place: Place
    read: tuple[str, ...]
    """Names of the columns that are read, in small letters."""
    unread: tuple[str, ...]
    """Other columns of the table, as the table writes them."""


def columns_of(names: Sequence[str]) -> Columns:
    """Decide from the names of a table's columns how its rows name places. Capital letters do not matter.

    `token_id` goes before characters, and characters go before whole documents. Raises UserError.
    """
    known = {name.casefold() for name in names}
    if {"last_token_id", "end_token_id"} <= known:
        raise UserError("The table has last_token_id and end_token_id. Leave one of them out: both end a range.")
    place: Place = "tokens" if "token_id" in known else "characters" if {"start", "end"} & known else "documents"
    if lacking := [name for name in _NEEDED_COLUMNS[place] if name not in known]:
        listed = ", ".join(sanitise(brief(name, 40)) for name in names[:20])
        raise UserError(f"The table has no column {' and no '.join(lacking)}, but: {listed}.\n{_WAYS}")
    read = tuple(name for name in ("class", *_NEEDED_COLUMNS[place], *_OPTIONAL_COLUMNS[place]) if name in known)
    return Columns(place, read, tuple(name for name in names if name.casefold() not in read))


@contextlib.contextmanager
def opened_table(
    connection: duckdb.DuckDBPyConnection, file: Path | None, sql: str | None
) -> Iterator[duckdb.DuckDBPyRelation]:
    """Give the rows of a file, or of a select that only reads, as a relation of the connection. Raises UserError.

    A file is opened by a connection of its own: that of the run opens the store's files and nothing else.
    """
    if file is None or file.suffix.casefold() == ".sql":
        statement = sql or "" if file is None else _sql_in_file(file)
        with _saying("The select"), blaming_temporary_folder():
            yield planned(connection, statement.strip().rstrip(";"))
        return
    with contextlib.closing(duckdb.connect()) as reader, _saying(f"Reading {file}", of_store=False):
        rows = reader.sql(_sql_that_reads(file)).to_arrow_reader(_BATCH_ROWS)
        connection.register("annotate_file", rows)
        try:
            with blaming_temporary_folder():
                yield connection.table("annotate_file")
        finally:
            connection.unregister("annotate_file")


def _sql_in_file(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as SQL: {error}.") from error


def _sql_that_reads(file: Path) -> str:
    """Return SQL that reads a file of the user, chosen by the ending of its name."""
    if not file.is_file():
        raise UserError(f"There is no file {file}. Give a Parquet or CSV file, a .sql file, or --sql 'select …'.")
    path = literal(unglobbed(str(file.absolute())))
    suffixes = [suffix.casefold() for suffix in file.suffixes if suffix.casefold() not in (".gz", ".zst")]
    match suffixes[-1:]:
        case [".parquet"]:
            return f"from read_parquet({path}, hive_partitioning = false)"
        case [".csv"] | [".tsv"]:
            return f"from read_csv({path}, header = true, all_varchar = true, hive_partitioning = false)"
    raise UserError(f"{file} ends neither in .parquet nor in .csv, .tsv (also .gz, .zst) or .sql. Convert it to one.")


@contextlib.contextmanager
def _saying(what: str, of_store: bool = True) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except QUERY_ERRORS as error:
        if is_of_system(error):
            raise
        raise UserError(f"{what} failed.\n{message(error, of_store)}") from error


def store_rows(connection: duckdb.DuckDBPyConnection, rows: duckdb.DuckDBPyRelation, default: str) -> Columns:
    """Copy the rows into the table `annotate_rows`, and their classes into `annotate_classes`, numbered by name.

    A row without a class has the class `default`. A cell without a whole number becomes null; if it is not empty, the
    row is marked as `unreadable`. Raises UserError if there are no rows, or classes that are none.
    """
    found = columns_of(rows.columns)
    written = {name.casefold(): identifier(name) for name in rows.columns}
    given = f"nullif(trim({written['class']}::varchar), '')" if "class" in found.read else "null"
    cells, unreadable = [f"coalesce({given}, {literal(default)}) as class"], ["false"]
    for name in found.read:
        if name == "document":
            cells.append(f"{written[name]}::varchar as document")
        elif name != "class":
            number = _whole_number(written[name])
            cells.append(f"{number} as {identifier(name)}")
            unreadable.append(f"({number} is null and trim({written[name]}::varchar) <> '')")
    cells.append(f"coalesce({' or '.join(unreadable)}, false) as unreadable")
    rows.project(", ".join(cells)).create("annotate_rows")
    _number_classes(connection)
    return found


def _whole_number(cell: str) -> str:
    """Return SQL for a cell as a bigint; null for what is no whole number, where a plain cast would round."""
    return f"if(try_cast({cell} as bigint) = try_cast({cell} as double), try_cast({cell} as bigint), null)"


def _number_classes(connection: duckdb.DuckDBPyConnection) -> None:
    connection.execute(
        "create table annotate_classes as select class, row_number() over (order by class) - 1 as class_id "
        "from (select distinct class from annotate_rows)"
    )
    sql = "select count(*), max(length(class)), any_value(class) from annotate_classes"
    ((n_classes, longest, example),) = connection.execute(sql).fetchall()
    if n_classes == 0:
        raise UserError("The table has no rows, so there is nothing to annotate.")
    if n_classes > MOST_CLASSES:
        raise UserError(
            f"The column class has {n_classes:,} values, such as {sanitise(brief(example))!r}; at most "
            f"{MOST_CLASSES:,} classes are read.\nWhich column names the class? Call that one class."
        )
    if longest > LONGEST_CLASS:
        raise UserError(f"A class has {longest:,} characters; at most {LONGEST_CLASS} are read. Give it a short name.")
