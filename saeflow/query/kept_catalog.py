"""Views and macros copied from a connection that this process made before.

DuckDB takes half a second to make those of one run, because it binds each anew with all that it reads. It copies them
in a hundredth of that.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import duckdb

from saeflow.query.catalog import names_of_sources, upon_sources
from saeflow.query.files.quoting import identifier, literal
from saeflow.query.runs import Run

MOST_KEPT = 64
"""Runs of which a process keeps this, about half a megabyte each."""

kept: dict[object, Path | None] = {}
"""The file of each run by what it depends on; none while it was made only once, as by most commands."""

_many_follow = threading.Event()

_OF_ONE_TYPE = ("src_runs", "src_stages")
"""Views whose columns all readers see in one type, whatever their values are."""

_ATTACHED = "kept_catalog"
_lock = threading.Lock()
_numbers = itertools.count()


def expect_many_connections() -> None:
    """Keep what this process makes from the first time on: it will open runs again and again."""
    _many_follow.set()


def make_upon_sources(connection: duckdb.DuckDBPyConnection, read: Sequence[Run]) -> None:
    """Make all views and macros of runs whose views of files exist. What was kept is copied."""
    keys = {run.schema: _key(connection, run) for run in read}
    with _lock:
        made = [schema for schema, key in keys.items() if _copied(connection, kept.get(key))]
    for statement in upon_sources(read, made=made):
        connection.execute(statement)
    with _lock:
        for schema, key in keys.items():
            if schema not in made:
                _keep_catalog(connection, schema, key)


def _key(connection: duckdb.DuckDBPyConnection, run: Run) -> object:
    """Return all that the views and macros of a run depend on."""
    return run.schema, run.encoded, run.skip_reason, run.document_start, _columns_of_views(connection, run)


def _columns_of_views(connection: duckdb.DuckDBPyConnection, run: Run) -> str:
    """Return the names and types of the columns of a run's views of files."""
    views = (view for view in names_of_sources("view") if view not in _OF_ONE_TYPE)
    rows = (f"(select {view} from {identifier(run.schema)}.{view} limit 0)" for view in views)
    return str(connection.sql(f"select {', '.join(rows)}").types)


def _copied(connection: duckdb.DuckDBPyConnection, path: Path | None) -> bool:
    if path is None or not path.is_file():
        return False
    with _attached(connection, path, "(read_only)"):
        connection.execute(f"copy from database {_ATTACHED} to memory (schema)")
    return True


def _keep_catalog(connection: duckdb.DuckDBPyConnection, schema: str, key: object) -> None:
    known = key in kept
    while len(kept) >= MOST_KEPT and not known:
        if (oldest := kept.pop(next(iter(kept)))) is not None:
            oldest.unlink(missing_ok=True)
    kept[key] = _written(connection, schema) if known or _many_follow.is_set() else None


def _written(connection: duckdb.DuckDBPyConnection, schema: str) -> Path | None:
    """Copy a run's views and macros, but those of its files, into a file. None if there is no room for it."""
    try:
        path = Path(_private_folder().name) / f"{next(_numbers)}.duckdb"
        with _attached(connection, path):
            connection.execute(f"copy from database memory to {_ATTACHED} (schema)")
            every = connection.execute("select schema_name from duckdb_schemas() where not internal").fetchall()
            for other in {name for (name,) in every} - {schema, "main"}:
                connection.execute(f"drop schema if exists {_ATTACHED}.{identifier(other)} cascade")
            for kind in ("view", "macro"):
                for name in names_of_sources(kind):
                    connection.execute(f"drop {kind} {_ATTACHED}.{identifier(schema)}.{name}")
    except (OSError, duckdb.Error):
        return None
    return path


@contextlib.contextmanager
def _attached(connection: duckdb.DuckDBPyConnection, path: Path, options: str = "") -> Iterator[None]:
    connection.execute(f"attach {literal(str(path))} as {_ATTACHED} {options}")
    try:
        yield
    finally:
        connection.execute(f"detach {_ATTACHED}")


@cache
def _private_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that nobody else may read, and that goes with the process."""
    return tempfile.TemporaryDirectory(prefix="saeflow-catalog-", ignore_cleanup_errors=True)
