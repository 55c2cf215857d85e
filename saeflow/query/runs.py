"""Runs as DuckDB sees them: one schema each, with the files of `sql/` loaded, and a hardened connection.

No text of a user becomes SQL here. The connection can read the published files of the store's runs and
nothing else on the machine.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import duckdb
import pyarrow as pa

from saeflow.corpus.vocabulary import special_ids
from saeflow.features.coverage import covered, has_every_table, hidden_in, token_ranges
from saeflow.features.schema import ORDERS, PART_TABLES, RUN_TABLES
from saeflow.query.bucket_files import ObjectFiles
from saeflow.query.labels import LabelFile, label_files, labels_relation
from saeflow.query.relations import (
    condition_of_encoded,
    identifier,
    literal,
    outline,
    relations,
    side_by_side,
    unglobbed,
)
from saeflow.recipe.settings import TOP_FAMILY
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import HOSTILE, brief, sanitise
from saeflow.store.artefact import Artefact
from saeflow.store.records import Generation, PartRecord, read_checked
from saeflow.store.store import Store
from saeflow.store.verify import damage

log = logging.getLogger(__name__)

SETTINGS = ("set parquet_metadata_cache = true", "set asof_loop_join_threshold = 0")
"""Files never change; and by a wrong guess DuckDB would compare every document with every token."""

KEPT = {
    "src_vocab": 200_000,
    "src_vocab_blocks": 32_768,
    "stg_document_places": 200_000,
    "stg_feature_stats": 200_000,
}
"""Tables that a connection holds in memory, and with how many rows at most: 64 MB of blocks, for 17 million tokens."""

MANY_FILES = 1_000
"""From so many files of a run on, its views are made in outline first."""

_OF_DOCUMENTS = ("staging/stg_documents.sql", "marts/documents.sql")
"""Views with whatever columns the documents have, which only all files together tell."""

_EVERY_RUN = "every_run"
_RESERVED = {_EVERY_RUN, "memory", "main", "temp", "system", "pg_catalog", "information_schema"}
_UNREADABLE = (UserError, OSError, ValueError, KeyError, AttributeError, TypeError, pa.ArrowException)
"""What a missing, cut or nonsensical record raises."""


@dataclass(frozen=True)
class Run:
    """One run of the store as SQL sees it: its schema, its files by table, and what is wrong with it."""

    artefact: Artefact
    schema: str
    files: Mapping[str, Sequence[str]]
    facts: str | None = None
    quality: str | None = None
    n_tokens: int | None = None
    hidden: Sequence[int] = ()
    """Documents that were forgotten or replaced."""
    left_out: Sequence[tuple[int, int]] = ()
    """Tokens, first and last, of which nothing is shown until they are encoded again."""
    shape: Mapping[str, int | None] = field(default_factory=dict)
    """Context length and number of features."""
    encoded: str = "true"
    """SQL on `token` and `entry`: was the token encoded, so that no value means that no feature fired?"""
    labels: Sequence[LabelFile] = ()
    problem: str | None = None

    def is_called(self, name: str) -> bool:
        artefact = self.artefact
        return name in (self.schema, artefact.id, f"{artefact.name}-{artefact.fp}", f"{artefact.name}_{artefact.fp}")

    def row(self, current: Run) -> dict[str, object]:
        return {
            "name": self.artefact.name,
            "fp": self.artefact.fp,
            "schema_name": self.schema,
            "is_current": self is current,
            "n_tokens": self.n_tokens,
            "tokens_artefact": tokens_of(self.artefact) if self.problem is None else None,
            "facts": self.facts,
            "quality": self.quality,
            "problem": self.problem,
        }


def sql_folder() -> Path:
    """`sql/` of a clone, or the copy inside the installed package."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here.parent / "sql", here / "_sql"):
        if (folder / "sources.sql").is_file():
            return folder
    raise UserError("The folder sql/ is missing from this installation. Install saeflow again.")


