"""Scores of an autoencoder against the true features of made activations.

Cosines have a sign: values are not negative, so a direction that points the other way is not the feature. With signed
values, which may be on either side, a direction first gets the sign of the sum of its values in the fresh rows. Dead
features, which fire in none of the fresh rows, are left out of all scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.activations.sparse_values import SparseValues
from saeflow.activations.synthetic import GroundTruth
from saeflow.runtime.threads import ranges
from saeflow.sae.autoencoder import SparseAutoencoder

FOUND_COSINE = 0.9
"""Cosine above which a direction counts as that of a true feature."""
MIN_FIRES = 1000
"""Firings in training below which a true feature does not count as frequent."""
FRESH_ROWS = 131_072
"""About the number of rows on which firing is judged."""
BLOCK_FEATURES = 1024
"""True features whose cosines with all of a dictionary are in memory together."""

EncodeRows = Callable[[Tensor], SparseValues]
"""Returns the values of rows (B, D)."""
DecodeValues = Callable[[SparseValues], Tensor]
"""Returns reconstructions (B, D) from values."""


@dataclass(frozen=True)
class RecoveryScores:
    """Scores of one autoencoder against n_true known features.

    n_frequent of these fire at least `min_fires` times in training; n_live features of the autoencoder fire at all.
    """

    n_true: int
    n_frequent: int
    n_live: int
    mean_max_cosine: float
    """Mean over true features of the largest cosine with a live feature (Sharkey et al. 2022, "MMCS")."""
    found_share: float
    """Share of true features whose largest cosine is above 0.9."""
    found_share_frequent: float
    """Share of frequent true features whose largest cosine is above 0.9."""
    precision: float
    """Share of live features whose largest cosine with a true feature is above 0.9."""
    mcc: float
    """Mean cosine of true features with live features, matched one to one for the largest sum; 0 without a match.

    "Mean correlation coefficient" in SAELens' SynthSAEBench (Chanin & Garriga-Alonso 2026, arXiv 2602.14687), which
    ignores the sign."""
    f1: float
    """Mean over frequent true features of the F1 of "fires" on fresh rows, against the matched live feature.

    This is the harmonic mean of two shares: the true feature's firings at which the matched one fires, and the matched
    feature's firings at which the true one fires. 0 without a match; features that do not fire in the fresh rows are
    left out. SynthSAEBench takes the mean over the features of the autoencoder instead, each against the nearest true
    one."""
    f1_weighted: float
    """The mean of F1 weighted by how often each true feature fires."""
    variance_unexplained: float
    """Sum of |x - reconstruction|² over sum of |x - mean|² on fresh rows."""
    noise_floor: float
    """Variance that the noise alone leaves unexplained: the score of the true features in their true strengths."""
    l0: float
    """Mean number of features that fire in a row."""
    true_l0: float


def score_recovery(
    sae: SparseAutoencoder, truth: GroundTruth, n_tokens: int, min_fires: int = MIN_FIRES, n_rows: int = FRESH_ROWS
) -> RecoveryScores:
    """Return the scores of an autoencoder that was trained on `n_tokens` rows, on at least `n_rows` fresh rows."""
    w_dec = sae.eval().W_dec.detach()
    return score_directions(w_dec, sae.encode_sparse, sae.decode, truth, n_tokens, min_fires, n_rows)


def score_directions(
    w_dec: Tensor, encode: EncodeRows, decode: DecodeValues, truth: GroundTruth, n_tokens: int,
    min_fires: int = MIN_FIRES, n_rows: int = FRESH_ROWS,
) -> RecoveryScores:  # fmt: skip
    """Return the scores of any program that has directions (F, D) and encodes rows with them.

    A true feature is frequent if its rate times `n_tokens` reaches `min_fires`. Fresh rows are made and encoded twice:
    once to find live features, once to find those that fire together.
    """
    fresh = _FreshFiring.of(truth, encode, decode, len(w_dec), n_rows)
    live = np.flatnonzero(fresh.n_found)
    signs = torch.from_numpy(np.where(fresh.sum_found[live] < 0, -1, 1).astype(np.float32))
    found, true = w_dec.float().cpu()[torch.from_numpy(live)] * signs[:, None], torch.from_numpy(truth.directions)
    of_true, of_found = best_cosines(true, found)
    places = match_directions(true, found)
    matched, partners, cosines = places >= 0, np.full(len(true), -1), np.zeros(len(true), np.float32)
    partners[matched] = live[places[matched]]
    cosines[matched] = tf.cosine_similarity(true[matched], found[places[matched]]).numpy()
    n_both = _rows_firing_together(truth, encode, partners, len(w_dec), n_rows)
    f1 = 2 * n_both / np.maximum(fresh.n_true + np.where(matched, fresh.n_found[partners], 0), 1)
    frequent = truth.rates * n_tokens >= min_fires
    judged = frequent & (fresh.n_true > 0)
    return RecoveryScores(
        n_true=len(true), n_frequent=int(frequent.sum()), n_live=len(live),
        mean_max_cosine=_mean(of_true), found_share=_mean(of_true > FOUND_COSINE),
        found_share_frequent=_mean(of_true[frequent] > FOUND_COSINE), precision=_mean(of_found > FOUND_COSINE),
        mcc=_mean(cosines), f1=_mean(f1[judged]), f1_weighted=_mean(f1[judged], fresh.n_true[judged]),
        variance_unexplained=fresh.error / fresh.variance,
        noise_floor=truth.noise**2 * true.shape[1] * fresh.n_rows / fresh.variance,
        l0=float(fresh.n_found.sum() / fresh.n_rows), true_l0=float(fresh.n_true.sum() / fresh.n_rows),
    )  # fmt: skip


def best_cosines(true: Tensor, found: Tensor, block: int = BLOCK_FEATURES) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest cosine of each true direction (n) with a found one, and of each found one (F) with a true one.

    0 if there are no directions to compare with.
    """
    of_true, of_found = np.zeros(len(true), np.float32), np.full(len(found), -1 if len(true) else 0, np.float32)
    for rows, cosines in cosine_blocks(true, found, block) if len(found) else ():
        of_true[rows] = cosines.max(1)
        np.maximum(of_found, cosines.max(0), out=of_found)
    return of_true, of_found


