"""What is known of made activations: directions, how often each fires, and fresh rows with what fires in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Codes(NamedTuple):
    """Which known features fire in consecutive rows, and how strongly: by row, inside a row by feature."""

    row_starts: np.ndarray
    """int64 (B + 1): row r owns entries row_starts[r] to row_starts[r + 1]."""
    feature_ids: np.ndarray
    values: np.ndarray

    @classmethod
    def of_dense(cls, values: np.ndarray) -> Codes:
        """What is above zero in (B, n)."""
        rows, features = np.nonzero(values > 0)
        return cls(starts_of(rows, len(values)), features, values[rows, features])

    @property
    def rows(self) -> np.ndarray:
        """int64: the row of every entry."""
        return np.repeat(np.arange(len(self.row_starts) - 1), np.diff(self.row_starts))


def starts_of(rows: np.ndarray, n_rows: int) -> np.ndarray:
    """int64 (n_rows + 1): where the entries of each row begin, of entries in the order of their rows."""
    starts = np.zeros(n_rows + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=n_rows), out=starts[1:])
    return starts


@dataclass(frozen=True)
class Truth:
    """Known features that an autoencoder should find."""

    directions: np.ndarray
    """float32 (n, D), of unit length."""
    rates: np.ndarray
    """(n,): share of rows in which each fires."""
    noise: float
    """Standard deviation of what no feature explains, a neuron."""
    fresh: Callable[[], Iterator[tuple[np.ndarray, Codes]]]
    """Rows float32 (B, D) that no training has seen, and their codes, block after block without end."""


def random_numbers(seed: int, *stream: int) -> np.random.Generator:
    """Independent for every seed and stream."""
    return np.random.default_rng(np.random.SeedSequence(seed % 2**64, spawn_key=stream))
