"""Figures of quality, as sums over tokens in float64: they do not depend on how tokens come in batches."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.activations.sparse_values import SparseValues

CPU_LOGITS, GPU_LOGITS = 1 << 18, 1 << 22
"""Logits widened to float64 at a time: few enough for a processor's cache, enough to keep a GPU busy."""
_LEAST = -3.5e38
"""Below any float32. It replaces minus infinity, the logit of a vocabulary entry that is ruled out."""


def ratio(part: float, whole: float) -> float:
    """Return part / whole; infinite if the whole is 0."""
    return part / whole if whole else math.copysign(math.inf, part)


def recovered(original: float, spliced: float, ablated: float) -> float:
    """Return the share of the cost of ablation that a reconstruction saves; 1 is perfect, 0 as bad as ablation."""
    return ratio(ablated - spliced, ablated - original)


@dataclass
class Reconstruction:
    """Sums over tokens of activations x and their reconstructions y, vectors of the same width."""

    width: int
    n_tokens: int = 0
    error: float = 0.0
    """Sum of |x - y|²."""
    spread: float = 0.0
    """Sum of |x - mean|²."""
    agreement: float = 0.0
    """Sum of x · y."""
    length: float = 0.0
    """Sum of |y|²."""

    def __post_init__(self) -> None:
        self.mean = torch.zeros(self.width, dtype=torch.float64)

    def add(self, x: Tensor, reconstruction: Tensor) -> None:
        """Count tokens (n, D).

        Mean and spread follow Chan, Golub and LeVeque (1983): no large sums are subtracted from one another, so a mean
        far from zero costs no digits.
        """
        if not len(x):
            return
        wide = x.double()
        there, mean, total = reconstruction.to(wide), wide.mean(0), self.n_tokens + len(x)
        apart, share = mean - self.mean, len(x) / total
        self.spread += (wide - mean).square().sum().item() + apart.square().sum().item() * self.n_tokens * share
        self.mean += apart * share
        self.n_tokens = total
        self.error += (wide - there).square().sum().item()
        self.agreement += (wide * there).sum().item()
        self.length += there.square().sum().item()

    @property
    def variance_unexplained(self) -> float:
        """Sum of |x - y|² over sum of |x - mean|², the mean taken over the same tokens."""
        return ratio(self.error, self.spread)

    @property
    def mean_squared_error(self) -> float:
        """Mean over tokens and neurons."""
        return self.error / self.n_tokens / self.width

    @property
    def shrinkage(self) -> float:
        """The γ that brings reconstructions closest when they are divided by it: argmin over γ of sum |y / γ - x|².

        This is sum |y|² / sum x · y: 1 if nothing is shrunk, below 1 if reconstructions are too short (Rajamanoharan et
        al. 2024, arXiv 2404.16014: relative reconstruction bias). As in that paper, x and y are whole vectors of all
        evaluation tokens, not centred and with the decoder bias.
        """
        return ratio(self.length, self.agreement)


@dataclass
class WithoutLongest:
    """Tokens in one pass, without the longest 0.1% of them: a few massive activations (Sun et al. 2024, arXiv
    2402.17762) hold most of the variance, and hide how well all others are reconstructed.

    Exact for up to `most_tokens` tokens: a thousandth of them stays in memory, and shorter ones pass into `others`.
    """

    width: int
    most_tokens: int

    def __post_init__(self) -> None:
        self._others = Reconstruction(self.width)
        self._pairs = torch.empty(0, 2, self.width)
        """The longest tokens (n, 2, D), the longest first; the first one of equals. Each has its reconstruction."""

    def add(self, x: Tensor, reconstruction: Tensor) -> None:
        """Count tokens (n, D)."""
        pairs = torch.cat([self._pairs, torch.stack([x, reconstruction.to(x)], 1).cpu()])
        order = _lengths(pairs[:, 0]).sort(descending=True, stable=True).indices
        n_kept = math.ceil(self.most_tokens / 1000)
        self._pairs = pairs[order[:n_kept]]
        shorter = pairs[order[n_kept:].sort().values]
        self._others.add(shorter[:, 0], shorter[:, 1])

    @property
    def figures(self) -> dict[str, float]:
        """Variance unexplained without the longest tokens, and their share of all squared lengths; none if too few."""
        n_longest = math.ceil((self._others.n_tokens + len(self._pairs)) / 1000)
        kept = copy.deepcopy(self._others)
        kept.add(self._pairs[n_longest:, 0], self._pairs[n_longest:, 1])
        if kept.n_tokens < 2:
            return {}
        longest = float(_lengths(self._pairs[:n_longest, 0]).square().sum())
        rest = kept.spread + kept.n_tokens * float(kept.mean.square().sum())
        return {
            "variance_unexplained_without_longest": kept.variance_unexplained,
            "longest_share": ratio(longest, longest + rest) if longest else 0.0,
        }