def match_directions(true: Tensor, found: Tensor, block: int = BLOCK_FEATURES) -> np.ndarray:
    """Return int64 (n,): a found direction for each true one, all different, with the largest sum of cosines.

    -1 means none is left. This is the assignment problem, solved by scipy with Jonker and Volgenant's method. Holds
    n × F numbers of 8 bytes: 512 MiB at 4,096 × 16,384.
    """
    from scipy.optimize import linear_sum_assignment  # a tenth of a second to load

    partners = np.full(len(true), -1)
    if not len(true) or not len(found):
        return partners
    few, many = (true, found) if len(true) <= len(found) else (found, true)
    costs = np.empty((len(few), len(many)))
    for block_rows, cosines in cosine_blocks(few, many, block):
        costs[block_rows] = -cosines
    rows, columns = linear_sum_assignment(costs)
    if few is true:
        partners[rows] = columns
    else:
        partners[columns] = rows
    return partners


def cosine_blocks(some: Tensor, others: Tensor, block: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the cosines of at most `block` rows (n, D) with all others (m, D) at a time."""
    units = tf.normalize(others, dim=1)
    for start, stop in ranges(len(some), block):
        yield slice(start, stop), (tf.normalize(some[start:stop], dim=1) @ units.T).numpy()


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the mean; 0 of nothing."""
    return float(np.average(values, weights=weights)) if len(values) else 0.0


@dataclass
class _FreshFiring:
    """How often each of the n true and F found features fires in fresh rows, the sums of the found ones' values, and
    how much is not explained."""

    n_true: np.ndarray
    n_found: np.ndarray
    sum_found: np.ndarray
    n_rows: int
    error: float
    variance: float

    @classmethod
    def of(
        cls, truth: GroundTruth, encode: EncodeRows, decode: DecodeValues, n_features: int, n_rows: int
    ) -> _FreshFiring:
        n, width = truth.directions.shape
        fresh = cls(np.zeros(n, np.int64), np.zeros(n_features, np.int64), np.zeros(n_features), 0, 0.0, 0.0)
        total, squares = torch.zeros(width, dtype=torch.float64), 0.0
        for x, codes, sparse in _encoded_rows(truth, encode, n_rows):
            wide = x.double()
            total += wide.sum(0)
            squares += wide.square().sum().item()
            fresh.error += (wide - decode(sparse).double().cpu()).square().sum().item()
            fresh.n_rows += len(x)
            fresh.n_true += np.bincount(codes.feature_ids, minlength=n)
            fresh.n_found += np.bincount(sparse.feature_ids, minlength=n_features)
            fresh.sum_found += np.bincount(sparse.feature_ids, sparse.values, n_features)
        fresh.variance = squares - total.square().sum().item() / fresh.n_rows
        return fresh


def _encoded_rows(
    truth: GroundTruth, encode: EncodeRows, n_rows: int
) -> Iterator[tuple[Tensor, SparseValues, SparseValues]]:
    """Yield at least `n_rows` fresh rows, the same each time, with true values and values found."""
    for values, codes in truth.fresh():
        x = torch.from_numpy(values)
        yield x, codes, encode(x)
        n_rows -= len(x)
        if n_rows <= 0:
            return


def _rows_firing_together(
    truth: GroundTruth, encode: EncodeRows, partners: np.ndarray, n_features: int, n_rows: int
) -> np.ndarray:
    """Return int64 (n,): the number of fresh rows in which a true feature and its partner both fire."""
    n = len(partners)
    owner, n_both = np.full(n_features, -1), np.zeros(n, np.int64)
    owner[partners[partners >= 0]] = np.flatnonzero(partners >= 0)
    for _, codes, sparse in _encoded_rows(truth, encode, n_rows):
        claimed = owner[sparse.feature_ids]
        claims = (sparse.rows * n + claimed)[claimed >= 0]
        right = np.intersect1d(codes.rows * n + codes.feature_ids, claims, assume_unique=True)
        n_both += np.bincount(right % n, minlength=n)
    return n_both
