"""Ask a run: named questions from `sql/marts`, and statements that only read.

Values travel as prepared parameters. Names are looked up among the files of `sql/`.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from saeflow.features.changes import FeatureLevels
from saeflow.query.catalog import names_of_sql
from saeflow.query.files.chosen import FEATURE_PARAMETERS, as_list, only_files_for
from saeflow.query.questions import Arguments, Question, Value, find_question, parse_arguments
from saeflow.query.runs import Run
from saeflow.runtime.errors import UserError
from saeflow.runtime.sql_errors import QUERY_ERRORS, is_of_question, is_of_system, message
from saeflow.runtime.sql_judge import only_reads
from saeflow.runtime.temporary import blaming_temporary_folder
from saeflow.runtime.text import brief, did_you_mean, sanitise

Readings = list[dict[str, object]]
"""What features_of_text needs to know of each feature that fires on a new text, or text_tokens of each token."""

warnings.filterwarnings("ignore", "Arrow output on a DB-API result", UserWarning)  # for good: threads share filters

LONGEST_SQL = 100_000
"""Most characters of a statement. DuckDB takes minutes over some longer ones before it has read them."""

DEEPEST_SQL = 200
"""Most brackets inside brackets. The parser's time grows faster than the square of their number."""

_BRACKETS = re.compile(r"'(?:[^']|'')*'|[()\[\]]")
_ABOUT_SOURCES = {"compare_sources", "source_contrast", "contrast_within", "approximate_contrast_within"}
_ABOUT_ROLES = {"features_by_role", "approximate_features_by_role"}
_ABOUT_RUNS = {"compare_runs", "correlate_runs", "split_features"}
_SOURCES = ("stg_documents", "stg_document_places")
_READ_TO_RESOLVE = {
    **dict.fromkeys(FEATURE_PARAMETERS, ("stg_shape", "stg_feature_stats")),
    **dict.fromkeys(("annotation", "class"), ("stg_spans",)),
    "source": _SOURCES, "role": ("stg_tokens",), "document_key": ("stg_document_places",),
}  # fmt: skip
_READ_ABOUT = {
    **dict.fromkeys(_ABOUT_SOURCES, _SOURCES),
    **dict.fromkeys(_ABOUT_ROLES, _READ_TO_RESOLVE["role"]),
    **dict.fromkeys(_ABOUT_RUNS, ("stg_runs",)),
}
READ_TO_RESOLVE = frozenset({"stg_runs"}.union(*_READ_TO_RESOLVE.values()))
"""Views that `resolve_names` reads, whatever the question."""

_NAMES = {
    "role": (
        "select 1 from stg_tokens where role = ? limit 1",
        "select role from stg_tokens where role is not null group by role order by levenshtein(role, ?), role limit 20",
        "No token has a role: only tokens of conversations have one (corpus.messages).",
    ),
    "document_key": (
        "select 1 from stg_document_places where key = ?",
        "select key from stg_document_places order by levenshtein(key, ?), key limit 20",
        "The run has no documents.",
    ),
    "annotation": (
        "select 1 from stg_spans where annotation = ? limit 1",
        "select annotation from stg_spans group by annotation order by levenshtein(annotation, ?), annotation limit 20",
        "There are none yet: saeflow annotate NAME FILE.",
    ),
    "class": (
        "select 1 from stg_spans where class = ? limit 1",
        "select class from stg_spans group by class order by levenshtein(class, ?), class limit 20",
        "There are none yet: saeflow annotate NAME FILE.",
    ),
}
"""Parameters that name something of the corpus: SQL that finds the name, SQL for the names nearest to it, and what to
say where there are no names."""
_READINGS = "readings_at_hand"
"""Name under which DuckDB reads an array."""

_SOURCES_SHOWN = 20
"""Sources listed in an error; the error then says how to list them all."""


def ask(
    connection: duckdb.DuckDBPyConnection,
    question: str,
    arguments: Arguments = (),
    limit: int | None = None,
    readings: Readings | pa.Array | None = None,
    run: Run | None = None,
) -> pa.Table:
    """Answer a named question. Arguments come by position or by name, as values or as words to be parsed.

    `run`: the connection's run, so that no other files are looked at than those the arguments are about.

    `readings` are what the question needs beyond the run's files: see `saeflow.query.outside`. An array, which may hold
    millions of tokens, is read by DuckDB where it lies.
    """
    chosen = find_question(question)
    given = parse_arguments(chosen, arguments)
    values: list[object] = list(given.values())
    marks = ["?"] * len(values)
    if isinstance(readings, pa.Array):
        marks.append(f"(select coalesce(list(item), []) from {_READINGS})")
    elif readings is not None:
        marks, values = [*marks, "?"], [*values, readings]
    call = f"({', '.join(marks)})" if chosen.is_macro else ""
    sql = f"select * from {chosen.name}{call}"
    if limit is not None:
        sql, values = f"{sql} limit ?", [*values, limit]
    with _registered(connection, readings), _only_files_for(connection, chosen, given, run):
        return fetch(connection, sql, values, chosen.name, short=chosen.is_macro)


