"""How well the entries of a step reconstruct a batch, and the derivatives of its loss by their pre-activations.

The rules are those of the processor (`saeflow.sae.architectures`): they work number by number, wherever numbers lie.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.sae.architectures import FeatureSums, TrainingRule
from saeflow.sae.batch import variance_of
from saeflow.sae.gpu.choice.choose import Entries
from saeflow.sae.gpu.feature_exchange import Exchange
from saeflow.sae.gpu.rows.by_feature import rows_of_entries, rows_of_residuals, used_ids


class Centred(NamedTuple):
    """A batch with the biases taken off, as `saeflow.sae.batch.CentredBatch`, but for its variance on the device."""

    low: Tensor
    target: Tensor
    variance: Tensor
    """(1) float64."""

    @classmethod
    def of(cls, x: Tensor, b_in: Tensor, target: Tensor | None, b_dec: Tensor, dtype: torch.dtype) -> Centred:
        """Return x (B, D) and its target (B, D_out) without biases; without a target, x is the target."""
        low = x - b_in
        wanted = low if target is None else target - b_dec
        wide = wanted.double()
        variance = variance_of(wide.sum(0), wide.square().sum()[None], len(x))
        return cls(low.to(dtype), wanted, variance)

    def scale(self, of_variance: bool) -> Tensor:
        """Return the factor (1) on a squared error that makes it a share of the variance, or a mean of all numbers."""
        return 1 / (self.variance if of_variance else torch.full_like(self.variance, self.target.numel()))


class Reconstructed(NamedTuple):
    """Entries and how well they reconstruct. Unused places have the feature F."""

    ids: Tensor
    rows: Tensor
    residual_rows: Tensor
    """Where in `residual` each entry's residual lies."""
    pair: Tensor
    """(2, N): values, and derivatives by pre-activations, both times the scale of the loss."""
    residual: Tensor
    """(R, D_out)"""
    losses: Tensor
    """Squared norms of residuals (G, B)."""
    to_sum: FeatureSums
    """Numbers of entries (N), to be summed by feature."""

    def followed_by(self, other: Reconstructed) -> Reconstructed:
        """Return the entries of both, for the same rows of the batch; those of the other have nothing to sum."""
        return self._replace(
            ids=torch.cat([self.ids, other.ids]),
            rows=torch.cat([self.rows, other.rows]),
            residual_rows=torch.cat([self.residual_rows, other.residual_rows + len(self.residual)]),
            pair=torch.cat([self.pair, other.pair], 1),
            residual=torch.cat([self.residual, other.residual]),
            to_sum={name: tf.pad(numbers, (0, len(other.ids))) for name, numbers in self.to_sum.items()},
        )


class Explained(NamedTuple):
    """A batch as its entries explain it. Numbers are float64."""

    main: Reconstructed
    fired: Tensor
    """(N): features of active entries; F elsewhere."""
    n_active: Tensor
    """(): mean number of active features of a token."""
    errors: Tensor
    """(G): squared errors of the nested dictionaries."""
    second_error: Tensor
    """(): squared error of the second reconstruction, if the architecture has one (gated)."""
    penalty: Tensor
    """(): sum of the penalty, see `TrainingRule.penalty`."""
    d_b_dec: Tensor
    """(D_out): gradient of the decoder bias where it is added at the end."""


def explain(
    entries: Entries, batch: Centred, rule: TrainingRule, w_dec: Tensor, ends: Tensor, scale: Tensor,
    exchange: Exchange,
) -> Explained:  # fmt: skip
    """Reconstruct a batch from the pre-activations of its entries; `ends` (G) are sizes of nested dictionaries.

    `scale` (1): factor on squared errors. Unused places have the pre-activation 0, to which no rule gives a value or a
    price; their derivatives are never read. Each rank of `exchange` decodes its share of the rows.
    """
    ids, pre, at = entries.ids, entries.values, entries.ids.long()
    factor = (2 * scale / len(ends)).float()
    values, second = rule.values(pre, at), rule.second_values(pre)
    residual, losses, g = exchange.decoded(entries, values, w_dec, batch.target, ends)
    g_second, second_error = None, losses.new_zeros((), dtype=torch.float64)
    if second is not None:
        _, second_losses, of_second = exchange.decoded(entries, second, w_dec, batch.target, ends)
        g_second, second_error = of_second * factor, second_losses.double().sum()
    d_pre, to_sum = rule.backward(pre, values, g * factor, g_second, at)
    used = used_ids(ids, entries.row_starts, len(w_dec))
    rows, n_rows = rows_of_entries(entries.row_starts, len(ids)), len(batch.low)
    where = rows_of_residuals(used, rows, ends, n_rows).clamp(max=len(ends) * n_rows - 1)
    pair, flat = torch.stack([values * factor, d_pre]), residual.flatten(0, 1)
    main = Reconstructed(used, rows.clamp(max=n_rows - 1), where, pair, flat, losses, to_sum)
    fired = torch.where(values != 0, used, len(w_dec))
    n_active = exchange.total((fired < len(w_dec)).sum().double()) / n_rows
    penalty, d_b_dec = rule.penalty(pre, values, at).double(), residual[0].sum(0) * factor
    return Explained(main, fired, n_active, losses.double().sum(1), second_error, penalty, d_b_dec)