def runs(store: Store) -> list[Run]:
    """Every run of the store, the newest first; one that cannot be read says so in `problem`.

    The newest readable run of a name has the name as its schema, all others `name_fp`. To DuckDB `Demo` is `demo`: of
    names that differ in nothing else the newest run has its own, too.
    """
    found: list[Run] = []
    for artefact in reversed(store.artefacts("features")):
        taken = {run.schema.casefold() for run in found} | _RESERVED
        full_name = f"{artefact.name}_{artefact.fp}"
        full_names = (full_name, *(f"{full_name}_{number}" for number in range(2, len(found) + 3)))
        try:
            found.append(_readable(store, artefact, _free([artefact.name, *full_names], taken)))
        except _UNREADABLE as error:
            schema = _free(full_names, taken)
            found.append(Run(artefact, schema, {}, problem=str(error) or type(error).__name__))
    return found


def _free(names: Iterable[str], taken: set[str]) -> str:
    return next(name for name in names if name.casefold() not in taken)


def connect(
    store: Store, run: str | None = None, memory_limit: str | None = None, threads: int | None = None
) -> duckdb.DuckDBPyConnection:
    """An in-memory connection with one schema per run; `run` (default: the newest) is in the search path.

    Runs that cannot be read are left out with a note in the log and in the view `runs`. The connection
    reads the runs' published files and nothing else, and its settings can no longer be changed.
    """
    return open_run(store, run, memory_limit, threads)[1]


def open_run(
    store: Store, run: str | None = None, memory_limit: str | None = None, threads: int | None = None
) -> tuple[Run, duckdb.DuckDBPyConnection]:
    """The run, and its connection as `connect` gives it."""
    every = runs(store)
    for skipped in (other for other in every if other.problem):
        log.warning("%s is left out: %s", sanitise(skipped.artefact.id), sanitise(brief(str(skipped.problem), 300)))
    current = _choose(store, every, run)
    connection = _opened(store, memory_limit, threads)
    for statement in definitions(every, current):
        connection.execute(statement)
    _keep_small_tables(connection, current)
    _harden(connection, every)
    return current, connection


def _opened(store: Store, memory_limit: str | None = None, threads: int | None = None) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config=_settings(memory_limit, threads))
    if store.objects is not None:
        connection.register_filesystem(ObjectFiles(store.objects))
    return connection


def connect_parts(store: Store, artefact: Artefact, parts: Sequence[PartRecord]) -> duckdb.DuckDBPyConnection:
    """A connection that sees only these parts of a run, published or not, and their tokens: for the checks."""
    tokens = store.by_id(next(name for name in artefact.record.inputs if name.startswith("tokens/")))
    generation = tokens.published()
    known = {index for part in parts for index in covered(part)}
    run = Run(
        artefact,
        artefact.name,
        _tables(artefact, parts, tokens, [part for part in generation.parts if part.index in known]),
        facts=json.dumps(artefact.record.facts),
        hidden=generation.hidden_ids,
        shape=_shape(artefact, tokens, parts),
    )
    connection = _opened(store)
    for statement in (_sources(run, [run]), *_texts("staging"), *SETTINGS):
        connection.execute(statement)
    _harden(connection, [run])
    return connection


def _keep_small_tables(connection: duckdb.DuckDBPyConnection, run: Run) -> None:
    """Hold in memory what nearly every question joins with: reading it anew takes longer than the rest of a short
    one."""
    schema = identifier(run.schema)
    for view, most_rows in KEPT.items():
        if connection.execute(f"select count(*) from {schema}.{view}").fetchall()[0][0] <= most_rows:
            connection.execute(f"create table {schema}.kept_{view} as from {schema}.{view}")
            connection.execute(f"drop view {schema}.{view}")
            connection.execute(f"alter table {schema}.kept_{view} rename to {view}")


def chosen(store: Store, name: str | None = None) -> Run:
    """The run of this name, or the newest. Raises UserError where it cannot be read."""
    return _choose(store, runs(store), name)


