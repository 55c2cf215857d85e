"""The figures of quality as sums over tokens in float64, so that they do not depend on how tokens come in batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.activations.sparse_values import SparseValues

_SLICE, _GPU_SLICE = 1 << 18, 1 << 22
"""Logits widened to float64 at a time: few enough for a processor's cache, enough to keep a GPU busy."""
_LEAST = -3.5e38
"""Below any float32: what minus infinity, a vocabulary entry that is ruled out, is counted as."""


def ratio(part: float, whole: float) -> float:
    """part / whole; infinite where there is no whole."""
    return part / whole if whole else math.copysign(math.inf, part)


def recovered(original: float, spliced: float, ablated: float) -> float:
    """Share of what ablation costs and the reconstruction does not; 1 is perfect, 0 no better than ablation."""
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

        Mean and spread are those of Chan, Golub and LeVeque (1983): no large sums are subtracted from one another,
        so a mean far from zero costs no digits.
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
        """Of a token and neuron."""
        return self.error / self.n_tokens / self.width

    @property
    def shrinkage(self) -> float:
        """The γ whose division of all reconstructions brings them closest: argmin over γ of sum |y / γ - x|².

        That is sum |y|² / sum x · y: 1 where nothing is shrunk, below 1 where reconstructions are too short
        (Rajamanoharan et al. 2024, arXiv 2404.16014: relative reconstruction bias). As there, x and y are whole
        vectors, neither centred nor without the decoder bias, of every token that is judged.
        """
        return ratio(self.length, self.agreement)


@dataclass
class Firing:
    """On how many tokens each feature fires."""

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
        """Features that fire on none of the tokens."""
        return int((self.n_firing == 0).sum())


def density_histogram(n_firing: np.ndarray, n_tokens: int) -> dict[str, Any]:
    """How many features fire on which share of `n_tokens`, from the number of tokens each fires on.

    Bins are half a decade wide: bin i holds shares from 10^log10_from[i] to just below 10^(log10_from[i] + 0.5), the
    last one also 1. The first is the lowest that holds a feature; what never fires is in no bin.
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
    """What the unchanged model says of the tokens that follow, which changed ones are held against.

    `rows` (n) are those of the logits (N, V) that predict a token, `following` (n) is what does follow. Each logit of
    these rows stays in memory as a probability in float64. Figures are in nats, summed over the rows.
    """

    def __init__(self, logits: Tensor, rows: Tensor, following: Tensor) -> None:
        n, n_entries = len(rows), logits.shape[1]
        at_once = max(1, (_SLICE if logits.device.type == "cpu" else _GPU_SLICE) // n_entries)
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
        """Of a changed model with these logits: cross-entropy, and KL(unchanged ‖ changed).

        KL is sum p (a - b) - log sum exp(a) + log sum exp(b), with logits a and b, and p the shares that follow from a.
        """
        expected, normaliser, losses = self._shares.new_empty(3, len(self._rows))
        for here in self._slices:
            wide, _ = self._read(logits, here, normaliser, losses)
            expected[here] = torch.linalg.vecdot(self._shares[here], wide)
        divergence = (self._expected - expected) + (normaliser - self._normaliser)
        return float(losses.sum()), float(divergence.sum())

    def _read(self, logits: Tensor, here: slice, normaliser: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows of logits in float64, and their exponentials up to a factor; fills log sum exp and losses."""
        wide = logits[self._rows[here]].double().clamp_(min=_LEAST)
        largest = wide.amax(1, keepdim=True)
        exponentials = (wide - largest).exp_()
        normaliser[here] = largest.flatten() + exponentials.sum(1).log_()
        losses[here] = normaliser[here] - wide.gather(1, self._following[here, None]).flatten()
        return wide, exponentials
