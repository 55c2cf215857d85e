"""Small random sets of active entries, as the kernels read them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Entries(NamedTuple):
    """Active entries of rows in CSR, and the same as a dense matrix (B, F) float64."""

    row_starts: Tensor
    ids: Tensor
    values: Tensor
    dense: Tensor


def random_entries(n_rows: int, n_features: int, share: float, generator: torch.Generator, room: int = 3) -> Entries:
    """Return entries of which some rows have none (share < 1) and some may have all; `room` more places are garbage."""
    shares = torch.rand(n_rows, 1, generator=generator) * 2 * share if share < 1 else torch.ones(n_rows, 1)
    keep = torch.rand(n_rows, n_features, generator=generator) < shares
    if share < 1:
        keep[0] = False
    values = torch.rand(n_rows, n_features, generator=generator) + 0.1
    rows, ids = keep.nonzero(as_tuple=True)
    row_starts = torch.cat([torch.zeros(1, dtype=torch.int32), keep.sum(1).cumsum(0).int()])
    unused_ids, unused_values = torch.full((room,), 1 << 30, dtype=torch.int32), torch.full((room,), torch.nan)
    numbers = torch.cat([values[rows, ids], unused_values])
    return Entries(row_starts, torch.cat([ids.int(), unused_ids]), numbers, (values * keep).double())


def nested_losses(dense: Tensor, w_dec: Tensor, target: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
    """Return residuals and their squared norms for each nested dictionary, by products of whole matrices."""
    residual = torch.stack([dense[:, :end] @ w_dec[:end] - target for end in ends])
    return residual, residual.square().sum(2)
