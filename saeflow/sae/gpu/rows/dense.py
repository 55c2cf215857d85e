"""Rows whose gradient (F, D) exists: Adam's step in 8 bits, and rounding to bfloat16.

For steps that torch's operations take. `update` does both without such a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from saeflow.sae.gpu.rows.moments import BLOCK, store_weights
from saeflow.sae.gpu.rows.update import advance_row, tiles_for
from saeflow.sae.gpu.specimens import Specimen, typed
from saeflow.sae.optimizer.codes import code_tables


@triton.jit
def step_rows_kernel(weights, gradient, m, v, m_scale, v_scale, codes, table, d, BLOCKS: tl.constexpr):
    """Let one row of float32 weights take Adam's step, with its moments in 8 bits."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    old = tl.load(weights + row * d + columns, mask=columns < d, other=0.0)
    slope = tl.load(gradient + row * d + columns, mask=columns < d, other=0.0)
    none = tl.full((), 0, tl.int32)
    advance_row(
        old, slope, weights, weights, m, v, m_scale, v_scale, codes, table, row, columns, d, none, none, none, 0, False,
        False, True, False,
    )  # fmt: skip


@triton.jit
def round_rows_kernel(weights, first_row, seed, step, d, WHICH: tl.constexpr, BLOCKS: tl.constexpr):
    """Round one row of float32 weights to numbers of bfloat16; its number is that of the program, plus `first_row`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    old = tl.load(weights + row * d + columns, mask=columns < d, other=0.0)
    store_weights(weights - first_row * d, row + first_row, columns, d, old, seed, step, WHICH, True)


def step_rows(weights: Tensor, gradient: Tensor, moments: Sequence[Tensor], constants: Sequence[float]) -> None:
    """Do what `saeflow.sae.optimizer.kernels.step_range` does, with all rows. `moments`: codes, then scales."""
    *first, most_ratio = constants
    rate, root, *others = first
    table = torch.tensor([rate, root, 1.0, *others, 0.0, 0.0, 0.0, 0.0, most_ratio], device=weights.device)
    d = weights.shape[1]
    codes = code_tables(weights.device)
    step_rows_kernel[(len(weights),)](weights, gradient.contiguous(), *moments, codes, table, d, **_tile(d))


def round_rows(weights: Tensor, first_row: int, seed: int, step: int, which: int) -> None:
    """Do what `saeflow.sae.optimizer.kernels.round_range` does, with all rows of float32 weights (F, D)."""
    d = weights.shape[1]
    round_rows_kernel[(len(weights),)](weights, first_row, seed, step, d, which, **_tile(d))


def _tile(d: int) -> dict[str, int]:
    tiles = tiles_for(d, d)
    return {"BLOCKS": tiles["IN_BLOCKS"]} | {name: tiles[name] for name in ("num_warps", "num_stages")}


_POINTERS = {"*fp32": "weights gradient m_scale v_scale codes table", "*u8": "m v"}
SPECIMENS = [
    Specimen(
        kernel, typed(_POINTERS | {"i32": "first_row seed step d"}), constants | {"BLOCKS": 16}, 8, 1,
        f"{name}, D = 4096",
    )
    for kernel, constants, name in (
        (step_rows_kernel, {}, "step of dense rows in 8 bits"), (round_rows_kernel, {"WHICH": 0}, "rounding of rows"),
    )
]  # fmt: skip
