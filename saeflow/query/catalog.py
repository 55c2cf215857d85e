"""`catalog.sql`: a store's runs for DuckDB alone, with no saeflow installed. `duckdb -init store/catalog.sql`"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb

from saeflow import __version__
from saeflow.query.runs import Run, definitions, runs
from saeflow.runtime.text import brief, sanitise
from saeflow.store.files import replacing
from saeflow.store.lease import FileSlot
from saeflow.store.store import Store

NAME = "catalog.sql"
OLDEST_DUCKDB = "2.0"
"""With older ones it has not been tried."""

MOST_FILES = 100_000
"""Files of a run that are still worth reading at every start of a shell."""

_HEADER = re.compile(r"^--.*\n", re.MULTILINE)


def text(store: Store) -> str:
    """The views and macros of every readable run, the newest in use. Reads records, not values.

    Names and paths are literals or quoted identifiers; in a comment they are on one line, so that none of them can end
    it.
    """
    every = [_worth_reading(run) for run in runs(store)]
    readable = [run for run in every if run.problem is None]
    statements = definitions(every, readable[0]) if readable else iter(())
    return "\n".join([*_about(store, readable), *_left_out(every), "", *map(_ended, statements), ""])


def write(store: Store) -> Path | None:
    """Bring the store's `catalog.sql` up to date; returns it where it had to be changed.

    Anybody who switches a generation, or adds or removes a run or a file of labels, calls this afterwards. Of two that
    write at once the last one wins, and both are right about what they saw.
    """
    path = store.root / NAME
    with FileSlot(store.root / "tmp" / "locks" / "catalog.lease").guard():
        content = text(store).encode()
        if _present(store, path) == content:
            return None
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        store.send(path)
    return path


def _about(store: Store, readable: Sequence[Run]) -> Iterator[str]:
    """The comment at the top, each line by itself sanitised."""
    where = f"{store.name}/{NAME}" if store.objects is not None else str(store.root / NAME)
    local = "catalog.sql" if store.objects is not None else shlex.quote(where)
    lines = [
        "The runs of a saeflow store as views and macros of DuckDB, for a shell without saeflow:",
        f"    duckdb -init {local}",
        "Each run is a schema; the newest is in use. Then, for example: from runs;  from top_tokens(12);",
        f"Written by saeflow {__version__} with DuckDB {duckdb.__version__}; needs DuckDB {OLDEST_DUCKDB} or newer.",
        "It names the files of one generation by their full paths. saeflow writes it anew whenever it publishes; after",
        "moving the store type: saeflow catalog. Runs: " + (", ".join(run.schema for run in readable) or "none yet"),
    ]
    if store.objects is not None:
        lines += [
            "The files lie in an object store: copy this file here, and give the shell the extension httpfs (INSTALL "
            "httpfs;",
            "LOAD httpfs;) and your credentials (CREATE SECRET) before it is read.",
        ]
    yield from (f"-- {sanitise(line)}" for line in lines)


def _left_out(every: Sequence[Run]) -> Iterator[str]:
    for run in every:
        if run.problem is not None:
            yield f"-- Left out: {sanitise(run.artefact.id)}: {sanitise(brief(run.problem, 300))}"


def _worth_reading(run: Run) -> Run:
    n_files = sum(map(len, run.files.values()))
    if run.problem is not None or n_files <= MOST_FILES:
        return run
    problem = f"it has {n_files:,} files, more than a shell should read at its start; saeflow compact makes them few"
    return Run(run.artefact, run.schema, {}, problem=problem)


def _ended(statement: str) -> str:
    return _HEADER.sub("", statement).strip().removesuffix(";") + ";"


def _present(store: Store, path: Path) -> bytes | None:
    try:
        return (store.objects.fetch(path) if store.objects is not None else path).read_bytes()
    except FileNotFoundError:
        return None
