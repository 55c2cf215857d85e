"""A DuckDB connection with the runs of a store, and the checks of `sql/checks` over it.

A connection opens published files and nothing else on the machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from saeflow.query.catalog import (
    DUCKDB_SETTINGS,
    MANY_FILES,
    OF_EVERY_RUN,
    STAGING,
    begin_schema,
    in_use,
    names_in,
    runs_read,
    source_views,
    sql_folder,
    sql_texts,
    upon_sources,
    views_of_documents,
    with_what_they_read,
)
from saeflow.query.files.chosen import FileLists, keep_lists
from saeflow.query.files.quoting import identifier, literal, unglobbed
from saeflow.query.files.token_index import Documents, TokenIndex
from saeflow.query.files.token_texts import TokenTexts
from saeflow.query.files.vocabulary import Vocabulary
from saeflow.query.generations import generations, has_changed
from saeflow.query.kept_catalog import make_upon_sources
from saeflow.query.runs import Run, pick_run, run_of_parts, runs
from saeflow.runtime.errors import UserError
from saeflow.runtime.memory import total_memory
from saeflow.runtime.progress import Progress
from saeflow.runtime.sql_errors import QUERY_ERRORS, REPAIR, is_of_system, message, without_traceback
from saeflow.runtime.text import brief, sanitise
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord
from saeflow.store.store import Store

log = logging.getLogger(__name__)

KEPT = {
    "stg_vocab": 300_000,
    "src_vocab_blocks": 32_768,
    "stg_document_places": 200_000,
    "stg_feature_stats": 200_000,
    "stg_encoded_tokens": 200_000,
    "stg_parts": 1,
    "stg_shape": 1,
    "stg_size": 1,
}
"""Views held in memory if they have at most so many rows: up to 64 MB of blocks, for 17 million tokens."""

KEPT_BESIDE_INDEX = {"stg_document_places": 2_000_000}
"""Documents that are held where an index says which of them a token belongs to: 200 MB with keys of 30 letters."""

KEPT_FOR_PAGES = {
    "stg_summaries": 300_000, "feature_names": 300_000, "stg_feature_histogram": 4_000_000, "stg_labels": 300_000,
    "stg_rules": 300_000, "stg_explanation_scores": 300_000,
}  # fmt: skip
"""Views that lists of features read whole, or that every feature's page asks. They are worth their reading if a
connection answers many questions."""


def connect(
    store: Store,
    run: str | None = None,
    memory_limit: str | None = None,
    threads: int | None = None,
    names: Collection[str] | None = None,
) -> duckdb.DuckDBPyConnection:
    """Return an in-memory connection with one schema per run. `run` (default: the newest) is in the search path.

    Runs that cannot be read are left out; the log and the view `runs` say why. The connection opens the runs' published
    files and nothing else, and its settings can no longer be changed. DuckDB cannot forbid to write the files that it
    may open: give statements that are not your own to `query.ask.query`, which runs only those that read. `names`: only
    these views and macros, and what they read, because to make them all takes half a second for each run.
    """
    return connect_to_run(store, run, memory_limit, threads, names=names)[1]


def connect_to_run(
    store: Store,
    run: str | None = None,
    memory_limit: str | None = None,
    threads: int | None = None,
    many_files: int = MANY_FILES,
    for_pages: bool = False,
    names: Collection[str] | None = None,
) -> tuple[Run, duckdb.DuckDBPyConnection]:
    """Return the run, and its connection as `connect` gives it.

    `for_pages`: labels that change later are not seen, and only questions that are in `names` read several runs.
    """
    before, made = generations(store), False
    again = partial(connect_to_run, store, run, memory_limit, threads, many_files, for_pages, names)
    every = [replace(each, number=place) for place, each in enumerate(runs(store))]
    if any(each.problem for each in every) and has_changed(store, before):  # it may be of files that were removed
        return again()
    while not made:
        current, connection = pick_run(store, every, run), open_duckdb(store, memory_limit, threads)
        try:
            _make_views(connection, every, current, many_files, names, for_pages)
            made = True
        except QUERY_ERRORS as error:
            connection.close()
            if has_changed(store, before):
                return again()
            with _tables_as_written(store):
                every = _without_damaged(store, every, error)
    for skipped in (other for other in every if other.problem):
        log.warning("%s is left out: %s", sanitise(skipped.artefact.id), sanitise(brief(str(skipped.problem), 300)))
    _harden(connection, every)
    return current, connection


def _make_views(
    connection: duckdb.DuckDBPyConnection,
    every: Sequence[Run],
    current: Run,
    many_files: int = MANY_FILES,
    names: Collection[str] | None = None,
    for_pages: bool = False,
) -> None:
    wanted = None if names is None else with_what_they_read(names)
    read = runs_read(every, current, wanted, alone=for_pages)
    lists = [_make_sources(connection, each, every, many_files, wanted) for each in read]
    if wanted is not None:
        for statement in upon_sources(read, wanted):
            connection.execute(statement)
    else:
        make_upon_sources(connection, read)
        for name in OF_EVERY_RUN if for_pages else ():  # it would find no other run
            connection.execute(f"drop macro table {identifier(current.schema)}.{name}")
    keep_lists(connection, lists)
    for each in (run for run, its in zip(read, lists, strict=True) if its.kept):
        again = source_views(each, every, FileLists(each.number, in_variables=True), in_schema=True, wanted=wanted)
        for statement in (*begin_schema(each), again, *views_of_documents(each, wanted)):
            connection.execute(statement)  # only all files together tell the columns of documents
    for statement in in_use(current):
        connection.execute(statement)
    kept = KEPT | (KEPT_FOR_PAGES if for_pages else {}) | ({} if current.looks_up is None else KEPT_BESIDE_INDEX)
    used = kept if wanted is None else {*kept} & wanted - {"src_vocab_blocks"}  # one question reads them once
    _keep_small_views(connection, current, {view: n for view, n in kept.items() if view in used})


def _make_sources(
    connection: duckdb.DuckDBPyConnection,
    run: Run,
    every: Sequence[Run],
    many_files: int,
    wanted: frozenset[str] | None,
) -> FileLists:
    """Make the views of a run's files. If it has many, they read one file of each table until the lists are kept."""
    if run.looks_up is not None:
        files = run.artefact.storage.filesystem
        index = TokenIndex(run.vocab_id_files or (), Documents(run.files["documents"], files), files)
        index.register(connection, run.looks_up)
        vocabulary = Vocabulary(run.files["vocab"], files)
        TokenTexts(index, vocabulary, run.shape.get("context_length")).register(connection, run.looks_up)
    lists = FileLists(run.number, in_variables=sum(map(len, run.files.values())) > many_files)
    views = source_views(run, every, lists, in_schema=True, wanted=wanted)
    for statement in (*lists.outline(), *begin_schema(run), views):
        connection.execute(statement)
    return lists