def definitions(every: Sequence[Run], current: Run) -> Iterator[str]:
    """SQL that makes a schema of each readable run and one of all of them; `current` is in the search path.

    A table macro looks names up in its caller's schema, so names in it are qualified.
    """
    readable = [run for run in every if run.problem is None]
    for run in readable:
        yield f"create schema if not exists {identifier(run.schema)}"
        yield f"set search_path = {literal(identifier(run.schema))}"
        yield _sources(_in_outline(run), every)
        yield from _in_schema(run, _texts("staging"))
    yield from _side_by_side([run.schema for run in readable])
    for run in readable:
        yield from _in_schema(run, _texts("marts"))
    for run in readable:
        if _in_outline(run) is not run:
            yield f"set search_path = {literal(identifier(run.schema))}"
            yield _sources(run, every)
            yield from _in_schema(run, ((sql_folder() / name).read_text("utf-8") for name in _OF_DOCUMENTS))
    yield f"set search_path = {literal(identifier(current.schema))}"
    yield from SETTINGS


def _in_outline(run: Run) -> Run:
    """The run with a few of its files: DuckDB looks at all files of a view again for every view and macro made upon it.

    The others come when all are made.
    """
    if sum(map(len, run.files.values())) <= MANY_FILES:
        return run
    return replace(run, files=outline(run.files))


def _in_schema(run: Run, texts: Iterable[str]) -> Iterator[str]:
    schema = identifier(run.schema)
    yield f"set search_path = {literal(schema)}"
    yield from (_qualified(text, schema) for text in texts)


def script(store: Store, run: str | None = None) -> str:
    """One run's `sql/` as text that the duckdb shell runs by hand."""
    every = runs(store)
    current = _choose(store, every, run)
    return "\n".join([_sources(current, every), *_texts("staging"), *_side_by_side(["main"]), *_texts("marts")])


def _readable(store: Store, artefact: Artefact, schema: str) -> Run:
    if HOSTILE.search(artefact.id) or not artefact.id.isprintable():
        raise UserError("its name holds characters that a terminal obeys")
    source = tokens_of(artefact)
    if source is None:
        raise UserError(f"{artefact.id} does not say which tokens it belongs to")
    tokens = store.by_id(source)
    generation = tokens.published()
    shown = _shown(artefact, generation)
    files = _tables(artefact, shown, tokens, generation.parts)
    for found in (each for item in (artefact, tokens) for each in damage(item, full=False)):
        raise UserError(found.problem)
    for table in (*ORDERS, "feature_stats", "tokens", "documents", "vocab"):
        if not files[table] or not (store.objects or Path(files[table][0]).is_file()):
            raise UserError(f"{artefact.id} has no {table} files")
    quality = artefact.path / "quality.json"
    n_tokens = sum(part.counts.get("n_tokens", 0) for part in shown) or generation.total("n_tokens")
    return Run(
        artefact,
        schema,
        files,
        facts=json.dumps(artefact.record.facts | _sae_facts(store, artefact)),
        quality=json.dumps(read_checked(quality)) if quality.is_file() else None,
        n_tokens=n_tokens or None,
        hidden=generation.hidden_ids,
        left_out=_left_out(shown, tokens, generation),
        shape=_shape(artefact, tokens, shown),
        encoded=_encoded(artefact, shown, tokens, generation),
        labels=label_files(store, sae) if (sae := sae_of(artefact)) else (),
    )


def _tables(
    artefact: Artefact, shown: Sequence[PartRecord], tokens: Artefact, token_parts: Sequence[PartRecord]
) -> dict[str, Sequence[str]]:
    """Files of a run by table: of its parts, of the parts of the tokens, and those beside the parts."""
    own = {file.name for file in artefact.record.files}
    beside = (table for table in RUN_TABLES if f"{table}.parquet" in own)
    return {
        **_files(artefact, shown, [*ORDERS, *PART_TABLES]),
        **_files(tokens, token_parts, ["tokens", "documents", "vocab_blocks"]),
        "vocab": [tokens.location(tokens.path / "vocab.parquet")],
        **{table: [artefact.location(artefact.path / f"{table}.parquet")] for table in beside},
    }