def _only_files_for(
    connection: duckdb.DuckDBPyConnection, question: Question, values: Mapping[str, Value], run: Run | None
) -> contextlib.AbstractContextManager[None]:
    if run is None or question.name in _ABOUT_RUNS:  # their features are not of one run
        return contextlib.nullcontext()
    return only_files_for(connection, run.value_files, run.number, values)


@contextlib.contextmanager
def _registered(connection: duckdb.DuckDBPyConnection, readings: object) -> Iterator[None]:
    """Let the connection, and no other cursor, read an array as a table of one column `item`."""
    if not isinstance(readings, pa.Array):
        yield
        return
    connection.register(_READINGS, pa.table({"item": readings}))
    try:
        yield
    finally:
        connection.unregister(_READINGS)


def query(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: Sequence[object] = (), limit: int | None = None
) -> pa.Table:
    """Run one statement that only reads. Anything else is refused before it runs."""
    _refuse_nonsense(sql)
    _refuse_writes(connection, sql, parameters)
    return fetch(connection, sql, parameters, "The query", limit)


def planned(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.DuckDBPyRelation:
    """Return one statement that only reads as a relation of the connection: planned, to be run by another statement."""
    _refuse_nonsense(sql)
    _refuse_writes(connection, sql, ())
    return connection.sql(sql)


def names_read(question: Question, values: Mapping[str, Value]) -> frozenset[str]:
    """Return the names of the question and of the views that `resolve_names` reads for these values."""
    given = [name for name, value in values.items() if value is not None]
    found = {question.name}.union(*(_READ_TO_RESOLVE.get(name, ()) for name in given))
    return frozenset(found.union(_READ_ABOUT.get(question.name, ())))


def resolve_names(
    connection: duckdb.DuckDBPyConnection, question: Question, values: Mapping[str, Value]
) -> dict[str, Value]:
    """Return the values, with runs replaced by the names of their schemas.

    Raises UserError for a feature, source, role, document or run that does not exist: that is a typing mistake, not an
    empty answer.
    """
    _refuse_unknown_features(connection, [each for name in FEATURE_PARAMETERS for each in as_list(values.get(name))])
    _refuse_unknown_sources(connection, [str(each) for each in as_list(values.get("source"))])
    for name in (name for name in _NAMES if name in values):
        _refuse_unknown_name(connection, name, values[name])
    texts = {parameter.name for parameter in question.parameters if parameter.type == "text"}
    if question.name in _ABOUT_SOURCES:
        _refuse_unknown_sources(connection, [str(values[name]) for name in ("a", "b")])
    if question.name in _ABOUT_ROLES:
        for name in ("a", "b"):
            _refuse_unknown_name(connection, "role", values[name])
    if question.name in _ABOUT_RUNS:
        return {name: _schema_of_run(connection, str(v)) if name in texts else v for name, v in values.items()}
    return dict(values)


def as_statement(
    connection: duckdb.DuckDBPyConnection, question: Question, values: Mapping[str, Value], limit: int | None = None
) -> str:
    """Return the question as SQL with its values filled in, for any shell. The statement is planned, not run."""
    schema = fetch(connection, "select current_schema()", (), "The run").column(0)[0].as_py()
    sql = question.as_sql(values, schema) + (f" limit {limit}" if limit is not None else "")
    _refuse_writes(connection, sql, ())
    return f"{sql};"


def _refuse_unknown_features(connection: duckdb.DuckDBPyConnection, features: Sequence[object]) -> None:
    if not features:
        return
    sql = "select coalesce((select n_features - 1 from stg_shape), (select max(feature_id) from stg_feature_stats))"
    last = fetch(connection, sql, (), "The number of features", short=True).column(0)[0].as_py()
    for feature in features:
        if last is not None and not (isinstance(feature, int) and 0 <= feature <= last):
            raise UserError(f"There is no feature {feature}; features go from 0 to {last}.")


def _refuse_unknown_sources(connection: duckdb.DuckDBPyConnection, sources: Sequence[str]) -> None:
    places = "select distinct source from stg_document_places"  # in memory, unlike the documents
    if not sources or {*sources} <= {*fetch(connection, places, (), "The sources", short=True).column(0).to_pylist()}:
        return
    sql = "select distinct source from stg_documents where source is not null order by source"
    known: list[str] = fetch(connection, sql, (), "The list of sources").column(0).to_pylist()
    for wrong in (source for source in sources if source not in known):
        hint = did_you_mean(wrong, known) if known else "No document has one: the corpus has no column `source`."
        if hint.startswith("There are") and len(known) > _SOURCES_SHOWN:
            hint = f"There are: {', '.join(known[:_SOURCES_SHOWN])} … (saeflow sql '{sql}')"
        raise UserError(f"There is no source {brief(wrong)!r}. {sanitise(hint)}")


def _refuse_unknown_name(connection: duckdb.DuckDBPyConnection, parameter: str, value: Value) -> None:
    find, nearest, without = _NAMES[parameter]
    if value is None or fetch(connection, find, [value], parameter, short=True).num_rows:
        return
    known = fetch(connection, nearest, [value], parameter).column(0).to_pylist()
    hint = did_you_mean(str(value), known) if known else without
    raise UserError(f"There is no {parameter.removesuffix('_key')} {brief(str(value))!r}. {sanitise(hint)}")


def _schema_of_run(connection: duckdb.DuckDBPyConnection, run: str) -> str:
    """Return the schema of the run that has this name, in any spelling."""
    sql = "select schema_name, name, fp from stg_runs where problem is null"
    known = fetch(connection, sql, (), "The list of runs").to_pylist()
    for row in sorted(known, key=lambda row: bool(row["schema_name"] != run)):
        full = f"{row['name']}-{row['fp']}"
        if run in (row["schema_name"], full, f"{row['name']}_{row['fp']}", f"features/{full}"):
            return str(row["schema_name"])
    raise UserError(f"There is no run {brief(run)!r}. {did_you_mean(run, [row['schema_name'] for row in known])}")


def _refuse_nonsense(sql: str) -> None:
    if len(sql) > LONGEST_SQL:
        raise UserError(f"The query has {len(sql):,} characters; at most {LONGEST_SQL:,} are read.")
    try:
        sql.encode()
    except UnicodeEncodeError:
        raise UserError("The query is not text in UTF-8.") from None
    depth = deepest = 0
    for found in _BRACKETS.finditer(sql):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(found[0], 0)
        deepest = max(deepest, depth)
    if deepest > DEEPEST_SQL:
        raise UserError("The query cannot be run: it is nested too deeply.")


def _refuse_writes(connection: duckdb.DuckDBPyConnection, sql: str, parameters: Sequence[object]) -> None:
    try:
        reads = only_reads(connection, sql, parameters, names_of_sql())
    except duckdb.Error as error:
        raise UserError(f"The query cannot be run.\n{message(error)}") from error
    except RecursionError:
        raise UserError("The query cannot be run: it is nested too deeply.") from None
    if not reads:
        raise UserError("Only one statement that reads is run here: select, with, from, values, describe or explain.")


def fetch(
    connection: duckdb.DuckDBPyConnection,
    sql: str,
    parameters: Sequence[object] | Mapping[str, object],
    what: str,
    limit: int | None = None,
    short: bool = False,
) -> pa.Table:
    """Run a statement. If it is `short`, DuckDB copies its rows once, which is quicker than planning it twice."""
    try:
        with blaming_temporary_folder():
            return _fetch_rows(connection, sql, parameters, limit, short)
    except QUERY_ERRORS as error:
        if is_of_system(error):
            raise
        said = message(error)
        raise UserError(said if is_of_question(error) else f"{what} failed.\n{said}") from error


def _fetch_rows(
    connection: duckdb.DuckDBPyConnection,
    sql: str,
    parameters: Sequence[object] | Mapping[str, object],
    limit: int | None,
    short: bool,
) -> pa.Table:
    if short:
        return connection.execute(sql, parameters or None).to_arrow_table()
    return _read_rows(connection.sql(sql, params=parameters or None).to_arrow_reader(), limit)


def _read_rows(reader: pa.RecordBatchReader, limit: int | None) -> pa.Table:
    """Return the first rows of a stream, or all. The buffers stay DuckDB's own."""
    if limit is None:
        return reader.read_all()
    batches, n_rows = [], 0
    while n_rows < limit and (batch := next(reader, None)) is not None:
        batches.append(batch)
        n_rows += batch.num_rows
    return pa.Table.from_batches(batches, reader.schema).slice(0, limit)


_LEVELS = """
select feature_id, sum_value / nullif((select n_encoded_tokens from stg_size), 0) as mean, max_value, n_tokens
from stg_feature_stats where feature_id in (select unnest(?::bigint[]))
"""


@dataclass(frozen=True)
class FeatureStrengths:
    """Strengths of some features in a run's corpus, in the order asked."""

    levels: Sequence[FeatureLevels]
    n_tokens: Sequence[int]
    """On how many tokens each fires."""


def strengths_of(connection: duckdb.DuckDBPyConnection, run: Run, features: Sequence[int]) -> FeatureStrengths:
    """Return how strong these features are. Raises UserError for one that the run does not have."""
    n = run.shape.get("n_features") or 0
    if wrong := [feature for feature in features if not 0 <= feature < n]:
        raise UserError(f"The run {run.schema} has no feature {wrong[0]}: its features are 0 to {n - 1:,}.")
    found = {
        row[0]: (float(row[1] or 0.0), float(row[2] or 0.0), int(row[3] or 0))
        for row in connection.execute(_LEVELS, [list(features)]).fetchall()
    }
    rows = [found.get(feature, (0.0, 0.0, 0)) for feature in features]
    return FeatureStrengths([FeatureLevels(mean, top) for mean, top, _ in rows], [n for *_, n in rows])
