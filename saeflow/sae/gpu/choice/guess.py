"""Numbers that a batch's largest entries will exceed, guessed from the batch before.

The k-th largest pre-activation of a row grows with the row's length: for weights that do not know the row it is the
length times a quantile of a normal distribution. So what is carried from batch to batch is a ratio of the two. Rows
differ in it, too. A guess is wrong if fewer than k entries exceed it, or more than the row's buffer holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saeflow.sae.gpu.choice.product import Product

LOW_QUANTILE, MARGIN = 1 / 256, 0.98
"""The ratio is the one that 255 of 256 rows exceed, times a margin for what a step changes. The few rows below it are
searched anew: up to a tile of 128 rows costs as much as one row. A lower ratio would let more rows find too many
entries. With normal pre-activations of which k are the thousandth part, 8 k exceed 0.75 times the k-th, and 16 k exceed
0.65 times. Measured on the demo's activations and trained autoencoder (4,096 features, k = 32), whose ratios differ six
times: 0.5% of rows find fewer than k; 0.5% find more than 8 k, and 0.02% more than 16 k."""

BATCH_MARGIN = 0.95
"""The k-th of half a million entries hardly moves; about 1.6 times as many exceed 0.95 times it."""

_SAMPLE_ROWS = 64


def lengths(rows: Tensor) -> Tensor:
    """Return the length of each row (B) float32."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return length


def next_ratio(kth: Tensor, row_lengths: Tensor) -> Tensor:
    """Return the ratio (1) of guess to length for the next batch, from the k-th sizes (B) of this one; 0 if all are 0.

    Rows without a k-th positive entry do not count.
    """
    ratios = torch.where(kth > 0, kth / row_lengths, torch.inf).sort().values
    ratio = ratios[int(LOW_QUANTILE * len(kth))] * MARGIN
    return torch.where(ratio.isfinite(), ratio, 0.0)[None]


def first_ratio(product: Product, k: int) -> Tensor:
    """Return the ratio (1) for a first batch, from the products of a few rows with all features."""
    rows, sizes = sample(product)
    return next_ratio(sizes.topk(k, dim=1).values[:, -1].clamp(min=0), lengths(rows))


def first_of_batch(product: Product, n: int) -> Tensor:
    """Return a number (1) that about 2 n entries of the batch exceed, from the products of a few rows."""
    rows, sizes = sample(product)
    rank = min(2 * n * len(rows) // product.n_rows + 1, sizes.numel())
    return sizes.flatten().topk(rank, sorted=False).values.amin(0, keepdim=True).clamp(min=0)


def sampled(of_rows: Tensor) -> Tensor:
    """Return those of some numbers (B, ...), one for each row, that belong to the rows of `sample`."""
    return of_rows[:: max(len(of_rows) // _SAMPLE_ROWS, 1)][:_SAMPLE_ROWS]


def sample(product: Product) -> tuple[Tensor, Tensor]:
    """Return a few rows of the product, and the sizes of all their entries."""
    rows = sampled(product.low)
    pre = torch.nn.functional.linear(rows, product.w_low).float() + product.bias
    return rows, pre.abs() if product.signed else pre