def _without_damaged(store: Store, every: Sequence[Run], error: Exception) -> list[Run]:
    """Return the runs; those over whose files no view can be made say why. Raises the error if it is not theirs."""
    problems = {run.artefact: _problem_of_run(store, run) for run in every if run.problem is None}
    if not any(problems.values()):
        raise error
    return [replace(run, problem=run.problem or problems[run.artefact]) for run in every]


def _problem_of_run(store: Store, run: Run) -> str | None:
    with contextlib.closing(open_duckdb(store)) as connection:
        try:
            _make_views(connection, [run], run)
        except QUERY_ERRORS as error:
            why = without_traceback(str(error)).strip().partition("\n")[0]
            return f"its tables or those of its tokens are not as saeflow writes them: {brief(why, 300)}\n{REPAIR}"
    return None


def connect_parts(store: Store, artefact: Artefact, parts: Sequence[PartRecord]) -> duckdb.DuckDBPyConnection:
    """Return a connection that sees only these parts of a run, published or not, and their tokens: for the checks."""
    run = run_of_parts(store, artefact, parts)
    connection = open_duckdb(store)
    with _tables_as_written(store):
        read = with_what_they_read(names_in(path.read_text("utf-8") for path in _checks()))
        for statement in (source_views(run, [run]), *sql_texts(*STAGING, names=read), *DUCKDB_SETTINGS):
            connection.execute(statement)
    _harden(connection, [run])
    return connection


@contextlib.contextmanager
def _tables_as_written(store: Store) -> Iterator[None]:
    """Raises UserError if views cannot be made upon the tables: a column lacks, or is of another type."""
    try:
        yield
    except QUERY_ERRORS as error:
        if is_of_system(error):
            raise
        raise UserError(f"The tables of {store.name} are not as saeflow writes them.\n{message(error)}") from error


def open_duckdb(store: Store, memory_limit: str | None = None, threads: int | None = None) -> duckdb.DuckDBPyConnection:
    """Return an empty connection that can read the store's files, wherever they lie."""
    connection = duckdb.connect(config=_duckdb_config(memory_limit, threads or store.storage.n_query_threads))
    store.storage.register(connection)
    return connection


