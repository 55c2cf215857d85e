"""A batch, the weights and how the batch is to be explained: what a training step takes, and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae.architectures import FeatureSums, TrainingRule
from saeflow.sae.split import WHOLE, Split

RowsResult = TypeVar("RowsResult")

DEGENERATE = 1e-6
"""Share of the squares of a batch below which its variance, or the rest to explain, is rounding."""

WORKER_ROWS, WORKER_FEATURES = 512, 128
"""Rows and features that one worker takes at a time."""


class Weights(NamedTuple):
    """W_enc (F, D), W_dec (F, D_out)."""

    w_enc: Tensor
    w_dec: Tensor


@dataclass(frozen=True)
class CentredBatch:
    """A batch with the biases taken off."""

    low: Tensor
    """Input less the input bias (B, D), in the precision of the encoder product."""
    target: Tensor
    """What is to be reconstructed, less the decoder bias (B, D_out), float32."""
    variance: float
    """Sum of the target's squared distances from its mean."""

    def scale(self, of_variance: bool) -> float:
        """Return the factor on a squared error that makes it a share of the variance, or a mean over all numbers."""
        return 1 / (self.variance if of_variance else self.target.numel())

    def part(self, rows: slice) -> CentredBatch:
        """Return some of the rows, with the variance of all."""
        return CentredBatch(self.low[rows], self.target[rows], self.variance)


@dataclass(frozen=True)
class StepSettings:
    """How a batch is explained."""

    rule: TrainingRule
    ends: Tensor
    """Sizes of the nested dictionaries, ascending, int32."""
    scale: float
    """Factor on squared errors."""
    on_sphere: bool
    """True if decoder rows have unit length, and gradients must keep it."""
    use_kernels: bool
    threads: int
    split: Split = WHOLE
    """How ranks share the work."""

    def by_rows(self, function: Callable[[tuple[int, int]], RowsResult], target: Tensor) -> list[RowsResult]:
        """Return what workers compute for ranges of the target's rows.

        Ranks that split the features take all rows at once, on the calling thread: they add up inside `function`.
        """
        alone = self.split.features.n == 1
        parts = worker_ranges(target, WORKER_ROWS, self.use_kernels and alone)
        return in_parallel(function, parts, self.threads if alone else 1)


@dataclass
class StepResult:
    """Errors, counts and gradients of a batch."""

    error: float
    """Sum of squared errors of the whole dictionary."""
    mean_error: float
    """Mean of that sum over all nested dictionaries."""
    n_active: int
    fired: Tensor
    """Entries of each feature (F)."""
    penalty: Tensor
    residual: Tensor
    """Reconstruction less target (B, D_out)."""
    d_w_enc: Tensor
    d_w_dec: Tensor
    d_pre: Tensor
    """Gradient of pre-activations, summed by feature (F)."""
    d_b_dec: Tensor
    """Gradient of the decoder bias where it is added at the end (D_out)."""
    sums: FeatureSums


def on_processor(tensor: Tensor, use_kernels: bool) -> bool:
    """True if the processor's kernels do the work."""
    return use_kernels and tensor.device.type == "cpu"


def worker_ranges(tensor: Tensor, size: int, use_kernels: bool = True) -> list[tuple[int, int]]:
    """Return ranges of the first dimension, one for each piece of a worker's work; one range of all without kernels."""
    return ranges(len(tensor), size) if on_processor(tensor, use_kernels) else [(0, len(tensor))]


def centred_batch(
    x: Tensor, b_in: Tensor, target: Tensor | None, b_dec: Tensor, dtype: torch.dtype, threads: int
) -> CentredBatch:
    """Return the batch that x (B, D) and its target (B, D_out) make; without a target, x is the target.

    Rows that are all equal, or a single one, have no variance; then squared distances from the decoder bias count.
    """
    centred, sums, squares, low = _centred_batch(x, b_in, dtype, threads)
    wanted = centred
    if target is not None:
        wanted, sums, squares, _ = _centred_batch(target, b_dec, torch.float32, threads)
    return CentredBatch(low, wanted, variance_of(sums, squares, len(x)).item())


def variance_of(sums: Tensor, squares: Tensor, n_rows: int) -> Tensor:
    """Return the sum of squared distances from the mean, from sums (D) and the sum of squares of rows, in float64.

    Rows without a variance have that sum of squares in its place.
    """
    variance = squares - sums.square().sum() / n_rows
    return torch.where(variance < DEGENERATE * squares, squares, variance).clamp(min=1e-30)


def _centred_batch(x: Tensor, bias: Tensor, dtype: torch.dtype, threads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x - bias, its sum over rows and its sum of squares in float64, and x - bias in `dtype`."""
    centred = torch.empty_like(x)
    low = centred if dtype == torch.float32 else torch.empty(x.shape, dtype=dtype, device=x.device)

    def centre_rows(rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
        part = torch.sub(x[slice(*rows)], bias, out=centred[slice(*rows)])
        if low is not centred:
            low[slice(*rows)].copy_(part)
        return part.sum(0), torch.linalg.vector_norm(part)

    sums, norms = zip(*in_parallel(centre_rows, worker_ranges(x, WORKER_ROWS), threads), strict=True)
    return centred, torch.stack(sums).double().sum(0), torch.stack(norms).double().square().sum(), low
