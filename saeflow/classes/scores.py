"""Every feature against every class, from all values in one pass over the feature-major files.

All figures compare a feature's values, zeros included, with membership in a class over the counted tokens. AUROC,
average precision, F1, precision and recall are as scikit-learn defines them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from saeflow.classes.best import BestEntries
from saeflow.classes.membership import Ints, Membership
from saeflow.classes.ranking import score_features
from saeflow.classes.values import BLOCK_VALUES, FeatureEntries, ValueFiles
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import in_parallel, n_threads
from saeflow.sae.kernels import Doubles


@dataclass(frozen=True)
class Counts:
    """Counts of each feature and class: `ranking.score_features` says what the arrays mean."""

    fires: Ints
    """(F,) counted tokens at which the feature fires."""
    n_both: Ints
    ranks: Ints
    precisions: Doubles
    best: Ints
    sums_in: Doubles
    squares: Doubles
    totals: Doubles

    @classmethod
    def none(cls, n_features: int, n_classes: int) -> Counts:
        shape = (n_features, n_classes)
        return cls(
            np.zeros(n_features, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape),
            np.zeros((n_features, 3, n_classes), np.int64), np.zeros(shape), np.zeros(shape), np.zeros((n_features, 2)),
        )  # fmt: skip

    def add(self, entries: FeatureEntries, members: Membership, expected: Doubles) -> Doubles:
        """Count the features of these entries. Return their AUROC (features, C)."""
        rows = slice(entries.first, entries.first + len(entries.starts))
        self.fires[rows] = entries.ends - entries.starts
        score_features(
            entries.starts, entries.ends, entries.values.view(np.int32), entries.values, entries.codes,
            entries.documents, members.together, members.n_tokens, members.class_tokens, members.set_starts,
            members.set_classes, expected, self.n_both[rows], self.ranks[rows], self.precisions[rows], self.best[rows],
            self.sums_in[rows], self.squares[rows], self.totals[rows],
        )  # fmt: skip
        return auroc_of(self.ranks[rows], members.class_tokens, members.n_tokens)


@dataclass(frozen=True)
class Scores:
    """Figures of every feature (rows) with every class (columns). NaN where a figure is not defined."""

    fires: Ints
    """(F,) counted tokens at which the feature fires."""
    n_both: Ints
    """Tokens of the class at which the feature fires."""
    auroc: Doubles
    average_precision: Doubles
    threshold: Doubles
    """Tokens with at least this value tell the class with the best F1; the largest such value."""
    f1: Doubles
    precision: Doubles
    recall: Doubles
    lift: Doubles
    """Share of the class among tokens at which the feature fires, divided by its share among all tokens."""
    correlation: Doubles
    """Point-biserial: Pearson's r of value and membership."""
    t: Doubles
    p: Doubles
    q: Doubles

    def best_features(self, n: int) -> Ints:
        """Return the n features (n, C) of the largest AUROC for each class; among equals, the lower feature. -1: none.

        A feature that never fires in the class is none.
        """
        n = min(n, len(self.fires))
        auroc = np.where((self.n_both > 0) & np.isfinite(self.auroc), self.auroc, -1.0)
        order = np.argsort(-auroc, axis=0, kind="stable")[:n]
        return np.where(np.take_along_axis(auroc, order, 0) >= 0, order, -1)


def score_classes(
    files: ValueFiles, members: Membership, threads: int = 0, block_values: int = BLOCK_VALUES,
    held: BestEntries | None = None, progress: Progress | None = None,
) -> Scores:  # fmt: skip
    """Return the figures of every feature with every class. The number of threads changes nothing in them.

    `held` takes the values of the best features, so that their intervals need not read them again.
    """
    counts = Counts.none(files.n_features, len(members.classes))
    expected = expected_in_documents(members)

    def count(block: tuple[int, int]) -> None:
        entries = files.read(*block, members)
        auroc = counts.add(entries, members, expected)
        if held is not None:
            held.take(entries, auroc)
        bar.advance(len(entries.starts))

    with (progress or Progress(verbosity=-1)).bar("probe", files.n_features, "features") as bar:
        in_parallel(count, files.blocks(block_values, n_threads(threads)), n_threads(threads))
    return scores_of(counts, members, expected)