def _shape(artefact: Artefact, tokens: Artefact, shown: Sequence[PartRecord]) -> dict[str, int | None]:
    return {
        "context_length": tokens.record.facts.get("context_length"),
        "n_features": artefact.record.facts.get("n_features"),
        "has_marginals": all(map(has_every_table, shown)),
    }


def tokens_of(artefact: Artefact) -> str | None:
    """The tokens that a run was encoded from, as `tokens/<name>-<fp>`."""
    return next((name for name in artefact.record.inputs if name.startswith("tokens/")), None)


def sae_of(artefact: Artefact) -> str | None:
    """The SAE whose features a run holds, as `saes/<name>-<fp>`."""
    return next((name for name in artefact.record.inputs if name.startswith("saes/")), None)


def _sae_facts(store: Store, artefact: Artefact) -> dict[str, Any]:
    """Architecture of the run's SAE, and the k that was asked for, as far as known."""
    for sae in (store.by_id(name) for name in artefact.record.inputs if name.startswith("saes/")):
        with contextlib.suppress(*_UNREADABLE):
            facts = sae.record.facts
            architecture = facts["sae"]["architecture"]
            aims = architecture == "jumprelu" and facts["sae"].get("penalty", "l0") == "l0" and "imported" not in facts
            has_k = architecture in TOP_FAMILY or aims
            return {"architecture": architecture, "k": facts["sae"]["k"] if has_k else None}
    return {}


def _shown(artefact: Artefact, tokens: Generation) -> list[PartRecord]:
    """The run's parts without those that still hold values of a document forgotten since."""
    every = artefact.published().parts
    stale = {part.folder: _stale(part, tokens) for part in every}
    shown = [part for part in every if len(stale[part.folder]) < len(covered(part))]
    n_stale = sum(map(len, stale.values()))
    if n_stale:
        log.warning(
            "%s: %d parts are left out, because they hold documents that were forgotten or replaced since. "
            "Encode them again: saeflow encode RECIPE",
            artefact.id,
            n_stale,
        )
    return shown


def _stale(part: PartRecord, tokens: Generation) -> list[int]:
    """Activation parts in which documents were hidden since their values were written."""
    return [i for i, digest in covered(part).items() if hidden_in(digest) != tokens.hidden_digest(i)]


def _left_out(shown: Iterable[PartRecord], tokens: Artefact, generation: Generation) -> list[tuple[int, int]]:
    """Tokens, first and last, whose values in a compacted part are not to be seen."""
    length = int(tokens.record.facts.get("context_length", 1))
    counts = {part.index: part.counts for part in generation.parts}
    stale = sorted(i for part in shown for i in _stale(part, generation) if i in counts)
    first = {i: counts[i]["first_sequence"] * length for i in stale}
    return [(first[i], first[i] + counts[i]["n_sequences"] * length - 1) for i in stale]


def _encoded(artefact: Artefact, shown: Sequence[PartRecord], tokens: Artefact, generation: Generation) -> str:
    """Not so are tokens that were added since, or whose values are not to be seen, and what a setting leaves out."""
    facts, length = artefact.record.facts, int(tokens.record.facts.get("context_length", 1))
    known = (i for part in shown for i in covered(part).keys() - set(_stale(part, generation)))
    special = special_ids(tokens.own_file("vocab.parquet")).tolist() if facts.get("skip_special") else ()
    return condition_of_encoded(
        token_ranges(known, generation.parts, length), length, facts.get("skip_positions", ()), special
    )


def _files(artefact: Artefact, parts: Iterable[PartRecord], tables: Iterable[str]) -> dict[str, Sequence[str]]:
    """Files of the parts by table: `table.parquet`, or the files of a folder `table/`."""
    found: dict[str, list[str]] = {table: [] for table in tables}
    for part in parts:
        for file in part.files:
            table = file.name.partition("/")[0].removesuffix(".parquet")
            if table in found and file.name.endswith(".parquet"):
                found[table].append(artefact.location(artefact.part_path(part) / file.name))
    return dict(found)


