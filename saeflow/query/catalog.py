"""The SQL that makes a store's runs askable: the files of `sql/`, with the paths of a run filled in.

A connection runs it here; `catalog.sql` holds it for DuckDB alone, without saeflow: `duckdb -init store/catalog.sql`.
No text of a user becomes SQL: names are quoted identifiers, values are literals.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from string import Template

import duckdb

from saeflow import __version__
from saeflow.features.schema import BESIDE_LABELS, PROBE_TABLES
from saeflow.query.files.chosen import FileLists
from saeflow.query.files.looked_up import looking_up
from saeflow.query.files.quoting import identifier, literal
from saeflow.query.files.relations import (
    outline,
    parts_relation,
    probe_relation,
    ranges_relation,
    relations,
    side_by_side,
    spans_relation,
)
from saeflow.query.labels import beside_labels_relation, labels_relation, rules_relation
from saeflow.query.runs import EVERY_RUN, SQL_VOCAB_ID, Run, pick_run, runs
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, sanitise
from saeflow.store.files import replacing
from saeflow.store.store import Store

DUCKDB_SETTINGS = ("set global parquet_metadata_cache = true", "set global asof_loop_join_threshold = 0")
"""Published files never change. And DuckDB's estimate would make it compare every document with every token: `global`,
so that the cursors of the pages have it, too."""

STAGING = ("functions", "staging")
"""Folders of `sql/` that come before `marts`."""

MANY_FILES = 1_000
"""A run with more files has its views made in outline first."""

_SIDE_BY_SIDE = ("stg_feature_stats", "stg_feature_major", "stg_token_major", "stg_tokens_in_blocks")
"""Views that exist for all runs side by side, too."""

OF_EVERY_RUN = frozenset({"compare_runs", "correlate_runs", "split_features"})
"""Questions that read several runs."""

_DOCUMENT_VIEWS = ("staging/stg_documents.sql", "marts/documents.sql")
"""Views that show whatever columns the documents have, which only all files together tell."""


def sql_folder() -> Path:
    """Return `sql/` of a clone, or the copy inside the installed package."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here.parent / "sql", here / "_sql"):
        if (folder / "sources.sql").is_file():
            return folder
    raise UserError("The folder sql/ is missing from this installation. Install saeflow again.")


def definitions(every: Sequence[Run], current: Run) -> Iterator[str]:
    """Yield SQL that makes a schema for each readable run and one for all of them, with `current` in the search path.

    A table macro looks names up in its caller's schema, so names inside it are qualified.
    """
    read = runs_read(every, current, None)
    yield from sources(every, read, MANY_FILES)
    yield from upon_sources(read)
    yield from at_last(every, current, read, MANY_FILES)


def runs_read(every: Sequence[Run], current: Run, wanted: Collection[str] | None, alone: bool = False) -> list[Run]:
    """Return the readable runs that these views and macros read. `alone`: all of them, but of the current run."""
    only_one = alone if wanted is None else OF_EVERY_RUN.isdisjoint(wanted)
    return [current] if only_one else [run for run in every if run.problem is None]


def sources(every: Sequence[Run], read: Sequence[Run], many_files: int) -> Iterator[str]:
    """Yield SQL that makes each run's schema and the views of its files, of a few of them if it has many."""
    for run in read:
        yield from begin_schema(run)
        yield source_views(_in_outline(run, many_files), every, in_schema=True)


def begin_schema(run: Run) -> Iterator[str]:
    yield f"create schema if not exists {identifier(run.schema)}"
    yield f"set search_path = {literal(identifier(run.schema))}"


def upon_sources(
    read: Sequence[Run], wanted: Collection[str] | None = None, made: Collection[str] = ()
) -> Iterator[str]:
    """Yield SQL that makes all that is made upon `sources`, but in the schemas that are `made`. It names no file."""
    to_make = [run for run in read if run.schema not in made]
    for run in to_make:
        yield from _in_schema(run, sql_texts(*STAGING, names=wanted))
    if wanted is None or not OF_EVERY_RUN.isdisjoint(wanted):
        yield from _views_of_every_run([run.schema for run in read], wanted)
    for run in to_make:
        yield from _in_schema(run, sql_texts("marts", names=wanted))


