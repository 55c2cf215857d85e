"""Which numbers 8 bits stand for, and which code is nearest to a number.

8 bits are those of Dettmers et al. 2022 (arXiv 2110.02861): each block of 256 numbers is divided by its largest
magnitude, and each quotient is replaced by the nearest of 256 fixed numbers. Blocks are pieces of a row here, so that a
row is read and written by itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_COLUMNS = 256
"""Numbers of a row that share a scale."""


def n_blocks(width: int) -> int:
    """Return the number of scales of a row."""
    return -(-width // BLOCK_COLUMNS)


def quantisation_map(signed: bool) -> Tensor:
    """Return the 256 numbers that 8 bits stand for, ascending ("dynamic" quantisation of arXiv 2110.02861).

    After the sign, zeros of the code count factors of 0.1; then a one; the bits behind it divide the numbers from 0.1
    to 1 into equal parts, and stand for the middle of a part. Without a sign there is one more bit for parts. Two codes
    are left for 0 and 1.
    """
    positive = []
    for zeros in range(7):
        n_parts = 2 ** (6 - zeros + (not signed))
        middles = 0.1 + 0.9 * (torch.arange(n_parts, dtype=torch.float64) + 0.5) / n_parts
        positive.append(middles * 10.0**-zeros)
    numbers = torch.cat(positive)
    whole = torch.cat([-numbers, numbers]) if signed else numbers
    return torch.cat([whole, torch.tensor([0.0, 1.0], dtype=torch.float64)]).sort().values.float()


def midpoints(signed: bool) -> Tensor:
    """Return where the nearest number changes (255). A midpoint belongs to the number above it."""
    numbers = quantisation_map(signed)
    return (numbers[1:] + numbers[:-1]) / 2


def code_tables(device: torch.device | str = "cpu") -> Tensor:
    """Return for signed and for unsigned codes the numbers they stand for (256), and where each begins (257)."""
    edge, tables = torch.tensor([torch.inf]), []
    for signed in (True, False):
        tables += [quantisation_map(signed), -edge, midpoints(signed), edge]
    return torch.cat(tables).to(device)


def least_codes(signed: bool) -> Tensor:
    """Return for each pattern of a float32's upper 16 bits the least code of the numbers with these bits (65,536).

    Their greatest code is at most one more, up to a magnitude of 1.
    """
    upper = torch.arange(1 << 16)
    lowest = (upper << 16) | torch.where(upper < 1 << 15, 0, 0xFFFF)
    numbers = lowest.int().view(torch.float32)
    codes = torch.searchsorted(midpoints(signed), numbers.nan_to_num(), right=True)
    return codes.to(torch.uint8)


def decoded(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Return the numbers (F, D) in float32 that codes (F, D) and the scales of their blocks stand for."""
    numbers = quantisation_map(signed).to(codes.device)[codes.int()]
    return numbers * scales.repeat_interleave(BLOCK_COLUMNS, 1)[:, : codes.shape[1]]


def most_ratio(beta1: float, beta2: float) -> float:
    """Return the most that |m| / sqrt(v) can be, by Cauchy and Schwarz: both are sums over the same gradients.

    In 8 bits a small v may become zero while its m does not. A step then first brings m back to this bound.
    """
    if beta1**2 >= beta2:
        return 1e30
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
