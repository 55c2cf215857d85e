"""The question that estimates another one from the stored sample of documents, where that is worth asking first."""

from __future__ import annotations

import re
from collections.abc import Mapping

import duckdb
import pyarrow as pa

from saeflow.query.ask import Readings, fetch
from saeflow.query.questions import Question, Value, find_question

CHEAP_VALUES = 500_000_000
"""Values that two cores read in about a second: a question that reads no more is only answered exactly."""

FEWEST_DOCUMENTS = 30
"""Documents of a sample from which an estimate is given."""

_ALL_VALUES = "select coalesce(sum(n_tokens), 0) from stg_feature_stats"

_VALUES_READ = {
    "coactivation": """
        select coalesce(least(sum(n_tokens), 122880 * sum(n_tokens) filter (where feature_id = $feature)), 0)
        from stg_feature_stats
    """,
    "count_where_all": """
        select coalesce(sum(n_tokens), 0)
        from stg_feature_stats
        where feature_id in (select unnest($features::bigint[]))
    """,
    "contrast_within": """
        select coalesce(sum(n_tokens), 0)
        from src_feature_stats
        where part_folder(filename) in (
            select folder
            from within_documents([$a, $b], $since, $until, $from_part, $to_part)
            where not is_counted
        )
    """,
    "features_by_role": _ALL_VALUES,
    "features_on": "select 122880 * count(*) from tokens_of_text($text)",
    "features_of_selection": "select 122880 * $n_chosen::bigint",
}
"""Questions that can be estimated, with SQL: how many values the exact answer reads, at most.

The values of a token, or of a feature's tokens, lie in so many row groups at most; DuckDB leaves out the others.
"""

_EXACT_ALONE = ("shift", "features")
"""Parameters that, when given, change the exact question or make it quick: then no estimate is shown."""

_OF_COUNTS = ("coactivation", "count_where_all")
"""Questions whose estimates multiply stored counts, which still count hidden values."""

_HIDDEN = "select count(*) from stg_hidden_values"

READ_TO_COUNT_SAMPLE = ("stg_sample_documents", "stg_shape")
"""Views that `sampled_documents` reads."""

_SAMPLED = """
select case when (select has_sample from stg_shape) then (select count(*) from stg_sample_documents) else 0 end
"""


def reads_for_estimate(question: str) -> frozenset[str]:
    """Return the views and macros that `estimate_of` and the estimate itself read."""
    read = {_estimate(question), "stg_feature_stats", "stg_hidden_values", *READ_TO_COUNT_SAMPLE}
    return frozenset(read if question in _VALUES_READ else ())


def estimate_of(
    connection: duckdb.DuckDBPyConnection,
    question: Question,
    values: Mapping[str, Value],
    readings: Readings | pa.Array | None = None,
) -> tuple[str, dict[str, Value]] | None:
    """Return the name and arguments of the question that estimates this one. `readings` are what `ask` takes.

    None if there is none, if the exact answer is quick, if no sample is stored or it has too few documents, or if it
    needs counts of values that are hidden. Raises UserError as `ask` does.
    """
    if question.name not in _VALUES_READ or not _is_estimated(question, values):
        return None
    chosen = readings if isinstance(readings, pa.Array) else values.get("tokens")
    known = {**values, "n_chosen": len(chosen) if isinstance(chosen, (pa.Array, list)) else 0}
    if any(_number(connection, sql, known) <= CHEAP_VALUES for sql in (_ALL_VALUES, _VALUES_READ[question.name])):
        return None
    if question.name in _OF_COUNTS and _number(connection, _HIDDEN, {}):
        return None
    if sampled_documents(connection) < FEWEST_DOCUMENTS:
        return None
    estimate = find_question(_estimate(question.name))
    names = {parameter.name for parameter in estimate.parameters}
    return estimate.name, {name: value for name, value in values.items() if name in names}


def sampled_documents(connection: duckdb.DuckDBPyConnection) -> int:
    """Return how many documents the sample has; 0 if a part of the run stores none."""
    return _number(connection, _SAMPLED, {})


def _is_estimated(question: Question, values: Mapping[str, Value]) -> bool:
    names = {parameter.name for parameter in find_question(_estimate(question.name)).parameters}
    return not any(values.get(name) for name in _EXACT_ALONE if name not in names)


def _number(connection: duckdb.DuckDBPyConnection, sql: str, values: Mapping[str, object]) -> int:
    given = {name: values[name] for name in re.findall(r"\$(\w+)", sql)}
    return int(fetch(connection, sql, given, "The estimate", short=True).column(0)[0].as_py())


def _estimate(question: str) -> str:
    return f"approximate_{question}"
