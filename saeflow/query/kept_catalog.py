"""Views and macros copied from a connection that was made before, by this process or an earlier one.

DuckDB takes a second to make those of one run, because it binds each anew with all that it reads. It copies them in a
hundredth of that. They are kept in the user's cache, where anything may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import duckdb

from saeflow.query.catalog import names_of_sources, sql_folder, upon_sources
from saeflow.query.files.quoting import identifier, literal
from saeflow.query.runs import Run
from saeflow.store.user_cache import is_foreign, make_private, user_cache

MOST_KEPT = 256
"""Runs whose views and macros are kept, about half a megabyte each."""

_many_follow = threading.Event()

_OF_ONE_TYPE = ("src_runs", "src_stages")
"""Views whose columns all readers see in one type, whatever their values are."""

_ATTACHED = "kept_catalog"
_UNFINISHED, _LEFT_SECONDS = "unfinished-", 3600


def expect_many_connections() -> None:
    """Keep what this process makes from the first time on: it will open runs again and again."""
    _many_follow.set()


def make_upon_sources(connection: duckdb.DuckDBPyConnection, read: Sequence[Run]) -> None:
    """Make all views and macros of runs whose views of files exist. What was kept is copied."""
    files = {run.schema: _file_of(connection, run) for run in read}
    made = [schema for schema, file in files.items() if _copied(connection, file)]
    for statement in upon_sources(read, made=made):
        connection.execute(statement)
    for schema, file in files.items():
        if schema not in made and file is not None:
            _keep_views(connection, schema, file)


def kept_folder() -> Path | None:
    """Return the folder of what is kept. None if the user has none that nobody else may write."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = user_cache() / "catalogs"
        make_private(folder, user_cache())
        return None if is_foreign(folder, user_cache()) else folder
    return None


def _file_of(connection: duckdb.DuckDBPyConnection, run: Run) -> Path | None:
    """Return the file of a run. Its name is a hash of all that the views and macros of the run depend on."""
    columns = _columns_of_views(connection, run)
    known = (duckdb.__version__, _hash_of_sql(), run.schema, run.encoded, run.skip_reason, run.looks_up, columns)
    folder = kept_folder()
    return folder and folder / f"{hashlib.sha256(repr(known).encode()).hexdigest()}.duckdb"


@cache
def _hash_of_sql() -> str:
    """Hash the files of `sql/`, and the code that puts names in front of them."""
    paths = [*sql_folder().rglob("*.sql"), *Path(__file__).parent.rglob("*.py")]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(paths))).hexdigest()


def _columns_of_views(connection: duckdb.DuckDBPyConnection, run: Run) -> str:
    """Return the names and types of the columns of a run's views of files."""
    views = (view for view in names_of_sources("view") if view not in _OF_ONE_TYPE)
    rows = (f"(select {view} from {identifier(run.schema)}.{view} limit 0)" for view in views)
    return str(connection.sql(f"select {', '.join(rows)}").types)


def _copied(connection: duckdb.DuckDBPyConnection, file: Path | None) -> bool:
    """Copy what a file keeps. False if it keeps nothing, or is damaged, in which case it goes."""
    if file is None or is_foreign(file, user_cache()) or not _has_bytes(file):
        return False
    try:
        with _attached(connection, file, "(read_only)"):
            connection.execute(f"copy from database {_ATTACHED} to memory (schema)")
    except duckdb.Error:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        return False
    with contextlib.suppress(OSError):  # deleted meanwhile, or read-only
        os.utime(file)
    return True


def _has_bytes(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except OSError:
        return False


def _keep_views(connection: duckdb.DuckDBPyConnection, schema: str, file: Path) -> None:
    """Keep a run's views and macros, but those of its files. The first time, an empty file says that they were made.

    Most runs are opened once only. Errors are of no account: then nothing is kept.
    """
    with contextlib.suppress(OSError, duckdb.Error):
        if not file.exists() and not _many_follow.is_set():
            file.touch(mode=0o600)
            return
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=file.parent) as folder:
            written = Path(folder) / file.name
            _write_views(connection, schema, written)
            written.chmod(0o600)
            written.replace(file)
        _tidy(file.parent)


def _write_views(connection: duckdb.DuckDBPyConnection, schema: str, file: Path) -> None:
    with _attached(connection, file):
        connection.execute(f"copy from database memory to {_ATTACHED} (schema)")
        every = connection.execute("select schema_name from duckdb_schemas() where not internal").fetchall()
        for other in {name for (name,) in every} - {schema, "main"}:
            connection.execute(f"drop schema if exists {_ATTACHED}.{identifier(other)} cascade")
        for kind in ("view", "macro"):
            for name in names_of_sources(kind):
                connection.execute(f"drop {kind} {_ATTACHED}.{identifier(schema)}.{name}")


def _tidy(folder: Path) -> None:
    """Drop what was used longest ago, and what killed processes left."""
    files = sorted(folder.glob("*.duckdb"), key=lambda file: file.stat().st_mtime)
    for file in files[:-MOST_KEPT]:
        file.unlink(missing_ok=True)
    for left in folder.glob(f"{_UNFINISHED}*"):
        if left.stat().st_mtime < time.time() - _LEFT_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _attached(connection: duckdb.DuckDBPyConnection, path: Path, options: str = "") -> Iterator[None]:
    connection.execute(f"attach {literal(str(path))} as {_ATTACHED} {options}")
    try:
        yield
    finally:
        connection.execute(f"detach {_ATTACHED}")
