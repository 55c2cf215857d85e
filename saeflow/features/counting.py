"""What is counted of encoded values: by feature and some property of the token, and which features fire together.

Entries come by feature (F + 1 starts, rows, values) as `encoding.feature_major` sorts them, and by row as they were
encoded. Kernels work on a range of features and release the interpreter lock.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saeflow.sae.encoder import FeatureMajor, SparseValues
from saeflow.sae.kernels import Doubles, Floats, Ids, Matrix, Offsets, compiled

Counts = NDArray[np.int64]

FIRST_BIN = -4 * 127
"""Bin of the smallest normal float32; four bins an octave, as many as the two highest bits of the significand say."""


@compiled
def place_sorted(
    ids: Ids, token_ids: Counts, values: Floats, first: int, places: Offsets, tokens: Counts, out: Floats
) -> None:
    """Put entries sorted by feature where `places`, the next free one of each feature from `first` on, says."""
    for e in range(len(ids)):
        f = ids[e] - first
        at = places[f]
        places[f] = at + 1
        tokens[at] = token_ids[e]
        out[at] = values[e]


class Pairs(NamedTuple):
    """Two features a row, and on how many tokens both fire."""

    feature_ids: Ids
    other_ids: Ids
    n_both: Counts


class Grouped(NamedTuple):
    """Of each feature and each key it fires on, by feature, then key: count, sum and sum of squares of the values."""

    feature_ids: Ids
    keys: Ids
    n_tokens: Counts
    sum_value: Doubles
    sum_squares: Doubles


def by_key(entries: FeatureMajor, keys: Ids, n_keys: int) -> Grouped:
    """`keys` (B,): a number from 0 to n_keys - 1 of every row. Values are added in the order of rows."""
    n_features = len(entries.feature_starts) - 1
    found = np.zeros(n_features, np.int64)
    _count_keys(entries.feature_starts, entries.rows, keys, np.full(n_keys, -1, np.int32), found)
    starts = np.concatenate([[0], found.cumsum()])
    n = int(starts[-1])
    out = Grouped(
        np.repeat(np.arange(n_features, dtype=np.int32), found), np.empty(n, np.int32), np.empty(n, np.int64),
        np.empty(n), np.empty(n),
    )  # fmt: skip
    _sum_keys(*entries, keys, n_keys, starts, out.keys, out.n_tokens, out.sum_value, out.sum_squares)
    return out


@compiled
def _count_keys(feature_starts: Offsets, rows: Ids, keys: Ids, seen: Ids, found: Counts) -> None:
    for f in range(len(feature_starts) - 1):
        for e in range(feature_starts[f], feature_starts[f + 1]):
            key = keys[rows[e]]
            if seen[key] != f:
                seen[key] = f
                found[f] += 1


@compiled
def _sum_keys(
    feature_starts: Offsets, rows: Ids, values: Floats, keys: Ids, n_keys: int, starts: Offsets,
    out_keys: Ids, out_n: Counts, out_sum: Doubles, out_squares: Doubles,
) -> None:  # fmt: skip
    n, total, squares = np.zeros(n_keys, np.int64), np.zeros(n_keys), np.zeros(n_keys)
    for f in range(len(feature_starts) - 1):
        at = starts[f]
        for e in range(feature_starts[f], feature_starts[f + 1]):
            key = keys[rows[e]]
            if n[key] == 0:
                out_keys[at] = key
                at += 1
            value = np.float64(values[e])
            n[key] += 1
            total[key] += value
            squares[key] += value * value
        out_keys[starts[f] : at].sort()
        for i in range(starts[f], at):
            key = out_keys[i]
            out_n[i], out_sum[i], out_squares[i] = n[key], total[key], squares[key]
            n[key], total[key], squares[key] = 0, 0.0, 0.0


def most_frequent_keys(entries: FeatureMajor, keys: Ids, n_keys: int, most: int) -> Grouped:
    """The same of each feature's `most` most frequent keys alone; among equals the lower ones. Sums of squares are
    0."""
    n_features = len(entries.feature_starts) - 1
    found = np.zeros(n_features, np.int64)
    kept, n, total = (np.zeros((n_features, most), kind) for kind in (np.int32, np.int64, np.float64))
    _most_frequent(*entries, keys, n_keys, found, kept, n, total)
    keep = np.arange(most) < found[:, None]
    ids = np.repeat(np.arange(n_features, dtype=np.int32), found)
    return Grouped(ids, kept[keep], n[keep], total[keep], np.zeros(len(ids)))


@compiled
def _most_frequent(
    feature_starts: Offsets, rows: Ids, values: Floats, keys: Ids, n_keys: int, found: Counts,
    kept: Ids, n_kept: Counts, total: Doubles,
) -> None:  # fmt: skip
    counts, place, met = np.zeros(n_keys, np.int32), np.full(n_keys, -1, np.int32), np.empty(n_keys, np.int32)
    most = kept.shape[1]
    for f in range(len(feature_starts) - 1):
        n_met = 0
        for e in range(feature_starts[f], feature_starts[f + 1]):
            key = keys[rows[e]]
            if counts[key] == 0:
                met[n_met] = key
                n_met += 1
            counts[key] += 1
        n = 0
        for i in range(n_met):
            key = met[i]
            count = np.int64(counts[key])
            counts[key] = 0
            last = most - 1
            if n == most and (count < n_kept[f, last] or (count == n_kept[f, last] and key > kept[f, last])):
                continue
            at = min(n, last)
            while at > 0 and (n_kept[f, at - 1] < count or (n_kept[f, at - 1] == count and kept[f, at - 1] > key)):
                n_kept[f, at], kept[f, at] = n_kept[f, at - 1], kept[f, at - 1]
                at -= 1
            n_kept[f, at], kept[f, at] = count, key
            n = min(n + 1, most)
        found[f] = n
        for i in range(n):
            place[kept[f, i]] = i
        for e in range(feature_starts[f], feature_starts[f + 1]):
            at = place[keys[rows[e]]]
            if at >= 0:
                total[f, at] += np.float64(values[e])
        for i in range(n):
            place[kept[f, i]] = -1


def bins_of(values: Floats) -> Ids:
    """int32: 4 e + m of a positive value between 2^e (1 + m / 4) and 2^e (1 + (m + 1) / 4), m from 0 to 3."""
    return (values.view(np.int32) >> 21) + np.int32(FIRST_BIN)


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
    start: int,
    stop: int,
    feature_starts: Offsets,
    rows: Ids,
    row_starts: Offsets,
    ids: Matrix,
    first: int,
    together: Matrix,
) -> None:
    """Add to `together` (n, F) on how many rows each feature start..stop fires with each other; its row 0 is `first`.

    `ids` and `together` are unsigned: numbers that may be negative would be looked at twice.
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
def _move(counts: Matrix, together: Matrix) -> None:
    for f in range(len(counts)):
        for g in range(f + 1, len(counts)):
            together[f, g] += counts[f, g]
        counts[f, f + 1 :] = 0


