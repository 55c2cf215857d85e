"""How much of what is known did an autoencoder find? Scores against the true features of made activations.

Cosines have a sign: values are not negative, so a direction that points the other way is not the feature. Dead
features, which fire in none of the fresh rows, count nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.activations.sparse_values import SparseValues
from saeflow.activations.synthetic import superposition, toy_models
from saeflow.activations.synthetic.ground_truth import GroundTruth
from saeflow.recipe.synthetic import SyntheticConfig
from saeflow.sae.autoencoder import SparseAutoencoder

FOUND = 0.9
"""Cosine above which a direction is that of a true feature."""
MIN_FIRES = 1000
"""A true feature that fires more rarely in training is not asked for."""
FRESH_ROWS = 131_072
"""Rows on which firing is judged, about."""
_BLOCK = 1024
"""True features whose cosines with all of a dictionary are in memory together."""

Encode = Callable[[Tensor], SparseValues]
"""Values of rows (B, D)."""
Decode = Callable[[SparseValues], Tensor]
"""Reconstructions (B, D) from values."""


@dataclass(frozen=True)
class Scores:
    """Of one autoencoder against n_true known features, n_frequent of which fire at least `min_fires` times in
    training."""

    n_true: int
    n_frequent: int
    n_live: int
    mean_max_cosine: float
    """Mean over true features of the largest cosine with a live feature (Sharkey et al. 2022, "MMCS")."""
    found_share: float
    """Share of true features whose largest cosine is above 0.9."""
    found_share_frequent: float
    """The same of the frequent ones."""
    precision: float
    """Share of live features whose largest cosine with a true feature is above 0.9."""
    mcc: float
    """Mean cosine of true features with the live features matched to them one to one, so that the sum is largest; 0
    for those left without. "Mean correlation coefficient" in SAELens' SynthSAEBench (Chanin & Garriga-Alonso 2026,
    arXiv 2602.14687), which ignores the sign."""
    f1: float
    """Mean over frequent true features of the F1 of "fires" on fresh rows, against the live feature matched to it: the
    harmonic mean of the share of its firings that are met, and of the matched feature's firings that are right. 0 for
    one without a match; features that do not fire in the fresh rows are left out. SynthSAEBench's mean is over the
    features of the autoencoder instead, each against the true one nearest to it."""
    f1_weighted: float
    """The same mean, weighted by how often each fires."""
    variance_unexplained: float
    """Sum of |x - reconstruction|² over sum of |x - mean|² on fresh rows."""
    noise_floor: float
    """What the noise alone leaves unexplained: the true features in their true strengths would score this."""
    l0: float
    """Features that fire in a row."""
    true_l0: float


def truth_of(config: SyntheticConfig) -> GroundTruth:
    """What is known of made activations of any kind."""
    return superposition.superposed_truth(config) if config.kind == "superposed" else toy_models.toy_truth(config)


def score(
    sae: SparseAutoencoder, truth: GroundTruth, n_tokens: int, min_fires: int = MIN_FIRES, n_rows: int = FRESH_ROWS
) -> Scores:
    """Judge an autoencoder that was trained on `n_tokens` rows, on at least `n_rows` fresh ones."""
    w_dec = sae.eval().W_dec.detach()
    return score_directions(w_dec, sae.encode_sparse, sae.decode, truth, n_tokens, min_fires, n_rows)


def score_directions(
    w_dec: Tensor, encode: Encode, decode: Decode, truth: GroundTruth, n_tokens: int, min_fires: int = MIN_FIRES,
    n_rows: int = FRESH_ROWS,
) -> Scores:  # fmt: skip
    """Judge whatever has directions (F, D) and codes rows with them.

    A true feature is frequent if its rate times `n_tokens` reaches `min_fires`. Fresh rows are made and coded twice:
    for what is live, and for what fires together.
    """
    seen = _Seen.of(truth, encode, decode, len(w_dec), n_rows)
    live = np.flatnonzero(seen.n_found)
    found, true = w_dec.float().cpu()[torch.from_numpy(live)], torch.from_numpy(truth.directions)
    of_true, of_found = best_cosines(true, found)
    places = match(true, found)
    matched, partners, cosines = places >= 0, np.full(len(true), -1), np.zeros(len(true), np.float32)
    partners[matched] = live[places[matched]]
    cosines[matched] = tf.cosine_similarity(true[matched], found[places[matched]]).numpy()
    n_both = _firing_together(truth, encode, partners, len(w_dec), n_rows)
    f1 = 2 * n_both / np.maximum(seen.n_true + np.where(matched, seen.n_found[partners], 0), 1)
    frequent = truth.rates * n_tokens >= min_fires
    judged = frequent & (seen.n_true > 0)
    return Scores(
        n_true=len(true), n_frequent=int(frequent.sum()), n_live=len(live),
        mean_max_cosine=_mean(of_true), found_share=_mean(of_true > FOUND),
        found_share_frequent=_mean(of_true[frequent] > FOUND), precision=_mean(of_found > FOUND), mcc=_mean(cosines),
        f1=_mean(f1[judged]), f1_weighted=_mean(f1[judged], seen.n_true[judged]),
        variance_unexplained=seen.error / seen.variance,
        noise_floor=truth.noise**2 * true.shape[1] * seen.n_rows / seen.variance,
        l0=float(seen.n_found.sum() / seen.n_rows), true_l0=float(seen.n_true.sum() / seen.n_rows),
    )  # fmt: skip


def best_cosines(true: Tensor, found: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Largest cosine of each true direction (n) and of each found one (F) with any of the others; 0 where there is
    none."""
    of_true, of_found = np.zeros(len(true), np.float32), np.full(len(found), -1 if len(true) else 0, np.float32)
    units = tf.normalize(found, dim=1)
    for start in range(0, len(true) if len(found) else 0, _BLOCK):
        cosines = (tf.normalize(true[start : start + _BLOCK], dim=1) @ units.T).numpy()
        of_true[start : start + _BLOCK] = cosines.max(1)
        np.maximum(of_found, cosines.max(0), out=of_found)
    return of_true, of_found


