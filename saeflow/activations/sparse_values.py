"""Non-zero values of consecutive rows (tokens): the form in which features leave an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = TypeVar("Array", NDArray[Any], Tensor)


class SparseRows(NamedTuple, Generic[Array]):
    """Entries by row; inside a row in ascending order of feature."""

    row_starts: Array
    """int64 (B + 1): row r owns entries row_starts[r] to row_starts[r + 1]."""
    feature_ids: Array
    """int32 (nnz), or int64 for features that were made."""
    values: Array
    """float32 (nnz), or pre-activations."""

    @property
    def rows(self) -> Array:
        """int64 (nnz): the row of each entry."""
        if isinstance(self.row_starts, Tensor):
            counts = self.row_starts.diff()
            return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        return np.repeat(np.arange(len(self.row_starts) - 1), np.diff(self.row_starts))


SparseValues = SparseRows[NDArray[Any]]
SparseTensors = SparseRows[Tensor]


def no_values() -> SparseValues:
    """Return the values of no rows."""
    return SparseRows(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))


def concatenated(parts: Sequence[SparseValues]) -> SparseValues:
    """Return the entries of consecutive rows as one."""
    if not parts:
        return no_values()
    starts, ids, values = zip(*parts, strict=True)
    ends = np.concatenate([[0], *(np.diff(each) for each in starts)]).cumsum()
    return SparseRows(ends.astype(np.int64), np.concatenate(ids), np.concatenate(values))


def split_rows(sparse: SparseValues, n_rows: int) -> tuple[SparseValues, SparseValues]:
    """Return the entries of the first rows, and those of the others."""
    starts, n = sparse.row_starts, sparse.row_starts[n_rows]
    head = SparseRows(starts[: n_rows + 1], sparse.feature_ids[:n], sparse.values[:n])
    return head, SparseRows(starts[n_rows:] - n, sparse.feature_ids[n:], sparse.values[n:])


def values_above_zero(values: NDArray[Any]) -> SparseValues:
    """Return the entries of a matrix (B, n) that are above zero."""
    rows, features = np.nonzero(values > 0)
    return SparseRows(row_starts_of(rows, len(values)), features, values[rows, features])


def row_starts_of(rows: NDArray[Any], n_rows: int) -> NDArray[np.int64]:
    """Return where the entries of each row begin (n_rows + 1), from the row of each entry, ascending."""
    starts = np.zeros(n_rows + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=n_rows), out=starts[1:])
    return starts
