"""Numba kernels for Adam's step of rows with moments in 8 bits, and for weights rounded at random to bfloat16.

Every operation is rounded as it is written, so the bits are those of the kernels of a GPU in Triton's interpreter.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from saeflow.runtime.compiled import compiled
from saeflow.sae.kernels import Floats, Matrix
from saeflow.sae.optimizer.codes import BLOCK_COLUMNS

Codes = NDArray[np.uint8]

ROWS_OF_WORKER = 64
"""Rows that a worker takes at a time."""
ROUNDS = 7
"""Rounds of Philox: the fewest that pass all tests (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3")."""
_WORD, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_LOWER, _UPPER = np.uint64(0xFFFF), np.uint64(0xFFFF0000)
_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_RAISES = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
"""Constants of Philox 4x32."""

exact = partial(compiled, reorder=False)


@exact
def _code(quotient: np.float32, least: Codes, ends: Floats) -> int:
    """Return the code of the number nearest to a quotient between -1 and 1; each code ends where the next begins."""
    code = least[np.float32(quotient).view(np.uint32) >> np.uint32(16)]
    if quotient >= ends[code]:
        code += np.uint8(1)
    return code


@exact
def step_range(
    start: int, stop: int, weights: Floats, gradient: Floats, m: Codes, v: Codes, m_scale: Floats, v_scale: Floats,
    maps: Floats, least: Matrix, ends: Floats, constants: Floats,
) -> None:  # fmt: skip
    """Let rows start..stop of weights (F, D) take Adam's step, and their moments in 8 bits, too.

    `maps`, `least` and `ends` hold the tables of signed codes, then those of unsigned ones. `constants` are
    lr / (1 - beta1^t), sqrt(1 - beta2^t), eps, 1 - beta1, 1 - beta2, beta2, and the most that |m| / sqrt(v) can be.
    """
    rate, root, eps, new_m, new_v, keep_v, most_ratio = constants
    means, squares = np.empty(BLOCK_COLUMNS, np.float32), np.empty(BLOCK_COLUMNS, np.float32)
    for row in range(start, stop):
        for block in range(m_scale.shape[1]):
            first = block * BLOCK_COLUMNS
            n = min(BLOCK_COLUMNS, weights.shape[1] - first)
            old_m, old_v = m_scale[row, block], v_scale[row, block]
            largest_m, largest_v = np.float32(0), np.float32(0)
            for i in range(n):
                g, second = gradient[row, first + i], maps[1, v[row, first + i]] * old_v
                most = most_ratio * np.sqrt(second)
                mean = min(max(maps[0, m[row, first + i]] * old_m, -most), most)
                mean += (g - mean) * new_m
                second = second * keep_v + g * g * new_v
                weights[row, first + i] -= rate * (mean / (np.sqrt(second) / root + eps))
                means[i], squares[i] = mean, second
                largest_m, largest_v = max(largest_m, abs(mean)), max(largest_v, second)
            m_scale[row, block], v_scale[row, block] = largest_m, largest_v
            by_m = largest_m if largest_m > 0 else np.float32(1)
            by_v = largest_v if largest_v > 0 else np.float32(1)
            for i in range(n):
                m[row, first + i] = _code(means[i] / by_m, least[0], ends[0])
                v[row, first + i] = _code(squares[i] / by_v, least[1], ends[1])


@exact
def _random(column: np.uint64, row: np.uint64, step: np.uint64, which: np.uint64, seed: np.uint64) -> np.uint64:
    """Return 32 random bits by Philox 4x32, as `tl.philox` does."""
    first, second, low, high = column, row, seed & _WORD, seed >> _HALF
    for _ in range(ROUNDS):
        product, other = _FACTORS[1] * step, _FACTORS[0] * first
        first, second = (product >> _HALF) ^ second ^ low, product & _WORD
        step, which = (other >> _HALF) ^ which ^ high, other & _WORD
        low, high = (low + _RAISES[0]) & _WORD, (high + _RAISES[1]) & _WORD
    return first


@exact
def round_range(
    start: int, stop: int, bits: NDArray[np.uint32], first_row: int, step: int, which: int, seed: np.uint64
) -> None:
    """Round rows start..stop of float32 weights (F, D), seen as integers, to numbers of bfloat16.

    Up or down, with the probability that keeps the mean. The random number depends on seed, step, row, column and
    `which` matrix alone. Row 0 is number `first_row`.
    """
    for row in range(start, stop):
        for column in range(bits.shape[1]):
            drawn = _random(np.uint64(column), np.uint64(first_row + row), np.uint64(step), np.uint64(which), seed)
            bits[row, column] = np.uint32(
                (np.uint64(bits[row, column]) + (drawn & np.uint64(0xFFFF))) & np.uint64(0xFFFF0000)
            )
