"""`catalog.sql`: a store's runs for DuckDB alone, without saeflow. Use it as `duckdb -init store/catalog.sql`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb

from saeflow import __version__
from saeflow.query.definitions import definitions
from saeflow.query.runs import Run, runs
from saeflow.runtime.text import brief, sanitise
from saeflow.store.files import replacing
from saeflow.store.store import Store

CATALOG = "catalog.sql"
OLDEST_DUCKDB = "2.0"
"""The oldest DuckDB that was tried."""

MOST_FILES = 100_000
"""A run with more files is left out: a shell would read them all at every start."""

_HEADER = re.compile(r"^--.*\n", re.MULTILINE)


def catalog_text(store: Store, most_files: int = MOST_FILES) -> str:
    """Return the views and macros of every readable run, with the newest in use. Reads records, no values.

    Names and paths are literals or quoted identifiers. In a comment they are on one line, so that none can end it.
    """
    every = [_without_many_files(run, most_files) for run in runs(store)]
    readable = [run for run in every if run.problem is None]
    statements = definitions(every, readable[0]) if readable else iter(())
    comment = [*_top_comment(store, readable), *_unreadable_runs(every)]
    return "\n".join([*comment, "", *map(_one_statement, statements), ""])


def write_catalog(store: Store) -> Path | None:
    """Bring the store's `catalog.sql` up to date. Returns its path if it had to be changed.

    Call this after switching a generation, and after adding or removing a run or a file of labels. If two processes
    write at once, the last one wins.
    """
    path = store.root / CATALOG
    with store.storage.locked("catalog"):
        content = catalog_text(store).encode()
        if _current_bytes(store, path) == content:
            return None
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        store.storage.send(path)
    return path


def _top_comment(store: Store, readable: Sequence[Run]) -> Iterator[str]:
    """Yield the comment at the top. Each line is sanitised by itself."""
    lines = [
        "The runs of a saeflow store as views and macros of DuckDB, for a shell without saeflow:",
        f"    duckdb -init {shlex.quote(store.storage.shell_name(store.root / CATALOG))}",
        "Each run is a schema; the newest is in use. Then, for example: from runs;  from top_tokens(12);",
        f"Written by saeflow {__version__} with DuckDB {duckdb.__version__}; needs DuckDB {OLDEST_DUCKDB} or newer.",
        "It names the files of one generation by their full paths. saeflow writes it anew whenever it publishes; after",
        "moving the store type: saeflow catalog. Runs: " + (", ".join(run.schema for run in readable) or "none yet"),
    ]
    yield from (f"-- {sanitise(line)}" for line in (*lines, *store.storage.duckdb_needs))


def _unreadable_runs(every: Sequence[Run]) -> Iterator[str]:
    for run in every:
        if run.problem is not None:
            yield f"-- Left out: {sanitise(run.artefact.id)}: {sanitise(brief(run.problem, 300))}"


def _without_many_files(run: Run, most_files: int) -> Run:
    n_files = sum(map(len, run.files.values()))
    if run.problem is not None or n_files <= most_files:
        return run
    problem = f"it has {n_files:,} files, more than a shell should read at its start; saeflow compact makes them few"
    return Run(run.artefact, run.schema, {}, problem=problem)


def _one_statement(statement: str) -> str:
    return _HEADER.sub("", statement).strip().removesuffix(";") + ";"


def _current_bytes(store: Store, path: Path) -> bytes | None:
    try:
        return store.storage.fetch(path).read_bytes()
    except FileNotFoundError:
        return None
