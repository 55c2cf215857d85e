"""Made activations with known directions: more of them than neurons, few of them active in a row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

CHUNK = 1024
NOISE = 0.02


def directions(width: int, n_true: int, seed: int) -> np.ndarray:
    """The unit vectors that `rows` of this seed mixes: float32 (n_true, D)."""
    drawn = np.random.default_rng([seed, 0]).standard_normal((n_true, width), dtype=np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def rows(n: int, width: int, n_true: int, l0: int, seed: int) -> np.ndarray:
    """Float32 (n, D), each row a sum of `l0` directions drawn evenly, of strength 0.5 + |N(0, 1)|, and noise of 0.02.

    A direction may be drawn twice in a row. The first rows of a seed do not depend on `n`, and another seed has other
    directions: held-out rows are the last ones of a longer draw.
    """
    made = np.empty((n, width), dtype=np.float32)
    _fill(made, n_true, l0, seed)
    return made


def write(path: Path, n: int, width: int, n_true: int, l0: int, seed: int) -> None:
    """The same rows as a .npy file, a chunk at a time in memory."""
    _fill(np.lib.format.open_memmap(path, "w+", np.float32, (n, width)), n_true, l0, seed)


def _fill(made: np.ndarray, n_true: int, l0: int, seed: int) -> None:
    chunks = _chunks(directions(made.shape[1], n_true, seed), l0, seed)
    for start in range(0, len(made), CHUNK):
        made[start : start + CHUNK] = next(chunks)[: len(made) - start]


def _chunks(true: np.ndarray, l0: int, seed: int) -> Iterator[np.ndarray]:
    draw = np.random.default_rng([seed, 1])
    while True:
        active = draw.integers(len(true), size=(CHUNK, l0))
        strength = 0.5 + np.abs(draw.standard_normal((CHUNK, 1, l0), dtype=np.float32))
        noise = NOISE * draw.standard_normal((CHUNK, true.shape[1]), dtype=np.float32)
        yield (strength @ true[active])[:, 0] + noise