def expected_in_documents(members: Membership) -> Doubles:
    """Return (documents, C): tokens of the class, minus the document's tokens times the class's share of all tokens."""
    shares = members.class_tokens / max(members.n_tokens, 1)
    return members.document_classes - members.document_tokens[:, None] * shares


def auroc_of(ranks: Ints, class_tokens: Ints, n_tokens: int) -> Doubles:
    """Return AUROC from twice the number of tokens above each token of the class, ties counted half."""
    pairs = class_tokens.astype(float) * (n_tokens - class_tokens)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(1 - (ranks - class_tokens**2) / 2 / np.where(pairs > 0, pairs, np.nan))


def scores_of(counts: Counts, members: Membership, expected: Doubles) -> Scores:
    """Return the figures that follow from counts over all values."""
    n, in_class = float(members.n_tokens), members.class_tokens.astype(float)
    t, p = _by_document(counts, members, expected)
    with np.errstate(invalid="ignore", divide="ignore"):
        both, chosen, bits = (counts.best[:, row] for row in range(3))
        found = np.where(chosen > 0, both, np.nan)
        fires = counts.fires[:, None]
        return Scores(
            fires=counts.fires,
            n_both=counts.n_both,
            auroc=auroc_of(counts.ranks, members.class_tokens, members.n_tokens),
            average_precision=counts.precisions / np.where(in_class > 0, in_class, np.nan),
            threshold=np.where(chosen > 0, bits.astype(np.int32).view(np.float32), np.nan).astype(float),
            f1=2 * found / (chosen + in_class),
            precision=found / chosen,
            recall=found / in_class,
            lift=counts.n_both * n / (fires * in_class),
            correlation=_correlation(counts, n, in_class),
            t=t,
            p=p,
            q=false_discovery_rates(p),
        )


def _correlation(counts: Counts, n: float, in_class: Doubles) -> Doubles:
    total, squares = counts.totals.T[:, :, None]
    together = counts.sums_in - total * in_class / n
    spread = np.sqrt((squares - total**2 / n) * (in_class - in_class**2 / n))
    return np.asarray(np.where(spread > 0, together / spread, np.nan))


def _by_document(counts: Counts, members: Membership, expected: Doubles) -> tuple[Doubles, Doubles]:
    """Return t and the two-sided p of each pair: a t-test over what documents add to the covariance.

    Document d adds s_d, the sum over its tokens of (y - mean of y) (value - mean value). If feature and class have
    nothing to do with one another, the s_d have mean 0, however much the tokens of one document are alike. t is their
    mean by its standard error, with one degree of freedom less than there are documents: the score test with
    cluster-robust variance (Liang and Zeger 1986, Biometrika 73:13; Boos 1992, The American Statistician 46:327).
    A class in few documents cannot reach a small p.
    """
    g = members.n_documents
    means = counts.totals[:, :1] / max(members.n_tokens, 1)
    total = counts.sums_in - means * members.class_tokens
    squares = counts.squares + means**2 * (expected**2).sum(0)
    if g < 2:
        return np.full(total.shape, np.nan), np.full(total.shape, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(np.maximum(squares - total**2 / g, 0) * g / (g - 1))
        t = np.where(spread > 1e-9 * np.abs(total), total / spread, np.nan)
    t = np.where(counts.fires[:, None] > 0, t, np.nan)
    return t, 2 * stats.t.sf(np.abs(t), g - 1)


def false_discovery_rates(p: Doubles) -> Doubles:
    """Return q (same shape): the least false discovery rate at which the pair is a discovery among all pairs with a p.

    Benjamini and Hochberg 1995, Journal of the Royal Statistical Society B 57:289.
    """
    q = np.full(p.shape, np.nan)
    there = np.isfinite(p)
    values = p[there]
    order = np.argsort(values, kind="stable")
    scaled = values[order] * len(values) / np.arange(1, len(values) + 1)
    rates = np.empty(len(values))
    rates[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    q[there] = rates
    return q