def at_last(
    every: Sequence[Run], current: Run, read: Sequence[Run], many_files: int, wanted: Collection[str] | None = None
) -> Iterator[str]:
    """Yield SQL that lets outlined views read all files, and that chooses the run and settings of the connection."""
    for run in read:
        if _in_outline(run, many_files) is not run:
            yield f"set search_path = {literal(identifier(run.schema))}"
            yield source_views(run, every, in_schema=True)
            yield from views_of_documents(run, wanted)
    yield from in_use(current)


def views_of_documents(run: Run, wanted: Collection[str] | None) -> Iterator[str]:
    """Yield SQL that makes anew the views that show whatever columns all files of documents have."""
    shown = (name for name in _DOCUMENT_VIEWS if wanted is None or Path(name).stem in wanted)
    yield from _in_schema(run, (_sql_of(sql_folder() / name) for name in shown))


def in_use(current: Run) -> Iterator[str]:
    """Yield SQL that chooses the run and the settings of a connection."""
    yield f"set search_path = {literal(identifier(current.schema))}"
    yield from DUCKDB_SETTINGS


def script_of_run(store: Store, run: str | None = None) -> str:
    """Return one run's `sql/` as text that the duckdb shell runs by hand."""
    every = runs(store)
    current = pick_run(store, every, run)
    views = [*sql_texts(*STAGING), *_views_of_every_run(["main"]), *sql_texts("marts")]
    return "\n".join([source_views(current, every), *views])


def source_views(
    run: Run,
    every: Sequence[Run],
    lists: FileLists | None = None,
    in_schema: bool = False,
    wanted: frozenset[str] | None = None,
) -> str:
    """Return `sql/sources.sql` with the run's files filled in. `lists` says how they are listed.

    `in_schema`: names inside macros have the run's schema in front. `wanted`: only these views and macros, because
    DuckDB opens a file to make a view.
    """
    text = Template(_sources_text(wanted))
    rows = literal([{"place": place} | other.row(run) for place, other in enumerate(every)])
    shape = {name: literal(value) for name, value in run.shape.items()}
    found = relations(run.files, run.left_out, run.hidden, lists)
    found["parts"] = parts_relation(run.parts)
    found["hidden_values"] = ranges_relation(run.left_out)
    found["annotations"] = spans_relation(run.annotations)
    found |= {table: probe_relation(run.probes, table) for table in PROBE_TABLES}
    if run.labels:
        found["labels"] = labels_relation(run.labels)
        found["rules"] = rules_relation(run.labels) or found["rules"]
    tokens = run.artefact.record.input("tokens") or ""
    found |= {table: beside_labels_relation(run.beside_labels, table, tokens) for table in BESIDE_LABELS}
    conditions = {"encoded": run.encoded, "skip_reason": run.skip_reason, "vocab_id": run.vocab_id_sql}
    if in_schema:
        conditions["vocab_id"] = identifier(run.schema).join(_around_names(run.vocab_id_sql))
    if run.roles:
        chosen = (
            f"select token_id from {found['tokens']} as spoken "
            f"where list_contains({literal(list(run.roles))}, spoken.role)"
        )
        conditions["encoded"] += f" and token in ({chosen})"
        conditions["skip_reason"] = f"coalesce({run.skip_reason}, case when token not in ({chosen}) then 'role' end)"
    known = {"runs": rows, "stages": _rows(run.stages), "settings": _rows(run.settings)}
    return text.substitute(found, hidden=literal([*map(int, run.hidden)]), **known, **conditions, **shape)


@cache
def _sources_text(wanted: frozenset[str] | None) -> str:
    """Return `sql/sources.sql` without the views and macros that are not wanted."""
    statements = _sql_of(sql_folder() / "sources.sql").split(";\n")
    made = [re.search(r"^create or replace (?:view|macro) (\w+)", each, re.MULTILINE) for each in statements]
    kept = (wanted is None or name is None or name[1] in wanted for name in made)
    return ";\n".join(itertools.compress(statements, kept))


def _rows(rows: Sequence[Mapping[str, object]]) -> str:
    return literal([dict(row) for row in rows])


def sql_texts(*folders: str, names: Collection[str] | None = None) -> Iterator[str]:
    """Yield the files of folders of `sql/`, or those of these names, so that what a macro reads exists before it."""
    paths = [path for folder in folders for path in (sql_folder() / folder).glob("*.sql")]
    for path in sorted(paths, key=lambda path: path.name):
        if names is None or path.stem in names:
            yield _sql_of(path)


@cache
def _sql_of(path: Path) -> str:
    """Return a file of `sql/`. An installation does not change while it runs."""
    return path.read_text("utf-8")


