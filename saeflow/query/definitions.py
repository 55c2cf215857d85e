"""The SQL that makes a store's runs askable: the files of `sql/`, with the paths of a run filled in.

No text of a user becomes SQL here: names are quoted identifiers, values are literals.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from string import Template

from saeflow.query.labels import labels_relation
from saeflow.query.relations import identifier, literal, outline, relations, side_by_side
from saeflow.query.runs import EVERY_RUN, Run, pick_run, runs
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store

DUCKDB_SETTINGS = ("set parquet_metadata_cache = true", "set asof_loop_join_threshold = 0")
"""Published files never change. And DuckDB's estimate would make it compare every document with every token."""

MANY_FILES = 1_000
"""A run with more files has its views made in outline first."""

_OF_DOCUMENTS = ("staging/stg_documents.sql", "marts/documents.sql")
"""Views that show whatever columns the documents have, which only all files together tell."""


def sql_folder() -> Path:
    """Return `sql/` of a clone, or the copy inside the installed package."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here.parent / "sql", here / "_sql"):
        if (folder / "sources.sql").is_file():
            return folder
    raise UserError("The folder sql/ is missing from this installation. Install saeflow again.")


def definitions(every: Sequence[Run], current: Run, many_files: int = MANY_FILES) -> Iterator[str]:
    """Yield SQL that makes a schema for each readable run and one for all of them, with `current` in the search path.

    A table macro looks names up in its caller's schema, so names inside it are qualified.
    """
    readable = [run for run in every if run.problem is None]
    for run in readable:
        yield f"create schema if not exists {identifier(run.schema)}"
        yield f"set search_path = {literal(identifier(run.schema))}"
        yield source_views(_in_outline(run, many_files), every)
        yield from _in_schema(run, staging())
    yield from _views_of_every_run([run.schema for run in readable])
    for run in readable:
        yield from _in_schema(run, marts())
    for run in readable:
        if _in_outline(run, many_files) is not run:
            yield f"set search_path = {literal(identifier(run.schema))}"
            yield source_views(run, every)
            yield from _in_schema(run, ((sql_folder() / name).read_text("utf-8") for name in _OF_DOCUMENTS))
    yield f"set search_path = {literal(identifier(current.schema))}"
    yield from DUCKDB_SETTINGS


def script_of_run(store: Store, run: str | None = None) -> str:
    """Return one run's `sql/` as text that the duckdb shell runs by hand."""
    every = runs(store)
    current = pick_run(store, every, run)
    return "\n".join([source_views(current, every), *staging(), *_views_of_every_run(["main"]), *marts()])


def source_views(run: Run, every: Sequence[Run]) -> str:
    """Return `sql/sources.sql` with the run's files filled in."""
    text = Template((sql_folder() / "sources.sql").read_text("utf-8"))
    rows = literal([other.row(run) for other in every])
    shape = {name: literal(value) for name, value in run.shape.items()}
    found = relations(run.files, run.left_out, run.hidden)
    if run.labels:
        found["labels"] = labels_relation(run.labels)
    return text.substitute(found, runs=rows, hidden=literal(list(run.hidden)), encoded=run.encoded, **shape)


def staging() -> Iterator[str]:
    """Yield `sql/functions` and `sql/staging` by file name, so that what a macro reads exists before it."""
    yield from _sql_texts("functions", "staging")


def marts() -> Iterator[str]:
    """Yield `sql/marts` in the order of the file names."""
    yield from _sql_texts("marts")


def _sql_texts(*folders: str) -> Iterator[str]:
    paths = [path for folder in folders for path in (sql_folder() / folder).glob("*.sql")]
    for path in sorted(paths, key=lambda path: path.name):
        yield path.read_text("utf-8")


def _in_outline(run: Run, many_files: int) -> Run:
    """Return the run with a few of its files, if it has many.

    For every view and macro made upon a view, DuckDB looks at all files of that view again. The other files come when
    everything is made.
    """
    if sum(map(len, run.files.values())) <= many_files:
        return run
    return replace(run, files=outline(run.files))


def _in_schema(run: Run, texts: Iterable[str]) -> Iterator[str]:
    schema = identifier(run.schema)
    yield f"set search_path = {literal(schema)}"
    yield from (_qualified(text, schema) for text in texts)


def _views_of_every_run(schemas: Sequence[str]) -> Iterator[str]:
    yield f"create schema if not exists {EVERY_RUN};"
    for view in ("stg_feature_stats", "stg_token_major"):
        yield f"create or replace view {EVERY_RUN}.{view} as {side_by_side(schemas, view)};"


def _qualified(sql: str, schema: str) -> str:
    """Put the schema in front of every name of `sql/` in a statement."""
    return _names_of_sql(sql_folder()).sub(lambda name: f"{schema}.{name[0]}", sql)


@cache
def _names_of_sql(folder: Path) -> re.Pattern[str]:
    stems = [path.stem for path in folder.glob("*/*.sql") if path.parent.name != "checks"]
    stems += re.findall(r"create or replace (?:view|macro) (\w+)", (folder / "sources.sql").read_text("utf-8"))
    either = "|".join(sorted(stems, key=len, reverse=True))
    return re.compile(rf"(?<=\bfrom )(?:{either})\b|(?<=\bjoin )(?:{either})\b|(?<![\w.\"'])(?:{either})(?=\()")