def match(true: Tensor, found: Tensor) -> np.ndarray:
    """int64 (n,): the found direction of each true one, all different, with the largest sum of cosines; -1 without one.

    The assignment problem, by Jonker and Volgenant's method as scipy has it. Holds n × F numbers of 8 bytes: 512 MiB at
    4,096 × 16,384.
    """
    from scipy.optimize import linear_sum_assignment  # a tenth of a second to load

    partners = np.full(len(true), -1)
    if not len(true) or not len(found):
        return partners
    few, many = (true, found) if len(true) <= len(found) else (found, true)
    costs = np.empty((len(few), len(many)))
    units = tf.normalize(many, dim=1)
    for start in range(0, len(few), _BLOCK):
        costs[start : start + _BLOCK] = -(tf.normalize(few[start : start + _BLOCK], dim=1) @ units.T).numpy()
    rows, columns = linear_sum_assignment(costs)
    if few is true:
        partners[rows] = columns
    else:
        partners[columns] = rows
    return partners


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """0 of nothing."""
    return float(np.average(values, weights=weights)) if len(values) else 0.0


@dataclass
class _Seen:
    """Fresh rows: how often each of the n true and of the F found features fires, and what is not explained."""

    n_true: np.ndarray
    n_found: np.ndarray
    n_rows: int
    error: float
    variance: float

    @classmethod
    def of(cls, truth: GroundTruth, encode: Encode, decode: Decode, n_features: int, n_rows: int) -> _Seen:
        n, width = truth.directions.shape
        seen = cls(np.zeros(n, np.int64), np.zeros(n_features, np.int64), 0, 0.0, 0.0)
        total, squares = torch.zeros(width, dtype=torch.float64), 0.0
        for x, codes, sparse in _coded(truth, encode, n_rows):
            wide = x.double()
            total += wide.sum(0)
            squares += wide.square().sum().item()
            seen.error += (wide - decode(sparse).double().cpu()).square().sum().item()
            seen.n_rows += len(x)
            seen.n_true += np.bincount(codes.feature_ids, minlength=n)
            seen.n_found += np.bincount(sparse.feature_ids, minlength=n_features)
        seen.variance = squares - total.square().sum().item() / seen.n_rows
        return seen


def _coded(truth: GroundTruth, encode: Encode, n_rows: int) -> Iterator[tuple[Tensor, SparseValues, SparseValues]]:
    """At least so many fresh rows, the same each time, with what fires in them in truth and as found."""
    for values, codes in truth.fresh():
        x = torch.from_numpy(values)
        yield x, codes, encode(x)
        n_rows -= len(x)
        if n_rows <= 0:
            return


def _firing_together(
    truth: GroundTruth, encode: Encode, partners: np.ndarray, n_features: int, n_rows: int
) -> np.ndarray:
    """int64 (n,): fresh rows in which a true feature and its partner both fire."""
    n = len(partners)
    owner, n_both = np.full(n_features, -1), np.zeros(n, np.int64)
    owner[partners[partners >= 0]] = np.flatnonzero(partners >= 0)
    for _, codes, sparse in _coded(truth, encode, n_rows):
        claimed = owner[sparse.feature_ids]
        claims = (sparse.rows * n + claimed)[claimed >= 0]
        right = np.intersect1d(codes.rows * n + codes.feature_ids, claims, assume_unique=True)
        n_both += np.bincount(right % n, minlength=n)
    return n_both
