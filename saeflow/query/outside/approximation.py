"""The question that estimates another one from the stored sample of documents, where that is worth asking first."""

from __future__ import annotations

from collections.abc import Mapping

import duckdb

from saeflow.query.questions import Question, Value

CHEAP_VALUES = 500_000_000
"""Values that two cores read in about a second: a question that reads no more is only answered exactly."""

FEWEST_DOCUMENTS = 30
"""Documents of a sample from which an estimate is given."""

_VALUES_READ = {
    "coactivation": (
        "feature",
        """
        select coalesce(least(sum(n_tokens), 122880 * sum(n_tokens) filter (where feature_id = $given)), 0)
        from stg_feature_stats
        """,
    ),
    "count_where_all": (
        "features",
        """
        select coalesce(sum(n_tokens), 0)
        from stg_feature_stats
        where feature_id in (select unnest($given::bigint[]))
        """,
    ),
}
"""Questions that can be estimated, with a parameter and SQL on it: how many values the exact answer reads, at most.

The tokens of a feature lie in so many row groups at most; DuckDB leaves out the others.
"""

_SAMPLED = """
select case when (select has_sample from stg_shape) then (select count(*) from stg_sample_documents) else 0 end
"""


def reads_for_estimate(question: str) -> frozenset[str]:
    """Return the views and macros that `estimate_of` and the estimate itself read."""
    read = {_estimate(question), "stg_feature_stats", "stg_sample_documents"}
    return frozenset(read if question in _VALUES_READ else ())


def estimate_of(
    connection: duckdb.DuckDBPyConnection, question: Question, values: Mapping[str, Value]
) -> tuple[str, dict[str, Value]] | None:
    """Return the name and arguments of the question that estimates this one.

    None if there is none, if the exact answer is quick, or if no sample is stored or it has too few documents.
    """
    if question.name not in _VALUES_READ or values.get("shift"):
        return None
    parameter, sql = _VALUES_READ[question.name]
    ((n_values,),) = connection.execute(sql, {"given": values[parameter]}).fetchall()
    if n_values <= CHEAP_VALUES:
        return None
    ((n_documents,),) = connection.execute(_SAMPLED).fetchall()
    if n_documents < FEWEST_DOCUMENTS:
        return None
    return _estimate(question.name), {name: value for name, value in values.items() if name != "shift"}


def _estimate(question: str) -> str:
    return f"approximate_{question}"
