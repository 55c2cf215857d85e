"""Intervals of figures by a bootstrap over documents: tokens of one document are no independent sample.

A replicate draws as many documents as there are, with replacement (Efron 1979, Annals of Statistics 7:1; the cluster
bootstrap of Field and Welsh 2007, Journal of the Royal Statistical Society B 69:369). A document's tokens all count as
often as it was drawn. Each replicate's figures are exact: all values are counted again with these weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saeflow.classes.best import BestEntries
from saeflow.classes.membership import Ints, Membership
from saeflow.classes.ranking import Keys, rank_keys
from saeflow.classes.scores import Scores
from saeflow.classes.values import FeatureEntries, ValueFiles
from saeflow.runtime.compiled import compiled
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import in_parallel, n_threads, ranges
from saeflow.sae.kernels import Doubles, Floats, Ids

Weights = NDArray[np.uint8]

N_REPLICATES = 500
FEWEST_REPLICATES = 200
REPLICATE_BYTES = 1 << 30
"""Most memory for how often each replicate draws each document. With more documents there are fewer replicates."""

LANES = 256
"""Replicates that one pass over a feature's values counts."""

_DOCUMENTS_AT_ONCE = 50_000
"""Documents whose weights are numbers of eight bytes at once."""

AT_ONCE = 500_000
"""Values of chosen features that are read at once."""

LEVELS = (0.025, 0.975)
FIGURES_WITH_INTERVALS = ("auroc", "f1")
"""Figures with intervals. Average precision has none: it takes a division for each token and replicate."""


@dataclass(frozen=True)
class Intervals:
    """Percentile intervals (2.5% to 97.5%) of the best features of each class; NaN for all other pairs.

    The interval of F1 is that of the threshold which the whole corpus chose.
    """

    low: dict[str, Doubles]
    """By figure, (F, C)."""
    high: dict[str, Doubles]


