"""What is known about made activations: directions, firing rates, and fresh rows with the features in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Codes(NamedTuple):
    """The known features that fire in consecutive rows, and their strengths; sorted by row, then by feature."""

    row_starts: np.ndarray
    """int64 (B + 1): row r owns entries row_starts[r] to row_starts[r + 1]."""
    feature_ids: np.ndarray
    values: np.ndarray

    @classmethod
    def of_dense(cls, values: np.ndarray) -> Codes:
        """Take the entries of (B, n) that are above zero."""
        rows, features = np.nonzero(values > 0)
        return cls(row_starts_of(rows, len(values)), features, values[rows, features])

    @property
    def rows(self) -> np.ndarray:
        """int64: the row of every entry."""
        return np.repeat(np.arange(len(self.row_starts) - 1), np.diff(self.row_starts))


def row_starts_of(rows: np.ndarray, n_rows: int) -> np.ndarray:
    """Return where the entries of each row begin, int64 (n_rows + 1). `rows` must be in ascending order."""
    starts = np.zeros(n_rows + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=n_rows), out=starts[1:])
    return starts


@dataclass(frozen=True)
class GroundTruth:
    """The known features, which an autoencoder should find."""

    directions: np.ndarray
    """float32 (n, D), of unit length."""
    rates: np.ndarray
    """(n,): share of rows in which each feature fires."""
    noise: float
    """Standard deviation, per neuron, of the part that no feature explains."""
    fresh: Callable[[], Iterator[tuple[np.ndarray, Codes]]]
    """Yields rows float32 (B, D) that no training has seen, with their codes, block after block without end."""


def random_numbers(seed: int, *stream: int) -> np.random.Generator:
    """Return a generator whose numbers are independent for every seed and stream."""
    return np.random.default_rng(np.random.SeedSequence(seed % 2**64, spawn_key=stream))
