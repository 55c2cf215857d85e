"""Three questions worth asking first about any run: chosen by SQL, answered by SQL."""

from __future__ import annotations

from collections.abc import Iterator

import duckdb
import pyarrow as pa

from saeflow import queries

Question = tuple[str, list[str]]

_LARGEST_SOURCES = """
select source from stg_documents group by source order by sum(n_tokens) desc, source limit 2
"""

_TELLING = """
select feature_id from compare_sources(?, ?)
where n_tokens_a >= 200 and log2_ratio > 0
order by log2_ratio * ln(n_tokens_a) desc, feature_id limit 1
"""

_RAREST = "select feature_id from feature_summary where n_tokens > 0 order by n_tokens, feature_id limit 2"


def first_questions(connection: duckdb.DuckDBPyConnection) -> Iterator[Question]:
    """The features that tell the two largest sources apart, and what explains one token."""
    features = _features(connection)
    for feature in features:
        yield "top_tokens", [str(feature), "6"]
    token = queries.ask(connection, "top_tokens", [features[0], 1]).column("token_id")[0].as_py()
    yield "token_features", [str(token)]


def _features(connection: duckdb.DuckDBPyConnection) -> list[int]:
    sources = [row[0] for row in connection.execute(_LARGEST_SOURCES).fetchall()]
    found = []
    if len(sources) == 2:
        for a, b in (sources, sources[::-1]):
            found += [row[0] for row in connection.execute(_TELLING, [a, b]).fetchall()]
    return found or [row[0] for row in connection.execute(_RAREST).fetchall()]


def answer(connection: duckdb.DuckDBPyConnection, question: Question) -> pa.Table:
    name, arguments = question
    return queries.ask(connection, name, arguments, limit=8)