def draw_documents(n_documents: int, seed: int, n_replicates: int = N_REPLICATES) -> Weights:
    """Return (documents, replicates): how often each replicate has drawn each document."""
    most = max(FEWEST_REPLICATES, REPLICATE_BYTES // max(n_documents, 1))
    dice = np.random.default_rng(seed)
    weights = np.empty((n_documents, min(n_replicates, most)), np.uint8)
    for replicate in range(weights.shape[1]):
        drawn = np.bincount(dice.integers(0, n_documents, n_documents), minlength=n_documents)
        weights[:, replicate] = np.minimum(drawn, 255)
    return weights


def intervals(
    files: ValueFiles, members: Membership, scores: Scores, n_best: int, weights: Weights, threads: int = 0,
    held: BestEntries | None = None, progress: Progress | None = None,
) -> Intervals:  # fmt: skip
    """Return the intervals of the `n_best` features with the largest AUROC of each class.

    Values that are not held are read once more. Replicates without a token of the class, or with no other, are left
    out.
    """
    shape = scores.auroc.shape
    found = Intervals(*({name: np.full(shape, np.nan) for name in FIGURES_WITH_INTERVALS} for _ in range(2)))
    pairs = _classes_by_feature(scores.best_features(n_best))
    if not pairs or members.n_documents < 2:
        return found
    lanes = [np.ascontiguousarray(weights[:, first : first + LANES]) for first in range(0, weights.shape[1], LANES)]
    in_class = [count_drawn(each, members.document_classes) for each in lanes]
    every = [count_drawn(each, members.document_tokens) for each in lanes]

    kept = held.entries if held else {}

    def count(wanted: list[int]) -> None:
        lacking = [f for f in wanted if f not in kept]
        block = files.read(lacking[0], lacking[-1], members, lacking) if lacking else None
        for f in wanted:
            entries = block.of(f) if block and f in lacking else kept[f]
            drawn = _replicates(entries, members, f, pairs[f], scores, lanes, in_class, every)
            for c, figures in zip(pairs[f], drawn, strict=True):
                for name, of_replicates in zip(FIGURES_WITH_INTERVALS, figures, strict=True):
                    found.low[name][f, c], found.high[name][f, c] = _limits(of_replicates)
        bar.advance(len(wanted))

    with (progress or Progress(verbosity=-1)).bar("intervals", len(pairs), "features") as bar:
        in_parallel(count, _at_once(scores.fires, list(pairs)), n_threads(threads))
    return found


def count_drawn(weights: Weights, tokens: Ints) -> Doubles:
    """Return how many tokens each replicate has drawn, given those of each document (documents, …): (replicates, …)."""
    total = np.zeros((weights.shape[1], *tokens.shape[1:]))
    for start, stop in ranges(len(weights), _DOCUMENTS_AT_ONCE):
        total += weights[start:stop].T.astype(float) @ tokens[start:stop]
    return total


def _at_once(fires: Ints, features: list[int]) -> list[list[int]]:
    """Return the features in lists with about as many values each, so that threads end together."""
    before = np.cumsum(fires[features]) - fires[features]
    return [
        [features[place] for place in np.flatnonzero(before // AT_ONCE == number)]
        for number in np.unique(before // AT_ONCE).tolist()
    ]


def _classes_by_feature(best: Ints) -> dict[int, list[int]]:
    """Map each feature, ascending, to the classes it is among the best of."""
    found: dict[int, list[int]] = {}
    for f, c in sorted((int(f), c) for row in best for c, f in enumerate(row) if f >= 0):
        found.setdefault(f, []).append(c)
    return found


def _limits(figures: Doubles) -> tuple[float, float]:
    there = figures[np.isfinite(figures)]
    return tuple(np.quantile(there, LEVELS).tolist()) if len(there) else (np.nan, np.nan)


def _replicates(
    entries: FeatureEntries, members: Membership, f: int, classes: list[int], scores: Scores, lanes: list[Weights],
    in_class: list[Doubles], every: list[Doubles],
) -> Iterator[Doubles]:  # fmt: skip
    """Yield (figures, replicates) for each of these classes."""
    values, n = entries.values, len(entries.values)
    keys, spare = np.empty(n, np.uint64), np.empty(n, np.uint64)
    order = np.empty(0, np.int64)
    if n:
        rank_keys(values.view(np.int32), np.arange(n, dtype=np.uint32), keys, spare)
        order = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        keys >>= np.uint64(32)
    codes, documents, values = entries.codes[order], entries.documents[order], values[order]
    for c in classes:
        has = members.sets_with(c)
        drawn = [np.full((len(FIGURES_WITH_INTERVALS), each.shape[1]), np.nan) for each in lanes]
        inside, threshold = has[codes], float(np.float32(scores.threshold[f, c]))
        for each, of_class, of_all, figures in zip(lanes, in_class, every, drawn, strict=True):
            count_replicates(keys, values, documents, inside, each, of_class[:, c].copy(), of_all, threshold, figures)
        yield np.concatenate(drawn, axis=1)


Lanes = NDArray[np.int32]


@compiled
def _add_row(row: Weights, lanes: Lanes) -> None:
    for r in range(len(lanes)):
        lanes[r] += np.int32(row[r])


@compiled
def _take_in(pending: Lanes, found: Lanes, others: Lanes, above: Doubles) -> None:
    """Add tokens of the class that lie below the tokens so far."""
    for r in range(len(found)):
        above[r] += np.float64(pending[r]) * others[r]
        found[r] += pending[r]
        pending[r] = 0


@compiled
def _take_tie(tie_in: Lanes, tie_out: Lanes, found: Lanes, others: Lanes, above: Doubles) -> None:
    for r in range(len(found)):
        above[r] += np.float64(tie_in[r]) * (others[r] + 0.5 * tie_out[r])
        found[r] += tie_in[r]
        others[r] += tie_out[r]


@compiled
def _add_ties(
    i: int, negative: bool, keys: Keys, values: Floats, documents: Ids, inside: NDArray[np.bool_], weights: Weights,
    threshold: float, in_class: Doubles, found: Lanes, others: Lanes, above: Doubles, f1: Doubles,
) -> int:  # fmt: skip
    """Add the ties from entry i on, as far as values have this sign. Return the first entry that was not added.

    `above`: for each token of the class, the other tokens above it, ties counted half. Tokens of the class are kept
    pending until another token follows.
    """
    n, n_lanes = len(keys), len(found)
    tie_in, tie_out, pending = np.zeros(n_lanes, np.int32), np.zeros(n_lanes, np.int32), np.zeros(n_lanes, np.int32)
    some = False
    while i < n and (negative or values[i] > 0):
        j, n_in = i, 0
        while j < n and keys[j] == keys[i]:
            n_in += inside[j]
            j += 1
        if n_in < j - i and some:
            _take_in(pending, found, others, above)
            some = False
        if n_in == 0 or n_in == j - i:
            some |= n_in > 0
            for k in range(i, j):
                _add_row(weights[documents[k]], pending if n_in else others)
        else:
            tie_in[:] = 0
            tie_out[:] = 0
            for k in range(i, j):
                _add_row(weights[documents[k]], tie_in if inside[k] else tie_out)
            _take_tie(tie_in, tie_out, found, others, above)
        if values[i] == threshold:
            _take_in(pending, found, others, above)
            for r in range(n_lanes):
                f1[r] = 2.0 * found[r] / (found[r] + others[r] + in_class[r])
        i = j
    _take_in(pending, found, others, above)
    return i


@compiled
def count_replicates(
    keys: Keys, values: Floats, documents: Ids, inside: NDArray[np.bool_], weights: Weights, in_class: Doubles,
    every: Doubles, threshold: float, figures: Doubles,
) -> None:  # fmt: skip
    """Write AUROC and F1 (2, R) of a feature with a class, for each replicate.

    The entries are in the order of their values, the largest first; equal keys are ties. `inside`: is the entry's token
    of the class? `in_class` and `every` (R,): tokens of the class, and all tokens, of each replicate.
    """
    n, n_lanes = len(keys), weights.shape[1]
    found, others = np.zeros(n_lanes, np.int32), np.zeros(n_lanes, np.int32)
    tie_in, tie_out = np.zeros(n_lanes, np.int32), np.zeros(n_lanes, np.int32)
    above, f1 = np.zeros(n_lanes), np.full(n_lanes, np.nan)
    i = _add_ties(0, False, keys, values, documents, inside, weights, threshold, in_class, found, others, above, f1)
    for k in range(i, n):
        _add_row(weights[documents[k]], tie_in if inside[k] else tie_out)
    for r in range(n_lanes):
        tie_in[r] = np.int32(in_class[r]) - found[r] - tie_in[r]
        tie_out[r] = np.int32(every[r] - in_class[r]) - others[r] - tie_out[r]
    _take_tie(tie_in, tie_out, found, others, above)
    _add_ties(i, True, keys, values, documents, inside, weights, threshold, in_class, found, others, above, f1)
    for r in range(n_lanes):
        outside = every[r] - in_class[r]
        if in_class[r] > 0 and outside > 0:
            figures[0, r] = 1 - above[r] / (in_class[r] * outside)
            figures[1, r] = f1[r]