def _duckdb_config(memory_limit: str | None, threads: int | None) -> dict[str, Any]:
    """Half of the machine's memory by default. The spill folder is private: DuckDB lets every query write into it."""
    config: dict[str, Any] = {
        "temp_directory": os.path.join(tempfile.gettempdir(), f"saeflow-{uuid.uuid4().hex}"),
        "python_enable_replacements": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "memory_limit": memory_limit or f"{total_memory() // 2}B",
    }
    if threads is not None:
        config["threads"] = threads
    return config


def _keep_small_views(connection: duckdb.DuckDBPyConnection, run: Run, kept: Mapping[str, int]) -> None:
    """Hold in memory what nearly every question joins with; reading it anew would be most of a question's time."""
    schema = identifier(run.schema)
    for view, most_rows in kept.items():
        if _count_rows(connection, run, view) <= most_rows:
            connection.execute(f"create table {schema}.kept_{view} as from {schema}.{view}")
            connection.execute(f"drop view {schema}.{view}")
            connection.execute(f"alter table {schema}.kept_{view} rename to {view}")


def _count_rows(connection: duckdb.DuckDBPyConnection, run: Run, view: str) -> int:
    """Count a view's rows, of the largest by the records: to count them would open every file."""
    if view == "src_vocab_blocks" and run.looks_up is not None:
        return sys.maxsize  # no question reads many of them
    if view == "stg_document_places" and run.n_documents is not None:
        return run.n_documents
    ((n_rows,),) = connection.execute(f"select count(*) from {identifier(run.schema)}.{view}").fetchall()
    return int(n_rows)


def _harden(connection: duckdb.DuckDBPyConnection, every: Iterable[Run]) -> None:
    """Allow access to the published files alone; of a run of many files to the folders of its and its tokens' parts.

    Each is allowed in both spellings, because globs are checked, too. DuckDB takes 50 microseconds over each.
    """
    paths, folders = set[str](), set[str]()
    for run in every:
        files = {path for each in run.files.values() for path in each}
        if len(files) > MANY_FILES:
            folders |= {f"{path.rpartition('/parts/')[0]}/parts/" for path in files if "/parts/" in path}
            files = {path for path in files if "/parts/" not in path}
        paths |= files | {*run.annotations.values()}
        for beside in (run.probes, run.labels, run.beside_labels):
            paths |= {file.location for file in beside}
    for setting, allowed in (("allowed_paths", paths), ("allowed_directories", folders)):
        connection.execute(f"set {setting} = {literal(sorted(allowed | {unglobbed(path) for path in allowed}))}")
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")


def check(connection: duckdb.DuckDBPyConnection, limit: int = 1000) -> list[tuple[str, pa.Table]]:
    """Return each check with the rows that break it, at most `limit` of them. No rows is good."""
    return [(path.stem, _offending_rows(connection, path.read_text("utf-8"), path.stem, limit)) for path in _checks()]


def _checks() -> list[Path]:
    return sorted((sql_folder() / "checks").glob("*.sql"))


def _offending_rows(connection: duckdb.DuckDBPyConnection, sql: str, name: str, limit: int) -> pa.Table:
    try:
        return connection.sql(sql).limit(limit).to_arrow_table()
    except QUERY_ERRORS as error:
        if is_of_system(error):
            raise
        raise UserError(f"{name} failed.\n{message(error)}") from error


def parts_to_check(parts: Sequence[PartRecord], most_values: int) -> list[PartRecord]:
    """Return the last of these parts, with at most `most_values` values together, but at least one part; none if 0."""
    found: list[PartRecord] = []
    for part in reversed(parts):
        n_values = sum(each.counts["n_values"] for each in [*found, part])
        if most_values == 0 or (found and n_values > most_values):
            break
        found.append(part)
    return found[::-1]


def require_checks(
    store: Store, target: Artefact, parts: Sequence[PartRecord], most_values: int, progress: Progress
) -> None:
    """Check finished parts of a run before they are published.

    If they break a check, removes them, so that the next run makes them again, and raises UserError.
    """
    taken = parts_to_check(parts, most_values)
    if not taken:
        return
    n_values = sum(part.counts["n_values"] for part in taken)
    with (
        progress.bar("checks", n_values, "values") as bar,
        contextlib.closing(connect_parts(store, target, taken)) as db,
    ):
        broken = [f"{name} ({len(rows)} rows)" for name, rows in check(db) if len(rows)]
        bar.advance(n_values)
    if not broken:
        return
    for part in parts:
        target.remove(target.part_path(part))
    raise UserError(
        f"The parts just encoded for {target.id} break {len(broken)} checks: {', '.join(broken)}.\n"
        "They were removed, and none was published. Look for a failing disk or memory (saeflow verify --full), then "
        "run the same command again."
    )
