"""Which firings of features are changed: all, or some from each quantile band, drawn by a seed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from saeflow.meaning.effects.tables import FIRINGS, sort_into, write_parquet
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief

_MOST_ROWS = 4_000_000
"""Firings that are ranked at once."""
MOST_FEATURES = 1_000_000

_DRAW = """
with holes as (
    select token_id // (select context_length from stg_shape) as sequence, min(token_id) as first_hole
    from src_tokens where not mask group by all
),
fired as (
    select feature_id, token_id, value
    from stg_feature_major
    where feature_id in (select unnest($features::bigint[])) and $last >= low and $first <= high
),
whole as (
    select fired.*
    from fired
    left join holes on holes.sequence = fired.token_id // (select context_length from stg_shape)
    where coalesce(fired.token_id < first_hole, true)
),
ranked as (
    select
        *,
        row_number() over (partition by feature_id order by strength(value) desc, token_id) - 1 as rank,
        count(*) over (partition by feature_id)                                                 as n_rows
    from whole
),
banded as (
    select feature_id, token_id, value, 1 + rank * least($bands, n_rows) // n_rows as band, n_rows
    from ranked
)
select token_id, feature_id::integer as feature_id, value::float as value, band::smallint as band
from banded
qualify $n = 0 or row_number() over (partition by feature_id, band order by draw_order(token_id, $seed), token_id)
    <= $n // least($bands, n_rows) + (band <= $n % least($bands, n_rows))::bigint
"""
READS = ("src_tokens", "stg_shape", "stg_feature_major", "strength", "draw_order", "stg_feature_stats", "stg_size")
"""Names of SQL that drawing firings, and reading their tokens, needs."""


def parse_features(text: str, n_features: int) -> list[int]:
    """Return the features of a text such as `3,17,40-59` or `all`, ascending. Raises UserError."""
    if text.strip().lower() == "all":
        return list(range(n_features))
    found: set[int] = set()
    for word in text.split(","):
        pair = re.fullmatch(r"\s*(\d{1,10})(?:\s*-\s*(\d{1,10}))?\s*", word)
        if pair is None:
            raise UserError(f"--features is {brief(text)!r}. Write numbers and ranges, such as 3,17,40-59, or all.")
        first, last = int(pair[1]), int(pair[2] or pair[1])
        if max(first, last) >= n_features:
            raise UserError(
                f"--features names {max(first, last):,}, but the run's features are 0 to {n_features - 1:,}."
            )
        if last < first:
            raise UserError(f"--features has the range {brief(word.strip())!r}. Write its lower end first.")
        found.update(range(first, last + 1))
    return sorted(found)


def bands_of(n_rows: int, bands: int, n: int) -> list[int]:
    """Return how many firings each band of a feature with `n_rows` firings gives, the strongest band first.

    Bands have equal counts, to within one. `n` is divided among them; the strongest bands take what is left over.
    0 means every firing.
    """
    used = min(bands, n_rows)
    sizes = [sum(rank * used // n_rows == band for rank in range(n_rows)) for band in range(used)]
    if n == 0:
        return sizes
    return [min(size, n // used + (band < n % used)) for band, size in enumerate(sizes)]


def draw_firings(
    connection: duckdb.DuckDBPyConnection, features: Sequence[int], counts: np.ndarray, n: int, bands: int, seed: int,
    folder: Path,
) -> Path:  # fmt: skip
    """Write the chosen firings of all features, sorted by token, to `folder`, and return the file.

    `counts` are the firings of each feature, by which features are read in groups. Tokens behind padding or a forgotten
    document in their sequence are left out: their context is no longer there. The file is written once.
    """
    target = folder / "firings.parquet"
    if target.is_file():
        return target
    pieces = []
    for number, group in enumerate(_groups(features, counts)):
        rows = connection.execute(
            _DRAW,
            {"features": group, "first": min(group), "last": max(group), "bands": bands, "n": n, "seed": seed},
        ).to_arrow_table()
        pieces.append(folder / f"drawn-{number:06d}.parquet")
        write_parquet(pieces[-1], rows.cast(FIRINGS))
    if not pieces:
        pieces.append(folder / "drawn-000000.parquet")
        write_parquet(pieces[-1], pa.Table.from_batches([], FIRINGS))
    sort_into(target, pieces, "token_id, feature_id", folder)
    for piece in pieces:
        piece.unlink()
    return target


def _groups(features: Sequence[int], counts: np.ndarray) -> Iterator[list[int]]:
    group: list[int] = []
    total = 0
    for feature, count in zip(features, counts.tolist(), strict=True):
        if count and group and total + count > _MOST_ROWS:
            yield group
            group, total = [], 0
        if count:
            group.append(int(feature))
            total += count
    if group:
        yield group
