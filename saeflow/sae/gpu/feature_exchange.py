"""What ranks that split the features tell one another in a step: sizes of candidates, and partial reconstructions.

Each rank has all rows of a batch, and a range of the features with their weights and moments. It chooses among its own
features, and keeps those that are among the largest of all ranks. Every tensor exchanged has a size that all ranks know
beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saeflow.runtime.ranks import Ranks
from saeflow.sae.gpu.choice.choose import Entries
from saeflow.sae.gpu.choice.chooser import Chosen
from saeflow.sae.gpu.decode import decode_rows, multiply_residuals, room_for_residuals
from saeflow.sae.gpu.exchange import RowExchange, entries_kept
from saeflow.sae.gpu.rows.by_feature import rows_of_entries

_LAST = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class FeatureExchange:
    """Ranks that split the features, and the rows of a batch."""

    ranks: Ranks
    n_rows: int
    n_features: int
    """All features."""

    @property
    def mine(self) -> slice:
        """The rows that this rank chooses from and decodes: all."""
        return slice(0, self.n_rows)

    def of_first_rows(self, n_rows: int) -> FeatureExchange:
        return replace(self, n_rows=n_rows)

    def chosen_of_all(self, own: Chosen, k: int, by_token: bool) -> Chosen:
        """Return those of this rank's entries that are among the k largest of their row, or the k B largest, of all.

        `own` has as many of this rank's features. Of equals those of lower rows, then lower features are chosen.
        """
        starts, ids, values = own.entries
        used = torch.arange(len(ids), device=ids.device) < starts[-1]
        rows = torch.where(used, rows_of_entries(starts, len(ids)), self.n_rows)
        among = self._among_largest_of_rows if by_token else self._among_largest
        keep = used & among(own.entries, rows, used, k)
        entries = entries_kept(ids, rows, values, keep, len(ids), self.n_rows)
        return Chosen(entries, entries.row_starts[-1:], self.total(own.n_wrong.clone()))

    def _among_largest_of_rows(self, own: Entries, rows: Tensor, used: Tensor, k: int) -> Tensor:
        places = torch.arange(len(rows), device=rows.device) - own.row_starts[rows.clamp(max=self.n_rows - 1)]
        at = torch.where(used, rows * k + places, self.n_rows * k)
        sizes = own.values.new_zeros(self.n_rows * k + 1).scatter_(0, at, own.values.abs())
        every = self.ranks.gathered(sizes[:-1].view(self.n_rows, k)).transpose(0, 1).flatten(1)
        kth = every.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        larger, equal = every > kth, every == kth
        keep = larger | (equal & (equal.cumsum(1) <= k - larger.sum(1, keepdim=True)))
        mine = keep.view(self.n_rows, self.ranks.n, k)[:, self.ranks.number].flatten()
        return mine[at.clamp(max=self.n_rows * k - 1)]

    def _among_largest(self, own: Entries, rows: Tensor, used: Tensor, k: int) -> Tensor:
        n, first = k * self.n_rows, self.ranks.share(self.n_features).start
        order = torch.where(used, rows.long() * self.n_features + own.ids + first, _LAST)
        sizes, orders = own.values.new_zeros(n), torch.full((n,), _LAST, device=order.device)
        sizes[: len(order)], orders[: len(order)] = own.values, order
        every, every_order = self.ranks.gathered(sizes).flatten(), self.ranks.gathered(orders).flatten()
        nth = every.topk(n, sorted=False).values.min()
        equals = torch.where(every == nth, every_order, _LAST).sort().values
        last = equals[(n - 1 - (every > nth).sum())[None]]
        return (own.values > nth) | ((own.values == nth) & (order <= last))

    def decoded(
        self, entries: Entries, values: Tensor, w_dec: Tensor, target: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return residuals (G, B, D_out), their squared norms (G, B), and products (N) with the directions.

        `entries` and `ends` are those of this rank's features. The first rank reconstructs the target, and all others
        zeros: so their residuals add up to those of all features.
        """
        residual, losses = room_for_residuals(len(ends), target)
        products = torch.zeros_like(values)
        arrays = entries.row_starts, entries.ids, values.contiguous(), w_dec
        decode_rows(*arrays, self._own_target(target), ends, residual, losses, products)
        self.ranks.sum_(residual)
        for nested, loss in enumerate(losses):
            alone = residual[nested] - residual[nested + 1] if nested + 1 < len(ends) else residual[nested]
            loss.copy_(torch.linalg.vector_norm(alone, dim=1).square_())
        multiply_residuals(entries.row_starts, entries.ids, w_dec, ends, residual, products)
        return residual, losses, products

    def _own_target(self, target: Tensor) -> Tensor:
        return target if self.ranks.is_first else torch.zeros_like(target)

    def total(self, own: Tensor) -> Tensor:
        """Return the sum over all ranks of a number or vector that belongs to their features."""
        return self.ranks.sum_(own)

    def least(self, own: Tensor) -> Tensor:
        """Return the smallest of all ranks' numbers."""
        return self.ranks.least_(own)


Exchange = RowExchange | FeatureExchange