def _lengths(x: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    return lengths


@dataclass
class Firing:
    """The number of tokens on which each feature fires."""

    n_features: int
    n_tokens: int = 0

    def __post_init__(self) -> None:
        self.n_firing = np.zeros(self.n_features, np.int64)

    def add(self, sparse: SparseValues) -> None:
        self.n_tokens += len(sparse.row_starts) - 1
        self.n_firing += np.bincount(sparse.feature_ids, minlength=self.n_features)

    @property
    def l0(self) -> float:
        """Active features per token."""
        return int(self.n_firing.sum()) / self.n_tokens

    @property
    def silent(self) -> int:
        """Number of features that fire on none of the tokens."""
        return int((self.n_firing == 0).sum())


def density_histogram(n_firing: np.ndarray, n_tokens: int) -> dict[str, Any]:
    """Return a histogram of features by the share of `n_tokens` on which they fire.

    Bins are half a decade wide: bin i holds shares from 10^log10_from[i] to just below 10^(log10_from[i] + 0.5), the
    last one also 1. The first bin is the lowest that holds a feature. Features that never fire are in no bin.
    """
    shares = n_firing[n_firing > 0] / max(n_tokens, 1)
    halves = np.arange(-40, 1)  # 10^-20 is less than any share
    edges = np.array([float(f"1e{half // 2}") * (math.sqrt(10) if half % 2 else 1.0) for half in halves])
    counts = np.histogram(shares, edges)[0]
    first = int(counts.nonzero()[0][0]) if len(shares) else len(counts)
    return {
        "log10_from": (halves[first:-1] / 2).tolist(),
        "n_features": counts[first:].tolist(),
        "n_never": int((n_firing == 0).sum()),
    }


class Predictions:
    """Predictions of the unchanged model, to compare a changed one with.

    `rows` (n) are the rows of the logits (N, V) that predict a token, `following` (n) the tokens that follow. The
    logits of these rows stay in memory as probabilities in float64. Figures are in nats, summed over the rows.
    """

    def __init__(self, logits: Tensor, rows: Tensor, following: Tensor, most_logits: int | None = None) -> None:
        n, n_entries = len(rows), logits.shape[1]
        usual = CPU_LOGITS if logits.device.type == "cpu" else GPU_LOGITS
        at_once = max(1, (most_logits or usual) // n_entries)
        self._slices = [slice(start, start + at_once) for start in range(0, n, at_once)]
        self._rows, self._following = rows, following
        self._shares = torch.empty(n, n_entries, dtype=torch.float64, device=logits.device)
        self._expected, self._normaliser, self._losses = self._shares.new_empty(3, n)
        for here in self._slices:
            wide, exponentials = self._read(logits, here, self._normaliser, self._losses)
            torch.div(exponentials, exponentials.sum(1, keepdim=True), out=self._shares[here])
            self._expected[here] = torch.linalg.vecdot(self._shares[here], wide)

    @property
    def loss(self) -> float:
        """Cross-entropy of the tokens that follow."""
        return float(self._losses.sum())

    def beside(self, logits: Tensor) -> tuple[float, float]:
        """Return the cross-entropy of a changed model with these logits, and KL(unchanged ‖ changed).

        KL is sum p (a - b) - log sum exp(a) + log sum exp(b), with logits a and b, and the probabilities p of a.
        """
        expected, normaliser, losses = self._shares.new_empty(3, len(self._rows))
        for here in self._slices:
            wide, _ = self._read(logits, here, normaliser, losses)
            expected[here] = torch.linalg.vecdot(self._shares[here], wide)
        divergence = (self._expected - expected) + (normaliser - self._normaliser)
        return float(losses.sum()), float(divergence.sum())

    def _read(self, logits: Tensor, here: slice, normaliser: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Return some rows of logits in float64, and their exponentials up to a factor; fill log sum exp and losses."""
        wide = logits[self._rows[here]].double().clamp_(min=_LEAST)
        largest = wide.amax(1, keepdim=True)
        exponentials = (wide - largest).exp_()
        normaliser[here] = largest.flatten() + exponentials.sum(1).log_()
        losses[here] = normaliser[here] - wide.gather(1, self._following[here, None]).flatten()
        return wide, exponentials
