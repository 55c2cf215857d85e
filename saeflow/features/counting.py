"""Counts and sums of encoded values, by feature and some property of the token.

Entries come sorted by feature, as `feature_major` sorts them. Kernels release the interpreter lock.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saeflow.runtime.compiled import compiled
from saeflow.sae.exact import FeatureMajor
from saeflow.sae.kernels import Doubles, Floats, Ids, Offsets

Counts = NDArray[np.int64]

FIRST_BIN = -4 * 127
"""Bin of the smallest normal float32. An octave has four bins: the two highest bits of the significand."""

MIRROR = -2048
"""A value below zero has the bin MIRROR - b, where b is that of its magnitude: bins are in the order of values."""

LOWEST_BIN = np.int32(MIRROR + FIRST_BIN)
N_BINS = 2 - 2 * FIRST_BIN - MIRROR
"""Lowest bin of all finite float32, and the number of bins from there to the highest."""


@compiled
def place_sorted(
    ids: Ids, token_ids: Counts, values: Floats, first: int, places: Offsets, tokens: Counts, out: Floats
) -> None:
    """Put each of the entries, sorted by feature, at its feature's next free place; `places[0]` is that of `first`."""
    for e in range(len(ids)):
        f = ids[e] - first
        at = places[f]
        places[f] = at + 1
        tokens[at] = token_ids[e]
        out[at] = values[e]


class KeyTotals(NamedTuple):
    """Count, sum and sum of squares of the values of each feature at each key it fires on; by feature, then key."""

    feature_ids: Ids
    keys: Ids
    n_tokens: Counts
    sum_value: Doubles
    sum_squares: Doubles


def totals_by_key(entries: FeatureMajor, keys: Ids, n_keys: int) -> KeyTotals:
    """Return totals by the key of a row: `keys` (B,), from 0 to n_keys - 1. Values are added in the order of rows."""
    n_features = len(entries.feature_starts) - 1
    found = np.zeros(n_features, np.int64)
    _count_keys(entries.feature_starts, entries.rows, keys, np.full(n_keys, -1, np.int32), found)
    starts = np.concatenate([[0], found.cumsum()])
    n = int(starts[-1])
    out = KeyTotals(
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


def most_frequent_keys(entries: FeatureMajor, keys: Ids, n_keys: int, most: int) -> KeyTotals:
    """Return totals of each feature's `most` most frequent keys; among equals the lower keys. Sums of squares are 0."""
    n_features = len(entries.feature_starts) - 1
    found = np.zeros(n_features, np.int64)
    kept, n, total = (np.zeros((n_features, most), kind) for kind in (np.int32, np.int64, np.float64))
    _most_frequent(*entries, keys, n_keys, found, kept, n, total)
    keep = np.arange(most) < found[:, None]
    ids = np.repeat(np.arange(n_features, dtype=np.int32), found)
    return KeyTotals(ids, kept[keep], n[keep], total[keep], np.zeros(len(ids)))


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
    """Return int32 bins: 4 e + m for a positive value from 2^e (1 + m / 4) to 2^e (1 + (m + 1) / 4), m from 0 to 3.

    A negative value has the bin MIRROR less that.
    """
    bits = values.view(np.int32)
    bins = ((bits & 0x7FFFFFFF) >> 21) + np.int32(FIRST_BIN)
    return np.where(bits < 0, np.int32(MIRROR) - bins, bins) if (bits < 0).any() else bins
