"""The training step for batches in which so many entries are active that products of whole matrices are quicker.

Architectures that pay for their values begin this way: half of all pre-activations are positive at first. A worker
takes a piece of rows through everything that needs them while they are in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeflow.runtime.linear import converted, linear
from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae.architectures import FeatureSums
from saeflow.sae.encoder import Encoder
from saeflow.sae.step.batch import CentredBatch, StepResult, StepSettings, Weights, worker_ranges
from saeflow.sae.step.gradients import without_radial

DENSE_SHARE = 0.1
"""Share of active entries up to which the sparse step is quicker, measured at D = 256, F = 4,096."""

_WORKER_ENTRIES, _WORKER_COLUMNS = 1 << 20, 512
"""Pre-activations of the rows that a worker takes at a time, and features of a piece of the gradients."""


class _DensePiece(NamedTuple):
    """Errors and sums of a range of rows."""

    error: float
    second_error: float
    fired: Tensor
    """Active entries of each feature (F)."""
    d_pre: Tensor
    sums: FeatureSums
    penalty: Tensor


class _DensePass:
    """Values and derivatives (B, F) of a batch in the precision of the product, and its residuals (B, D_out)."""

    def __init__(self, batch: CentredBatch, encoder: Encoder, weights: Weights, settings: StepSettings) -> None:
        self.batch, self.encoder, self.weights, self.settings = batch, encoder, weights, settings
        self.scale = 2 * settings.scale
        self.low_w_dec = converted(weights.w_dec, batch.low.dtype, settings.threads)
        self.values = batch.low.new_empty(len(batch.low), len(weights.w_dec))
        self.d_pre = torch.empty_like(self.values)
        self.residual = torch.empty_like(batch.target)

    def explain_rows(self, part: tuple[int, int]) -> _DensePiece:
        rows, rule, every = slice(*part), self.settings.rule, slice(None)
        pre, target = self.encoder.pre_activations(self.batch.low[rows]).float(), self.batch.target[rows]
        values = rule.values(pre, every)
        self.residual[rows], g = self._residual(values, target)
        error, second_error, g_second = self.residual[rows].square().sum().item(), 0.0, None
        if (second := rule.second_values(pre)) is not None:
            rest, g_second = self._residual(second, target)
            second_error = rest.square().sum().item()
        d_pre, to_sum = rule.backward(pre, values, g, g_second, every)
        self.values[rows], self.d_pre[rows] = values, d_pre
        sums = {name: numbers.sum(0) for name, numbers in to_sum.items()}
        penalty = rule.penalty(pre, values, every)
        return _DensePiece(error, second_error, (values > 0).sum(0), d_pre.sum(0), sums, penalty)

    def _residual(self, values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual, and the derivative of the loss by the values."""
        rest = torch.addmm(target, values, self.weights.w_dec, beta=-1)
        return rest, linear(rest.to(self.low_w_dec.dtype), self.low_w_dec).float().mul_(self.scale)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of encoder and decoder rows."""
        d_w_enc, d_w_dec = torch.empty_like(self.weights.w_enc), torch.empty_like(self.weights.w_dec)
        low, threads, w_dec = self.batch.low, self.settings.threads, self.weights.w_dec
        residual = converted(self.residual, low.dtype, threads)

        def differentiate(part: tuple[int, int]) -> None:
            features = slice(*part)
            d_w_enc[features] = self.d_pre[:, features].t() @ low
            of_decoder = (self.values[:, features].t() @ residual).float().mul_(self.scale)
            d_w_dec[features] = without_radial(of_decoder, w_dec[features]) if self.settings.on_sphere else of_decoder

        in_parallel(differentiate, worker_ranges(w_dec, _WORKER_COLUMNS), threads)
        return d_w_enc, d_w_dec


def dense_step(batch: CentredBatch, encoder: Encoder, weights: Weights, settings: StepSettings) -> StepResult:
    """Return loss and gradients from all entries. The encoder has no cut."""
    encoder.prepare()
    whole = _DensePass(batch, encoder, weights, settings)
    n_rows, n_features = whole.values.shape
    rows = ranges(n_rows, min(max(_WORKER_ENTRIES // n_features, 16), 256))
    pieces = in_parallel(whole.explain_rows, rows, settings.threads)
    d_w_enc, d_w_dec = whole.gradients()
    errors, second_errors, fired, d_pre, sums, penalty = zip(*pieces, strict=True)
    total = torch.stack(fired).sum(0)
    return StepResult(
        error=sum(errors),
        mean_error=sum(errors) + sum(second_errors),
        n_active=int(total.sum()),
        fired=total,
        penalty=torch.stack(penalty).double().sum(),
        residual=whole.residual,
        d_w_enc=d_w_enc,
        d_w_dec=d_w_dec,
        d_pre=torch.stack(d_pre).sum(0),
        d_b_dec=whole.residual.sum(0) * whole.scale,
        sums={name: torch.stack([each[name] for each in sums]).sum(0) for name in sums[0]},
    )
