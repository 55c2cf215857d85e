"""Where features fire, read for a range of features at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import duckdb
import numpy as np

from saeflow.features.counting import Counts
from saeflow.meaning.token_rules.counting import Firings, collect_firings
from saeflow.runtime.errors import UserError

CHUNK_VALUES = 16_000_000
"""Values held at once. A feature with more is held alone, in 8 bytes for each token at which it fires."""

_CHUNK_FEATURES = 8192

FIRING_TABLES = ("stg_feature_major", "stg_feature_stats", "stg_shape")
"""Views of `sql/` that these functions ask."""


def count_firings(connection: duckdb.DuckDBPyConnection) -> Counts:
    """Return (F,) at how many tokens each feature fires at most: statistics may still count forgotten documents."""
    rows = connection.execute("select feature_id, n_tokens from stg_feature_stats").fetchnumpy()
    [(n_features,)] = connection.execute("select n_features from stg_shape").fetchall()
    ids = np.ma.getdata(rows["feature_id"]).astype(np.int64)
    counts = np.zeros(max(int(n_features or 0), int(ids.max(initial=-1)) + 1), np.int64)
    counts[ids] = np.ma.getdata(rows["n_tokens"]).astype(np.int64)
    return counts


def plan_chunks(
    features: Sequence[int], counts: Counts, most_values: int = CHUNK_VALUES, most_features: int = _CHUNK_FEATURES
) -> list[list[int]]:
    """Cut sorted features into runs, each of at most so many values and features, or of one feature."""
    chunks: list[list[int]] = []
    n_values = 0
    for feature in features:
        n_values += int(counts[feature])
        if not chunks or n_values > most_values or len(chunks[-1]) >= most_features:
            chunks.append([])
            n_values = int(counts[feature])
        chunks[-1].append(feature)
    return chunks


def read_firings(
    connection: duckdb.DuckDBPyConnection, features: Sequence[int], counts: Counts, n_tokens: int
) -> Firings:
    """Return the tokens at which each of these sorted features has a value above zero. Raises UserError for damage."""
    first, last = features[0], features[-1]
    wanted = np.zeros(last - first + 1, np.bool_)
    wanted[np.array(features) - first] = True
    room = np.where(wanted, counts[first : last + 1], 0)
    limits = np.cumsum(room)
    starts = limits - room
    n = int(limits[-1])
    found = Firings(starts, starts.copy(), np.empty(n, np.int32), np.empty(n, np.float32))
    for ids, tokens, values in _firing_batches(connection, first, last):
        chosen = wanted[ids - first]
        if not chosen.all():
            ids, tokens, values = ids[chosen], tokens[chosen], values[chosen]
        if not collect_firings(ids, tokens, values, first, n_tokens, limits, found):
            raise UserError(
                f"The values of features {first} to {last} are not those that the run's statistics count.\n"
                "See what is damaged: saeflow verify --full"
            )
    at = np.array(features) - first
    return Firings(starts[at], found.ends[at], found.token_ids, found.values)


def _firing_batches(connection: duckdb.DuckDBPyConnection, first: int, last: int) -> Iterator[list[np.ndarray]]:
    reader = connection.sql(
        "select feature_id, token_id, value from stg_feature_major "
        "where feature_id between $1 and $2 and high >= $1 and low <= $2 and value > 0",
        params=[first, last],
    ).to_arrow_reader(1 << 20)
    for batch in reader:
        yield [column.to_numpy(zero_copy_only=False) for column in batch.columns]