def with_what_they_read(names: Collection[str]) -> frozenset[str]:
    """Return the names of these views and macros of `sql/`, and of all that they read."""
    found, waiting = set[str](), set(names)
    while waiting:
        found |= waiting
        waiting = {each for name in waiting for each in _read_by().get(name, ())} - found
    return frozenset(found)


@cache
def _read_by() -> dict[str, frozenset[str]]:
    """Map each view and macro of `sql/` to the names in its text."""
    paths = [path for path in sql_folder().glob("*/*.sql") if path.parent.name != "checks"]
    texts = {path.stem: path.read_text("utf-8") for path in paths} | {"src_vocab_id": SQL_VOCAB_ID}
    return {name: names_in([text]) for name, text in texts.items()}


def names_in(texts: Iterable[str]) -> frozenset[str]:
    """Return the names of views and macros of `sql/` in these statements."""
    words = (re.findall(r"\w+", _HEADER.sub("", text)) for text in texts)
    return names_of_sql() & frozenset(word for found in words for word in found)


def _in_outline(run: Run, many_files: int) -> Run:
    """Return the run with a few of its files, if it has many.

    For every view and macro made upon a view, DuckDB looks at all files of that view again. The other files come when
    everything is made.
    """
    if sum(map(len, run.files.values())) <= many_files:
        return run
    return replace(run, files=outline(run.files))


def _in_schema(run: Run, texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts with the schema in front of every name of `sql/`."""
    schema = identifier(run.schema)
    yield f"set search_path = {literal(schema)}"
    for text in texts:
        yield schema.join(_around_names(text if run.looks_up is None else looking_up(text, run.looks_up)))


@cache
def _around_names(text: str) -> list[str]:
    """Return the pieces of a file of `sql/` between which a schema belongs: in front of each name."""
    return _pattern_of_names().sub(lambda name: f"\0.{name[0]}", text).split("\0")


def _views_of_every_run(schemas: Sequence[str], wanted: Collection[str] | None = None) -> Iterator[str]:
    yield f"create schema if not exists {EVERY_RUN};"
    for view in (view for view in _SIDE_BY_SIDE if wanted is None or view in wanted):
        yield f"create or replace view {EVERY_RUN}.{view} as {side_by_side(schemas, view)};"


@cache
def names_of_sql() -> frozenset[str]:
    """Return the names of the views and macros that the files of `sql/` make."""
    stems = [path.stem for path in sql_folder().glob("*/*.sql") if path.parent.name != "checks"]
    return frozenset([*stems, *names_of_sources("view"), *names_of_sources("macro")])


@cache
def names_of_sources(kind: str) -> tuple[str, ...]:
    """Return the names of each `view` or `macro` that `sources.sql` makes."""
    text = (sql_folder() / "sources.sql").read_text("utf-8")
    return tuple(re.findall(rf"\bor replace {kind} (\w+)", text))


@cache
def _pattern_of_names() -> re.Pattern[str]:
    either = "|".join(sorted(names_of_sql(), key=lambda name: (-len(name), name)))
    return re.compile(rf"(?<=\bfrom )(?:{either})\b|(?<=\bjoin )(?:{either})\b|(?<![\w.\"'])(?:{either})(?=\()")


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
    problems = [(run.artefact.id, run.problem) for run in every if run.problem is not None]
    left_out = (f"-- Left out: {sanitise(name)}: {sanitise(brief(why, 300))}" for name, why in problems)
    texts = (_HEADER.sub("", each).strip().removesuffix(";") + ";" for each in statements)
    return "\n".join([*_top_comment(store, readable), *left_out, "", *texts, ""])


def write_catalog(store: Store) -> Path | None:
    """Bring the store's `catalog.sql` up to date. Returns its path if it had to be changed.

    Call this after switching a generation, and after adding or removing a run or a file of labels. If two processes
    write at once, the last one wins.
    """
    path = store.root / CATALOG
    with store.storage.locked("catalog"):
        content = catalog_text(store).encode()
        with contextlib.suppress(FileNotFoundError):
            if store.storage.fetch(path).read_bytes() == content:
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


def _without_many_files(run: Run, most_files: int) -> Run:
    n_files = sum(map(len, run.files.values()))
    if run.problem is not None or n_files <= most_files:
        return run
    problem = f"it has {n_files:,} files, more than a shell should read at its start; saeflow compact makes them few"
    return Run(run.artefact, run.schema, {}, problem=problem)