@compiled
def _mirror(together: Matrix) -> None:
    n, tile = len(together), 32
    for top in range(0, n, tile):
        for left in range(top, n, tile):
            for f in range(top, min(top + tile, n)):
                for g in range(max(left, f + 1), min(left + tile, n)):
                    together[g, f] = together[f, g]


class PairTable:
    """On how many rows each two features fire, in one table (F, F); small numbers first, which stay in the cache."""

    MOST_FEATURES = 8192
    _ROWS = 65_535

    def __init__(self, n_features: int) -> None:
        self._counts = np.zeros((n_features, n_features), np.uint16)
        self._together = np.zeros((n_features, n_features), np.uint32)

    def add(self, sparse: SparseValues) -> None:
        ids, n_rows = unsigned(sparse.feature_ids, len(self._counts)), len(sparse.row_starts) - 1
        for start in range(0, n_rows, self._ROWS):
            _pairs_of_rows(start, min(start + self._ROWS, n_rows), sparse.row_starts, ids, self._counts)
            _move(self._counts, self._together)

    def best(self, n_tokens: Counts, top: int) -> Pairs:
        """The `top` features that fire with each, by Jaccard index."""
        _mirror(self._together)
        out = room_for_best(len(n_tokens), top)
        best_of_counted(0, len(n_tokens), 0, self._together, n_tokens, top, *out)
        return listed(*out)


def unsigned(ids: Ids, n_features: int) -> Matrix:
    """Feature numbers without a sign, in half the bytes where they fit."""
    return ids.astype(np.uint16) if n_features <= 1 << 16 else ids.view(np.uint32)


@compiled
def _best_together(
    f: int, together: Matrix, n_tokens: Counts, top: int, best: Doubles, others: Ids, n_both: Counts
) -> int:
    """The features that share most of their rows with f (Jaccard index), largest first; among equals the lower ones."""
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
    start: int,
    stop: int,
    first: int,
    together: Matrix,
    n_tokens: Counts,
    top: int,
    found: Counts,
    others: Ids,
    n_both: Counts,
) -> None:
    """`others` and `n_both` (F, top) of features start..stop, `found` (F,) of them, from counted pairs."""
    best = np.empty(top)
    for f in range(start, stop):
        found[f] = _best_together(f, together[f - first], n_tokens, top, best, others[f], n_both[f])


@compiled
def best_together(
    start: int, stop: int, feature_starts: Offsets, rows: Ids, row_starts: Offsets, ids: Matrix,
    n_tokens: Counts, top: int, found: Counts, others: Ids, n_both: Counts,
) -> None:  # fmt: skip
    """The same from the entries, one feature at a time."""
    best, together = np.empty(top), np.empty(len(feature_starts) - 1, np.uint32)
    for f in range(start, stop):
        together[:] = 0
        _pairs_of_feature(f, feature_starts, rows, row_starts, ids, together)
        found[f] = _best_together(f, together, n_tokens, top, best, others[f], n_both[f])


def coactive(sparse: SparseValues, entries: FeatureMajor, n_tokens: Counts, top: int) -> Pairs:
    """The `top` features that fire with each, by Jaccard index."""
    n_features = len(n_tokens)
    if n_features <= PairTable.MOST_FEATURES // 2:
        table = PairTable(n_features)
        table.add(sparse)
        return table.best(n_tokens, top)
    out = room_for_best(n_features, top)
    ids = unsigned(sparse.feature_ids, n_features)
    best_together(0, n_features, entries.feature_starts, entries.rows, sparse.row_starts, ids, n_tokens, top, *out)
    return listed(*out)


def room_for_best(n_features: int, top: int) -> tuple[Counts, Ids, Counts]:
    """How many others each feature has, their numbers, and on how many rows both fire."""
    return np.zeros(n_features, np.int64), np.empty((n_features, top), np.int32), np.empty((n_features, top), np.int64)


def listed(found: Counts, others: Ids, n_both: Counts) -> Pairs:
    """One row a pair, of rows (F, top) of which the first `found` (F,) count."""
    keep = np.arange(others.shape[1]) < found[:, None]
    return Pairs(np.repeat(np.arange(len(found), dtype=np.int32), found), others[keep], n_both[keep])
