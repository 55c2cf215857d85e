"""Bytes of device memory that training by kernels takes, from the sizes alone. This module does not import Triton.

Temporaries of a step are largest in one of four places: where the batch is centred, where entries are chosen, where
dead features reconstruct the rest, or where the rows are updated. `tests/sae/gpu/test_memory.py` compares the formula
with what a step holds. What torch takes inside of one operation, such as a sort, is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from saeflow.recipe.settings import SAEConfig, TrainConfig
from saeflow.sae.architectures import TRAITS
from saeflow.sae.loss import auxiliary_size
from saeflow.sae.optimizer.adam import MOMENT_BYTES
from saeflow.sae.optimizer.bfloat16 import WEIGHT_BYTES
from saeflow.sae.split import WHOLE, Split

_FLOAT, _DOUBLE = 4, 8
CAPACITY, AUX_CAPACITY = 16, 4
"""Candidates that a row's buffer holds, in multiples of k: of the step (see `guess`), and of its auxiliary loss."""
_CANDIDATE, _CANDIDATE_OF_BATCH = 8, 84
"""Bytes of a candidate: number and value; of the whole batch also its row, and all of it sorted by place."""
_HISTOGRAM, BATCH_HISTOGRAMS = 8192, 64
"""Bytes of a row's counters, and how many of them a batch has: all programs would wait for a single one."""
_CHOSEN, _EXPLAINED, _SORTED = 8, 24, 44
"""Bytes of an entry: as it is chosen, as it is explained, and while it is sorted by feature."""
_GATHERED_ENTRY = 44
"""Bytes of an entry of each rank, while the largest of all are chosen."""
_SEGMENT = 128
"""Entries for which there is a row of sums, at most."""
GATHERED = 8
"""A copy of the dead features' weights is made if they are at most this part of all; else all are multiplied."""
_FEATURE = 40
"""Bytes of a feature's numbers that a step keeps to its end: where its entries begin, if it is dead, if it is awake."""
_FEW = 1 << 20
"""Bytes of everything else: vectors of the width, numbers of rows."""
WIDTH_MULTIPLE = 64
"""Rows of a product have such a width, or are filled up with zeros. A mask, or an address for every number of a row
that begins anywhere, would need more registers than a thread has."""


