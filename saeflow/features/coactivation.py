"""Which features fire together: pairs counted from encoded values, and the best of them by Jaccard index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from saeflow.activations.sparse_values import SparseValues
from saeflow.features.counting import Counts
from saeflow.runtime.compiled import compiled
from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae.exact import FeatureMajor, feature_major
from saeflow.sae.kernels import Doubles, Ids, Matrix, Offsets

TABLE_FEATURES = 8192
"""Features up to which all pairs are counted in one table."""

PAIR_BYTES = 512 << 20
"""Memory for counting pairs range by range of features; each range takes another reading of the values."""

_MOST_READINGS = 16

_COUNTED_ROWS = 65_535
"""Rows that a 16-bit number can count."""


class CoactivePairs(NamedTuple):
    """Two features a row, and the number of tokens on which both fire."""

    feature_ids: Ids
    other_ids: Ids
    n_both: Counts


@compiled
def _pairs_of_feature(
    f: int, feature_starts: Offsets, rows: Ids, row_starts: Offsets, ids: Matrix, together: Matrix
) -> None:
    for e in range(feature_starts[f], feature_starts[f + 1]):
        r = rows[e]
        for i in range(row_starts[r], row_starts[r + 1]):
            together[ids[i]] += np.uint32(1)


@compiled
def count_pairs(
    start: int, stop: int, feature_starts: Offsets, rows: Ids, row_starts: Offsets, ids: Matrix, first: int,
    together: Matrix,
) -> None:  # fmt: skip
    """Add to `together` (n, F) the number of rows on which each feature start..stop fires with each other.

    Row 0 of `together` is feature `first`. `ids` and `together` are unsigned, because an index that may be negative is
    looked at twice.
    """
    for f in range(start, stop):
        _pairs_of_feature(f, feature_starts, rows, row_starts, ids, together[f - first])


@compiled
def _pairs_of_rows(start: int, stop: int, row_starts: Offsets, ids: Matrix, counts: Matrix) -> None:
    for r in range(start, stop):
        end = row_starts[r + 1]
        for i in range(row_starts[r], end):
            with_it = counts[ids[i]]
            for j in range(i + 1, end):
                with_it[ids[j]] += np.uint16(1)


@compiled
def _move_counts(counts: Matrix, together: Matrix) -> None:
    for f in range(len(counts)):
        for g in range(f + 1, len(counts)):
            together[f, g] += counts[f, g]
        counts[f, f + 1 :] = 0


@compiled
def _mirror_counts(together: Matrix) -> None:
    n, tile = len(together), 32
    for top in range(0, n, tile):
        for left in range(top, n, tile):
            for f in range(top, min(top + tile, n)):
                for g in range(max(left, f + 1), min(left + tile, n)):
                    together[g, f] = together[f, g]


class PairTable:
    """The number of rows on which each two features fire (F, F). Small numbers, which fit a cache, count first."""

    def __init__(self, n_features: int) -> None:
        self._counts = np.zeros((n_features, n_features), np.uint16)
        self._together = np.zeros((n_features, n_features), np.uint32)

    def add(self, sparse: SparseValues) -> None:
        ids, n_rows = unsigned(sparse.feature_ids, len(self._counts)), len(sparse.row_starts) - 1
        for start in range(0, n_rows, _COUNTED_ROWS):
            _pairs_of_rows(start, min(start + _COUNTED_ROWS, n_rows), sparse.row_starts, ids, self._counts)
            _move_counts(self._counts, self._together)

    def best(self, n_tokens: Counts, top: int) -> CoactivePairs:
        """Return the `top` features that fire most with each feature, by Jaccard index."""
        _mirror_counts(self._together)
        out = room_for_best(len(n_tokens), top)
        best_of_counted(0, len(n_tokens), 0, self._together, n_tokens, top, *out)
        return as_pairs(*out)


def unsigned(ids: Ids, n_features: int) -> Matrix:
    """Return feature numbers without a sign, in half the bytes where they fit."""
    return ids.astype(np.uint16) if n_features <= 1 << 16 else ids.view(np.uint32)


@compiled
def _best_together(
    f: int, together: Matrix, n_tokens: Counts, top: int, best: Doubles, others: Ids, n_both: Counts
) -> int:
    """Write the features that share most of their rows with f (Jaccard index), largest first; return their number.

    Among equals the lower features come first.
    """
    n = 0
    for g in range(len(together)):
        both = np.int64(together[g])
        if both == 0 or g == f:
            continue
        index = both / (n_tokens[f] + n_tokens[g] - both)
        if n == top and index <= best[n - 1]:
            continue
        place = n if n < top else top - 1
        while place > 0 and best[place - 1] < index:
            best[place], others[place], n_both[place] = best[place - 1], others[place - 1], n_both[place - 1]
            place -= 1
        best[place], others[place], n_both[place] = index, g, both
        n = min(n + 1, top)
    return n


@compiled
def best_of_counted(
    start: int, stop: int, first: int, together: Matrix, n_tokens: Counts, top: int, found: Counts, others: Ids,
    n_both: Counts,
) -> None:  # fmt: skip
    """Write the `found` (F,) best `others` of features start..stop and their `n_both` (F, top), from counted pairs."""
    best = np.empty(top)
    for f in range(start, stop):
        found[f] = _best_together(f, together[f - first], n_tokens, top, best, others[f], n_both[f])


@compiled
def best_together(
    start: int, stop: int, feature_starts: Offsets, rows: Ids, row_starts: Offsets, ids: Matrix,
    n_tokens: Counts, top: int, found: Counts, others: Ids, n_both: Counts,
) -> None:  # fmt: skip
    """Write what `best_of_counted` writes, but from the entries, one feature at a time."""
    best, together = np.empty(top), np.empty(len(feature_starts) - 1, np.uint32)
    for f in range(start, stop):
        together[:] = 0
        _pairs_of_feature(f, feature_starts, rows, row_starts, ids, together)
        found[f] = _best_together(f, together, n_tokens, top, best, others[f], n_both[f])


def coactive_pairs(sparse: SparseValues, entries: FeatureMajor, n_tokens: Counts, top: int) -> CoactivePairs:
    """The `top` features that fire with each, by Jaccard index."""
    n_features = len(n_tokens)
    if n_features <= TABLE_FEATURES // 2:
        table = PairTable(n_features)
        table.add(sparse)
        return table.best(n_tokens, top)
    out = room_for_best(n_features, top)
    ids = unsigned(sparse.feature_ids, n_features)
    best_together(0, n_features, entries.feature_starts, entries.rows, sparse.row_starts, ids, n_tokens, top, *out)
    return as_pairs(*out)


def room_for_best(n_features: int, top: int) -> tuple[Counts, Ids, Counts]:
    """Return arrays for the number of others of each feature, their ids, and the rows on which both fire."""
    return np.zeros(n_features, np.int64), np.empty((n_features, top), np.int32), np.empty((n_features, top), np.int64)


def as_pairs(found: Counts, others: Ids, n_both: Counts) -> CoactivePairs:
    """Return one row a pair, from arrays (F, top) whose first `found` (F,) entries count."""
    keep = np.arange(others.shape[1]) < found[:, None]
    return CoactivePairs(np.repeat(np.arange(len(found), dtype=np.int32), found), others[keep], n_both[keep])


class PairCounter:
    """Counts the pairs of a whole part exactly: in one table, or with more features in several readings of the values.

    `exact` is False if there are so many features that it would take too many readings.
    """

    def __init__(
        self, n_features: int, threads: int, table_features: int = TABLE_FEATURES, pair_bytes: int = PAIR_BYTES
    ) -> None:
        self.n_features, self.threads = n_features, threads
        self._table = PairTable(n_features) if n_features <= table_features else None
        self._range_features = min(n_features, max(1, pair_bytes // (4 * n_features)))
        self.exact = self._table is not None or -(-n_features // self._range_features) <= _MOST_READINGS

    def add(self, sparse: SparseValues) -> None:
        """Count the pairs of one reading of the values, if they are counted in a table."""
        if self._table is not None:
            self._table.add(sparse)

    def best(self, n_tokens: Counts, top: int, read: Callable[[], Iterator[SparseValues]]) -> CoactivePairs:
        """Return the `top` features that fire most with each feature; `read` reads all values again."""
        if self._table is not None:
            return self._table.best(n_tokens, top)
        out = room_for_best(self.n_features, top)
        for first, last in ranges(self.n_features, self._range_features):
            together = np.zeros((last - first, self.n_features), np.uint32)
            for sparse in read():
                self._count_range(sparse, together, first)

            def choose(a: int, b: int, first: int = first, counts: Matrix = together) -> None:
                best_of_counted(a, b, first, counts, n_tokens, top, *out)

            self._by_features(choose, first, last)
        return as_pairs(*out)

    def _count_range(self, sparse: SparseValues, together: Matrix, first: int) -> None:
        """Count the pairs of the features first..first + n with all others, each feature by one worker."""
        entries = feature_major(sparse, self.n_features, self.threads)
        ids = unsigned(sparse.feature_ids, self.n_features)

        def count(a: int, b: int) -> None:
            count_pairs(a, b, entries.feature_starts, entries.rows, sparse.row_starts, ids, first, together)

        self._by_features(count, first, first + len(together))

    def _by_features(self, work: Callable[[int, int], None], first: int, last: int) -> None:
        in_parallel(lambda part: work(first + part[0], first + part[1]), ranges(last - first, 64), self.threads)
