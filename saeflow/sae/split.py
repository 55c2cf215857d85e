"""How ranks share a training step, and how they choose the largest entries of all.

Ranks that split the rows have the whole dictionary each, choose and explain their rows, and then share the entries and
residuals: every rank computes the same gradients and takes the same step. Ranks that split the features have all rows
each, and a range of the dictionary with its gradients and moments; they add up their partial reconstructions. At most
one of the two is split. The entries chosen are those that one process would choose, also among equals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.activations.sparse_values import SparseRows, SparseTensors
from saeflow.runtime.linear import at_least_float32
from saeflow.runtime.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Split:
    """The ranks among which the rows of a batch are split, and those among which the features are."""

    rows: Ranks = ALONE
    features: Ranks = ALONE

    @classmethod
    def of(cls, ranks: Ranks, what: Literal["data", "features"]) -> Split:
        return cls(rows=ranks) if what == "data" else cls(features=ranks)

    @property
    def ranks(self) -> Ranks:
        """All ranks."""
        return self.rows if self.rows.n > 1 else self.features

    @property
    def only_features(self) -> Split:
        """The split of work on rows that every rank has."""
        return Split(features=self.features)

    def for_rows(self, n: int) -> Split:
        """Return the split of a batch of n rows: with fewer rows than ranks, each rank does the whole batch."""
        return self if n >= self.rows.n else self.only_features


WHOLE = Split()
"""One process does all the work."""


def no_entries(n_rows: int, like: Tensor) -> SparseTensors:
    """Return rows without entries, where the matrix `like` is and in its precision."""
    starts = torch.zeros(n_rows + 1, dtype=torch.int64, device=like.device)
    return SparseRows(starts, starts[:0].int(), at_least_float32(like[:0, 0]))


def kept(entries: SparseTensors, keep: Tensor) -> SparseTensors:
    """Return the entries for which `keep` (nnz) is true."""
    counts = torch.bincount(entries.rows[keep], minlength=len(entries.row_starts) - 1)
    return SparseRows(tf.pad(counts.cumsum(0), (1, 0)), entries.feature_ids[keep], entries.values[keep])


def largest_of_rows(own: SparseTensors, k: int, features: Ranks) -> SparseTensors:
    """Return those of a rank's own entries that are among the k largest of their row, over all features.

    `own` are the rank's k largest of each row, by magnitude. Among equals the lower features are chosen.
    """
    if features.n == 1:
        return own
    rows = own.rows
    places = torch.arange(len(rows), device=rows.device) - own.row_starts[rows]
    sizes = own.values.new_zeros(len(own.row_starts) - 1, k)
    sizes[rows, places] = own.values.abs()
    (every,) = features.together(sizes)
    every = every.view(features.n, *sizes.shape).transpose(0, 1).flatten(1)
    first = every.sort(dim=1, descending=True, stable=True).indices[:, :k]
    among = torch.zeros_like(every, dtype=torch.bool).scatter_(1, first, True)
    return kept(own, among[rows, features.number * k + places])


def largest_of_batch(
    own: SparseTensors, sizes: Tensor, n: int, n_rows: int, n_features: int, split: Split
) -> tuple[SparseTensors, float]:
    """Return those of a rank's own entries whose sizes (nnz) are among the n largest of all ranks, and the n-th size.

    Among equals the first are chosen, by row and then feature. With n entries or fewer, all are, and the size is 0.
    The batch has `n_rows`, the dictionary `n_features`.
    """
    (every,) = split.ranks.together(sizes)
    if len(every) <= n:
        return own, 0.0
    nth = every.kthvalue(len(every) - n + 1).values
    first_row, first_id = split.rows.share(n_rows).start, split.features.share(n_features).start
    order = (own.rows + first_row) * n_features + own.feature_ids.long() + first_id
    (ties,) = split.ranks.together(order[sizes == nth])
    last = ties.sort().values[n - int((every > nth).sum()) - 1]
    return kept(own, (sizes > nth) | ((sizes == nth) & (order <= last))), nth.item()