@dataclass(frozen=True)
class TrainingSize:
    """What the memory of a training by kernels depends on."""

    n_rows: int
    n_features: int
    d_in: int
    d_out: int
    k: int
    n_nested: int = 1
    by_token: bool = True
    is_transcoder: bool = False
    dtype: torch.dtype = torch.bfloat16
    """Precision of the encoder product."""
    n_dead: int = 0
    """Dead features that take part; 0 without the auxiliary loss."""
    weight_bytes: int = 4
    moment_bytes: float = 8.0
    """Bytes of both moments of a weight."""
    n_ranks: int = 1
    """Ranks that split the rows of a batch."""
    n_feature_ranks: int = 1
    """Ranks that split the features; `n_features` and `n_dead` are then those of one of them."""

    @classmethod
    def of(
        cls, sae: SAEConfig, train: TrainConfig, widths: tuple[int, int], n_rows: int, split: Split = WHOLE
    ) -> TrainingSize:
        """Return the size of the largest step of a training, on one of the ranks that share it."""
        n_features = -(-sae.n_features // split.features.n)
        k, by_token = max(sae.k, train.k_start or 0), TRAITS[sae.architecture].chooses_by_token
        size = cls(
            n_rows, n_features, *widths, k, len(sae.nested), by_token, sae.target_site is not None,
            weight_bytes=WEIGHT_BYTES[train.weights], moment_bytes=MOMENT_BYTES[train.moments], n_ranks=split.rows.n,
            n_feature_ranks=split.features.n,
        )  # fmt: skip
        if not TRAITS[sae.architecture].revives_dead or not train.aux_weight > 0:
            return size
        n_dead = max(1, k // 4), max(1, n_features // GATHERED), n_features
        return max((replace(size, n_dead=n) for n in n_dead), key=lambda each: each.step_bytes)

    @property
    def state_bytes(self) -> int:
        """Bytes of weights and both moments, and of the encoder as the product reads it, if that is a copy."""
        a_weight = self.weight_bytes + self.moment_bytes
        is_copy = self.weight_bytes != self.dtype.itemsize or self._width != self.d_in
        copy = self._width * self.dtype.itemsize if is_copy else 0
        return round(self.n_features * (a_weight * (self.d_in + self.d_out) + 3 * _FLOAT + copy + _FEATURE))

    @property
    def step_bytes(self) -> int:
        """The most bytes that temporaries of a step take together, without the batch itself."""
        return max(self._phases()) + _FEATURE * self.n_features + _FEW

    def _phases(self) -> Iterator[int]:
        batch = self._batch
        yield batch + 2 * _DOUBLE * self.n_rows * self.d_out
        yield batch + self._choice + _CHOSEN * self._own_entries
        explained, residuals = batch + _CHOSEN * self._entries, self._residuals(self.n_nested * self.n_rows)
        if self.n_ranks > 1:
            yield explained + _GATHERED_ENTRY * self.n_ranks * self._own_entries
            yield explained + _CHOSEN * self._entries + 2 * residuals + 2 * residuals // self.n_ranks
        explained += _EXPLAINED * self._entries + residuals
        if self.n_feature_ranks > 1:
            yield explained + 2 * self._residuals(self.n_rows)
        rows, entries = self._auxiliary_sizes
        if rows:
            yield explained + self._auxiliary(rows, entries)
            explained += _EXPLAINED * entries + self._residuals(rows)
        yield explained + self._update(rows, entries)

    @property
    def _batch(self) -> int:
        """Bytes of the centred batch and of its target: one tensor, if both are the same."""
        low, target = self.n_rows * self.d_in * self.dtype.itemsize, self.n_rows * self.d_out * _FLOAT
        same = self.dtype == torch.float32 and not self.is_transcoder
        return target if same else low + target + (self.n_rows * self.d_in * _FLOAT if self.is_transcoder else 0)

    @property
    def _entries(self) -> int:
        return self.n_rows * self.k

    @property
    def _own_rows(self) -> int:
        return -(-self.n_rows // self.n_ranks)

    @property
    def _own_entries(self) -> int:
        """Entries that this rank chooses: all of a batch may be in its rows."""
        return self._own_rows * self.k if self.by_token else self._entries

    def _residuals(self, rows: int) -> int:
        return rows * self.d_out * _FLOAT

    @property
    def _width(self) -> int:
        """Width of a product's rows."""
        return -(-self.d_in // WIDTH_MULTIPLE) * WIDTH_MULTIPLE

    def _filled_up(self, n_rows: int) -> int:
        """Bytes of copies of some rows of the batch, if their width must be filled up."""
        return 0 if self._width == self.d_in else n_rows * self._width * self.dtype.itemsize

    @property
    def _choice(self) -> int:
        copies = self._filled_up(self._own_rows)
        if not self.by_token:
            return copies + 2 * self._entries * _CANDIDATE_OF_BATCH + BATCH_HISTOGRAMS * _HISTOGRAM
        return copies + self._candidates(self._own_rows, CAPACITY * self.k)

    def _candidates(self, rows: int, capacity: int) -> int:
        return rows * ((1 << (capacity - 1).bit_length()) * _CANDIDATE + _HISTOGRAM)

    @property
    def _auxiliary_sizes(self) -> tuple[int, int]:
        """Rows that take part in the auxiliary loss, and their entries."""
        if not self.n_dead:
            return 0, 0
        k_dead, rows = auxiliary_size(self.n_rows, self.d_out, self.k, self.n_dead)
        return rows, rows * k_dead

    def _auxiliary(self, rows: int, entries: int) -> int:
        is_small = self.n_dead * GATHERED <= self.n_features
        weights = self.n_dead * self._width * self.dtype.itemsize if is_small else 0
        rest = self._residuals(self.n_rows) + _CHOSEN * entries
        chosen = self._candidates(rows, AUX_CAPACITY * (entries // rows)) + self._filled_up(rows)
        explained = self._residuals(2 * rows) + _EXPLAINED * entries
        squares = 2 * _DOUBLE * rows * self.d_out
        return rest + weights + max(chosen, explained, squares)

    def _update(self, aux_rows: int, aux_entries: int) -> int:
        """Bytes of both kinds of entries one after the other, sorted by feature, and of sums of long features."""
        entries = self._entries + aux_entries
        joined = _EXPLAINED * entries + self._residuals(self.n_nested * self.n_rows + aux_rows) if aux_rows else 0
        return joined + _SORTED * entries + entries // _SEGMENT * (self.d_in + self.d_out) * _FLOAT
