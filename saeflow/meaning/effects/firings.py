"""Which firings of features are changed: all, or some from each quantile band, drawn by a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from saeflow.meaning.effects.tables import FIRINGS, sort_into, write_parquet

_MOST_ROWS = 4_000_000
"""Firings that are ranked at once."""
_MOST_FEATURES_BETWEEN = 16
"""Features further apart than this are read by themselves: those in between are not."""

_HOLES = """
select token_id // (select context_length from stg_shape) as sequence, min(token_id) as first_hole
from src_tokens where not mask group by all order by all
"""
"""The first token of each sequence that is padding, or belongs to a forgotten document."""

_FIRED = """
select feature_id, token_id, value
from stg_feature_major
where feature_id in (select unnest($features::bigint[])) and feature_id between $first and $last
    and $last >= low and $first <= high
"""
READS = ("src_tokens", "stg_shape", "stg_feature_major", "stg_feature_stats", "stg_size")
"""Names of SQL that drawing firings, and reading their tokens, needs."""


def choose_firings(
    tokens: np.ndarray, values: np.ndarray, n: int, bands: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return which firings of one feature are drawn, and the band of each (1 the strongest).

    Bands are those of `feature_bands`: equal counts to within one, by strength, ties in corpus order. Each band gives
    an equal share of `n`; the strongest ones give what is left over, and a band that is smaller gives all it has. 0:
    every firing. Inside a band the seed chooses.
    """
    order = np.lexsort((tokens, -np.abs(values.astype(np.float64))))
    n_rows, used = len(order), min(bands, len(order))
    band = np.arange(n_rows) * used // max(n_rows, 1)
    if n == 0 or n >= n_rows:
        return order, band + 1
    draw, chosen = shuffled(tokens[order], seed), []
    starts = np.searchsorted(band, np.arange(used + 1))
    for number in range(used):
        inside = np.arange(starts[number], starts[number + 1])
        quota = min(n // used + (number < n % used), len(inside))
        chosen.append(inside[np.argsort(draw[inside], kind="stable")[:quota]])
    kept = np.sort(np.concatenate(chosen))
    return order[kept], band[kept] + 1


def shuffled(tokens: np.ndarray, seed: int) -> np.ndarray:
    """Return uint64 numbers that order tokens at random: SplitMix64 (Steele et al. 2014) of token and seed."""
    mixed = tokens.astype(np.uint64) + np.array([seed], np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def draw_firings(
    connection: duckdb.DuckDBPyConnection, features: Sequence[int], counts: Sequence[int], n: int, bands: int,
    seed: int, folder: Path,
) -> Path:  # fmt: skip
    """Write the chosen firings of all features, sorted by token, to `folder`, and return the file.

    `counts` are the firings of each feature, by which features are read in groups. Tokens behind padding or a forgotten
    document in their sequence are left out: their context is no longer there. The file is written once.
    """
    target = folder / "firings.parquet"
    if target.is_file():
        return target
    holes = connection.execute(_HOLES).fetchnumpy()
    length = int(connection.execute("select context_length from stg_shape").fetchall()[0][0])
    pieces = [folder / "drawn-000000.parquet"]
    write_parquet(pieces[0], FIRINGS.empty_table())
    for number, group in enumerate(_groups(features, counts), 1):
        found = connection.execute(_FIRED, {"features": group, "first": min(group), "last": max(group)}).fetchnumpy()
        rows = {name: np.asarray(column) for name, column in found.items()}
        whole = _has_context(rows["token_id"], np.asarray(holes["sequence"]), np.asarray(holes["first_hole"]), length)
        pieces.append(folder / f"drawn-{number:06d}.parquet")
        write_parquet(
            pieces[-1], _drawn_firings({name: column[whole] for name, column in rows.items()}, n, bands, seed)
        )
    sort_into(target, pieces, "token_id, feature_id", folder)
    for piece in pieces:
        piece.unlink()
    return target


def _has_context(tokens: np.ndarray, sequences: np.ndarray, first_holes: np.ndarray, length: int) -> np.ndarray:
    """Return bool (n): True at tokens before the first hole of their sequence."""
    if not len(sequences):
        return np.ones(len(tokens), bool)
    mine = tokens // length
    place = np.minimum(np.searchsorted(sequences, mine), len(sequences) - 1)
    return np.asarray((sequences[place] != mine) | (tokens < first_holes[place]))


def _drawn_firings(rows: dict[str, np.ndarray], n: int, bands: int, seed: int) -> pa.Table:
    """Draw from each feature's firings."""
    order = np.argsort(rows["feature_id"], kind="stable")
    feature, token, value = (rows[name][order] for name in ("feature_id", "token_id", "value"))
    ends = np.flatnonzero(np.diff(feature)) + 1
    tables = [FIRINGS.empty_table()]
    for mine in np.split(np.arange(len(feature)), ends) if len(feature) else ():
        chosen, band = choose_firings(token[mine], value[mine], n, bands, seed)
        columns = token[mine][chosen], feature[mine][chosen], value[mine][chosen], band.astype(np.int16)
        tables.append(pa.table([pa.array(each) for each in columns], names=FIRINGS.names).cast(FIRINGS))
    return pa.concat_tables(tables)


def _groups(features: Sequence[int], counts: Sequence[int]) -> Iterator[list[int]]:
    group: list[int] = []
    total = 0
    for feature, count in zip(features, counts, strict=True):
        if count and group and (total + count > _MOST_ROWS or feature - group[-1] > _MOST_FEATURES_BETWEEN):
            yield group
            group, total = [], 0
        if count:
            group.append(int(feature))
            total += count
    if group:
        yield group
