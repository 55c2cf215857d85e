"""What ranks that split the rows of a batch tell one another in a step: entries, residuals and losses.

Each rank chooses and explains its share of the rows. From the exchange on, every rank holds what one process would
hold, in the same order, and takes the same step. Every tensor exchanged has a size that all ranks know beforehand, so
the host waits for none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.runtime.ranks import ALONE, Ranks
from saeflow.sae.gpu.choice.choose import Entries
from saeflow.sae.gpu.choice.chooser import Chosen
from saeflow.sae.gpu.decode import decode_rows, room_for_residuals
from saeflow.sae.gpu.rows.by_feature import rows_of_entries


@dataclass(frozen=True)
class RowExchange:
    """Ranks that split the rows of one batch; a rank that is alone exchanges nothing."""

    ranks: Ranks
    n_rows: int

    @property
    def mine(self) -> slice:
        """This rank's share of the rows."""
        return self.ranks.share(self.n_rows)

    @property
    def _longest(self) -> int:
        return -(-self.n_rows // self.ranks.n)

    def chosen_of_all(self, own: Chosen, k: int, by_token: bool) -> Chosen:
        """Return the entries of all rows, from those that each rank has chosen of its own ones.

        `own` has the k largest entries of each row of this rank, or the k B largest of all its rows, if there are so
        many: then the largest of all ranks are chosen, of equals those of lower rows and then of lower features.
        """
        if self.ranks.n == 1:
            return own
        ids, rows, values, n_wrong = self._together(own, (self._longest if by_token else self.n_rows) * k)
        keep, n = rows < self.n_rows, k * self.n_rows
        if not by_token:
            nth = values.topk(n, sorted=False).values.min()
            equal = keep & (values == nth)
            keep = (values > nth) | (equal & (equal.cumsum(0) <= n - (values > nth).sum()))
        entries = entries_kept(ids, rows, values, keep, n, self.n_rows)
        return Chosen(entries, entries.row_starts[-1:], n_wrong)

    def decoded(
        self, entries: Entries, values: Tensor, w_dec: Tensor, target: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return residuals (G, B, D_out), their squared norms (G, B), and products (N) with the directions.

        `entries`, their `values` and the target (B, D_out) are those of all rows. See `decode_rows`.
        """
        starts, target = entries.row_starts[self.mine.start : self.mine.stop + 1], target[self.mine]
        residual, losses = room_for_residuals(len(ends), target)
        products = torch.zeros_like(values)
        decode_rows(starts, entries.ids, values.contiguous(), w_dec, target, ends, residual, losses, products)
        self.ranks.sum_(products)  # others have zeros where this rank has numbers
        return self._rows_of_all(residual), self._rows_of_all(losses), products

    def _together(self, own: Chosen, room: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return numbers, rows and values of all ranks' entries, with row B at unused places, and all wrong guesses."""
        starts, ids, values = own.entries
        places = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
        rows = rows_of_entries(starts, len(ids)) + self.mine.start
        rows = torch.where(places < starts[-1], rows, self.n_rows)
        packed = tf.pad(torch.stack([ids, rows, values.view(torch.int32)]), (0, room + 1 - len(ids)))
        packed[1, len(ids) : room] = self.n_rows
        packed[0, room:] = own.n_wrong
        every = self.ranks.gathered(packed).transpose(0, 1)
        ids, rows, bits = every[:, :, :room].flatten(1)
        return ids, rows, bits.view(torch.float32), every[0, :, room].sum(0, keepdim=True).int()

    def _rows_of_all(self, own: Tensor) -> Tensor:
        """Return rows (G, B, ...) of all ranks, from this rank's share (G, b, ...)."""
        if self.ranks.n == 1:
            return own
        room = own.new_zeros(len(own), self._longest, *own.shape[2:])
        room[:, : own.shape[1]] = own
        sizes = [Ranks(number, self.ranks.n).share(self.n_rows) for number in range(self.ranks.n)]
        every = self.ranks.gathered(room)
        return torch.cat([part[:, : size.stop - size.start] for part, size in zip(every, sizes, strict=True)], 1)

    def total(self, own: Tensor) -> Tensor:
        """Return a number or vector that belongs to all features: every rank has it."""
        return own

    least = total

    def of_first_rows(self, n_rows: int) -> RowExchange:
        """Return what every rank does by itself for some rows."""
        return RowExchange(ALONE, n_rows)


def entries_kept(ids: Tensor, rows: Tensor, values: Tensor, keep: Tensor, room: int, n_rows: int) -> Entries:
    """Return the entries to keep one after the other, in room for so many; `rows` (N) are ascending."""
    to = torch.where(keep, keep.cumsum(0) - 1, room)
    kept = [torch.zeros(room + 1, dtype=each.dtype, device=each.device) for each in (ids, values)]
    kept.append(torch.full_like(kept[0], n_rows))
    of_ids, of_values, of_rows = (
        new.scatter_(0, to, each)[:room] for new, each in zip(kept, (ids, values, rows), strict=True)
    )
    every_row = torch.arange(n_rows + 1, dtype=of_rows.dtype, device=of_rows.device)
    return Entries(torch.searchsorted(of_rows, every_row, out_int32=True), of_ids, of_values)
