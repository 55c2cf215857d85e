"""What Adam keeps of a row: its two moments, in float32 or in the 8 bits of
`saeflow.sae.optimizer.codes`; and weights in bfloat16."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from saeflow.sae.optimizer.codes import BLOCK_COLUMNS, decoded, n_blocks
from saeflow.sae.optimizer.kernels import ROUNDS

BLOCK = tl.constexpr(BLOCK_COLUMNS)
"""Numbers that share a scale, and columns of a tile: a row is a tile of BLOCKS times BLOCK numbers."""
_MIDPOINTS, _UNSIGNED = tl.constexpr(256), tl.constexpr(513)
"""Where the tables of `code_tables` begin."""
_LOG2_10 = tl.constexpr(3.321928094887362)
_ROUNDS = tl.constexpr(ROUNDS)


class AdamRows(NamedTuple):
    """The rows of a matrix (F, D), float32 or bfloat16, with Adam's moments."""

    weights: Tensor
    m: Tensor
    """(F, D) float32, or codes uint8."""
    v: Tensor
    m_scale: Tensor
    """(F, ceil(D / 256)): the largest magnitude of each block. Moments in float32 have none."""
    v_scale: Tensor

    @classmethod
    def begin(cls, weights: Tensor, eight_bit: bool = False) -> Self:
        """Return weights with the moments before the first step."""
        n_rows, d = weights.shape
        dtype, n_scales = (torch.uint8, n_blocks(d)) if eight_bit else (torch.float32, 0)
        numbers = [torch.zeros(n_rows, d, dtype=dtype, device=weights.device) for _ in range(2)]
        scales = [torch.zeros(n_rows, n_scales, device=weights.device) for _ in range(2)]
        return cls(weights, *numbers, *scales)

    @property
    def eight_bit(self) -> bool:
        return self.m.dtype == torch.uint8

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return both moments (F, D) in float32."""
        if not self.eight_bit:
            return self.m, self.v
        return decoded(self.m, self.m_scale, True), decoded(self.v, self.v_scale, False)


@triton.jit
def nearest_codes(x, tables, SIGNED: tl.constexpr):
    """Return the codes of numbers between -1 and 1.

    The code is computed, then corrected by one where the nearest number lies in another decade, or is 0 or 1.
    """
    first_parts: tl.constexpr = 1 if SIGNED else 2
    starts = tables + _MIDPOINTS + (0 if SIGNED else _UNSIGNED)
    size = tl.abs(x)
    decade = tl.floor(tl.log2(tl.maximum(size, 1e-30)) / _LOG2_10) + 7
    decade = tl.minimum(tl.maximum(decade, 0.0), 6.0)
    n_parts = tl.exp2(decade) * first_parts
    part = tl.floor((size * tl.exp2((6 - decade) * _LOG2_10) - 0.1) * n_parts / 0.9)
    rank = n_parts - first_parts + 1 + tl.minimum(tl.maximum(part, 0.0), n_parts - 1)
    rank = tl.where(size < 1e-7, 0.0, rank).to(tl.int32)
    code = tl.where(x < 0, 127 - rank, 127 + rank) if SIGNED else rank
    above = (x >= tl.load(starts + code + 1)).to(tl.int32)
    below = (x < tl.load(starts + code)).to(tl.int32)
    return code + above - below


@triton.jit
def load_moments(numbers, scales, tables, row, columns, d, EIGHT_BIT: tl.constexpr, SIGNED: tl.constexpr):
    """Return a row of moments as a tile; `columns` (BLOCKS, BLOCK) numbers its columns."""
    inside = columns < d
    stored = tl.load(numbers + row * d + columns, mask=inside, other=0)
    if EIGHT_BIT:
        n_scales = tl.cdiv(d, BLOCK)
        block = tl.arange(0, columns.shape[0])
        scale = tl.load(scales + row * n_scales + block, mask=block < n_scales, other=0.0)
        stored = tl.load(tables + (0 if SIGNED else _UNSIGNED) + stored.to(tl.int32)) * scale[:, None]
        stored = tl.where(inside, stored, 0.0)
    return stored


@triton.jit
def store_moments(numbers, scales, tables, row, columns, d, moments, EIGHT_BIT: tl.constexpr, SIGNED: tl.constexpr):
    """Write a row of moments; those beyond the row's end are zero."""
    if EIGHT_BIT:
        n_scales = tl.cdiv(d, BLOCK)
        block = tl.arange(0, columns.shape[0])
        scale = tl.max(tl.abs(moments), 1)
        tl.store(scales + row * n_scales + block, scale, mask=block < n_scales)
        quotient = moments / tl.where(scale > 0, scale, 1.0)[:, None]
        codes = nearest_codes(quotient, tables, SIGNED).to(tl.uint8)
        tl.store(numbers + row * d + columns, codes, mask=columns < d)
    else:
        tl.store(numbers + row * d + columns, moments, mask=columns < d)


@triton.jit
def store_weights(weights, row, columns, d, new, seed, step, which, STOCHASTIC: tl.constexpr):
    """Write a row of weights, and return it as written.

    With STOCHASTIC, it is rounded to bfloat16, up or down with the probability that keeps the mean. The random number
    depends on seed, step, row, column and `which` matrix alone, as in `saeflow.sae.optimizer.kernels`.
    """
    if STOCHASTIC:
        random, _, _, _ = tl.philox(seed, columns, row.to(tl.int32), step, which, n_rounds=_ROUNDS)
        bits = new.to(tl.uint32, bitcast=True) + (random & 0xFFFF)
        rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        new = tl.where(new == new, rounded, new)
    tl.store(weights + row * d + columns, new.to(weights.dtype.element_ty), mask=columns < d)
    return new
