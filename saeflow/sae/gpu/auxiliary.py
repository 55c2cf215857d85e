"""What dead features add to a step: they explain what living ones miss (Gao et al. 2024, arXiv 2406.04093).

As `saeflow.sae.loss` does it on the processor, but for one thing: the number of rows and of entries follows from the
number of dead features that the host has fetched last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeflow.sae.batch import DEGENERATE
from saeflow.sae.gpu.choice import choose, guess
from saeflow.sae.gpu.choice.product import Product
from saeflow.sae.gpu.decode import decode_rows
from saeflow.sae.gpu.rows.by_feature import rows_of_entries, used_ids
from saeflow.sae.loss import auxiliary_size

_GATHERED = 8
"""A copy of the dead features' weights is made if they are at most this part of all; else all are multiplied."""


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
    scale: Tensor
    """(1): what `pair` was multiplied by; of the auxiliary loss the squares that it is a share of."""

    def followed_by(self, other: Reconstructed) -> Reconstructed:
        """Return the entries of both, for the same rows of the batch."""
        return self._replace(
            ids=torch.cat([self.ids, other.ids]),
            rows=torch.cat([self.rows, other.rows]),
            residual_rows=torch.cat([self.residual_rows, other.residual_rows]),
            pair=torch.cat([self.pair, other.pair], 1),
            residual=torch.cat([self.residual, other.residual]),
        )


class Auxiliary:
    """Reconstructs the residual from dead features. It keeps the guess for its next batch."""

    def __init__(self, signed: bool) -> None:
        self.signed = signed
        self._ratio: Tensor | None = None

    def __call__(
        self, low: Tensor, rest: Tensor, target: Tensor, weights: tuple[Tensor, Tensor, Tensor], dead: Tensor, k: int,
        n_dead: int, weight: float, first_residual: int,
    ) -> Reconstructed:  # fmt: skip
        """Return the entries that dead features (F, bool) add, for the first rows of the batch.

        `rest` (B, D_out) is to be reconstructed, `weights` are those of the product, the encoder's bias and the
        decoder's. `first_residual`: where the residuals will be put behind others.
        """
        w_low, b_enc, w_dec = weights
        k_dead, n_rows = auxiliary_size(len(target), target.shape[1], k, n_dead)
        product, names = self._product(low[:n_rows], w_low, b_enc, dead, n_dead)
        if self._ratio is None:
            self._ratio = torch.zeros(1, device=low.device)
        lengths = guess.lengths(product.low)
        capacity = 1 << (4 * k_dead - 1).bit_length()
        choice = choose.largest_of_rows(product, k_dead, self._ratio * lengths, capacity)
        self._ratio = guess.next_ratio(choice.kth, lengths)
        starts, places, values = choice.entries
        ids = places if names is None else names[places.long()]
        squares = rest[:n_rows].double().square().sum(), DEGENERATE * target[:n_rows].double().square().sum()
        total = torch.maximum(*squares).clamp(min=1e-30)[None]
        residual, losses, g = torch.empty_like(rest[:n_rows]), target.new_empty(1, n_rows), torch.zeros_like(values)
        ends = torch.full((1,), len(w_dec), dtype=torch.int32, device=low.device)
        decode_rows(starts, ids, values, w_dec, rest[:n_rows].contiguous(), ends, residual[None], losses, g)
        rows = rows_of_entries(starts, len(ids)).clamp(max=n_rows - 1)
        pair = torch.stack([values, g]) * (2 * weight / total).float()
        return Reconstructed(
            used_ids(ids, starts, len(w_dec)), rows, rows + first_residual, pair, residual, losses, total
        )

    def _product(
        self, low: Tensor, w_low: Tensor, b_enc: Tensor, dead: Tensor, n_dead: int
    ) -> tuple[Product, Tensor | None]:
        """Return the product with dead features, and which they are, unless all features are in it."""
        n_features = len(w_low)
        if n_dead * _GATHERED > n_features:
            return Product.of(low, w_low, torch.where(dead, b_enc, -torch.inf), self.signed), None
        places = torch.where(dead, dead.cumsum(0) - 1, n_dead).clamp(max=n_dead)
        numbers = torch.arange(n_features, dtype=torch.int32, device=low.device)
        names = numbers.new_zeros(n_dead + 1).scatter_(0, places, numbers)[:n_dead]
        filled = torch.arange(n_dead, device=low.device) < dead.sum()
        bias = torch.where(filled, b_enc[names.long()], -torch.inf)
        return Product.of(low, w_low[names.long()], bias, self.signed), names