def _choose(store: Store, every: Sequence[Run], name: str | None) -> Run:
    readable = [run for run in every if run.problem is None]
    damaged = [run for run in every if run.problem is not None]
    if name is None:
        if readable:
            return readable[0]
        reasons = "".join(f"\n{run.artefact.id}: {run.problem}" for run in damaged)
        raise UserError(f"{store.name} has no run to ask. Make one: `saeflow run RECIPE`.{reasons}")
    for fits in (
        lambda run: run.schema == name,
        lambda run: run.is_called(name),
        lambda run: run.artefact.name == name,
    ):
        for run in filter(fits, readable):
            return run
    for run in damaged:
        if run.is_called(name) or run.artefact.name == name:
            raise UserError(f"The run {name} cannot be read: {run.problem}")
    raise UserError(
        f"There is no run {brief(name)!r} in {store.name}. {nearest(name, [run.schema for run in readable])}"
    )


def _settings(memory_limit: str | None, threads: int | None) -> dict[str, Any]:
    """A private spill folder, because DuckDB lets every query write into its own."""
    settings: dict[str, Any] = {
        "temp_directory": os.path.join(tempfile.gettempdir(), f"saeflow-{uuid.uuid4().hex}"),
        "python_enable_replacements": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    if memory_limit is not None:
        settings["memory_limit"] = memory_limit
    if threads is not None:
        settings["threads"] = threads
    return settings


def _sources(run: Run, every: Sequence[Run]) -> str:
    text = Template((sql_folder() / "sources.sql").read_text("utf-8"))
    rows = literal([other.row(run) for other in every])
    shape = {name: literal(value) for name, value in run.shape.items()}
    found = relations(run.files, run.left_out) | ({"labels": labels_relation(run.labels)} if run.labels else {})
    return text.substitute(found, runs=rows, hidden=literal(list(run.hidden)), encoded=run.encoded, **shape)


def _texts(folder: str) -> Iterator[str]:
    """In the order of their names: a macro reads only what is there when it is made."""
    for path in sorted((sql_folder() / folder).glob("*.sql")):
        yield path.read_text("utf-8")


def _side_by_side(schemas: Sequence[str]) -> Iterator[str]:
    """The schema that holds what questions about several runs read."""
    yield f"create schema if not exists {_EVERY_RUN};"
    for view in ("stg_feature_stats", "stg_token_major"):
        yield f"create or replace view {_EVERY_RUN}.{view} as {side_by_side(schemas, view)};"


@cache
def _names(folder: Path) -> re.Pattern[str]:
    stems = [path.stem for path in folder.glob("*/*.sql") if path.parent.name != "checks"]
    stems += re.findall(r"create or replace (?:view|macro) (\w+)", (folder / "sources.sql").read_text("utf-8"))
    either = "|".join(sorted(stems, key=len, reverse=True))
    return re.compile(rf"(?<=\bfrom )(?:{either})\b|(?<=\bjoin )(?:{either})\b|(?<![\w.\"'])(?:{either})(?=\()")


def _qualified(sql: str, schema: str) -> str:
    return _names(sql_folder()).sub(lambda name: f"{schema}.{name[0]}", sql)


def _harden(connection: duckdb.DuckDBPyConnection, every: Iterable[Run]) -> None:
    """Leave access to the published files alone; both spellings, as globs are resolved under the same rule."""
    paths = {path for run in every for files in run.files.values() for path in files}
    paths |= {file.location for run in every for file in run.labels}
    allowed = sorted(paths | {unglobbed(path) for path in paths})
    connection.execute(f"set allowed_paths = {literal(allowed)}")
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not there."""
    known = list(known)
    near = difflib.get_close_matches(brief(name), known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(known) or 'none'}."
