"""What is known about made activations: directions, firing rates, and fresh rows with the features in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from saeflow.activations.sparse_values import SparseValues


@dataclass(frozen=True)
class GroundTruth:
    """The known features, which an autoencoder should find."""

    directions: np.ndarray
    """float32 (n, D), of unit length."""
    rates: np.ndarray
    """(n,): share of rows in which each feature fires."""
    noise: float
    """Standard deviation, per neuron, of the part that no feature explains."""
    fresh: Callable[[], Iterator[tuple[np.ndarray, SparseValues]]]
    """Yields rows float32 (B, D) that no training has seen, with the features that fire in them, block after block
    without end."""


def random_numbers(seed: int, *stream: int) -> np.random.Generator:
    """Return a generator whose numbers are independent for every seed and stream."""
    return np.random.default_rng(np.random.SeedSequence(seed % 2**64, spawn_key=stream))
