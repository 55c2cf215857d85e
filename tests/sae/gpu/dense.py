"""Batches for the tests of kernels, and slow and obvious versions of what the kernels choose."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from hypothesis import Phase, settings
from torch import Tensor

from saeflow.sae.gpu.choice.choose import Entries
from saeflow.sae.gpu.choice.product import Blocks, Product
from tests.sae.gpu import PLACE

SMALL = Blocks(rows=64, features=64, width=32, warps=4, stages=2, programs=1)


few_examples = settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
"""The interpreter takes a second for a batch: to find a smaller failing one would take minutes."""


class Shape(NamedTuple):
    n_rows: int
    n_features: int
    width: int


def a_product(
    shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float32, signed: bool = False, whole: int = 0
) -> Product:
    """Return a product of random numbers; of whole numbers up to `whole`, if that is given, so that many are equal."""
    made = torch.Generator().manual_seed(seed)
    sizes = (shape.n_rows, shape.width), (shape.n_features, shape.width), (shape.n_features,)
    low, w_low, bias = (
        torch.randint(-whole, whole + 1, size, generator=made).float() if whole else torch.randn(size, generator=made)
        for size in sizes
    )
    low *= 1 if whole else torch.rand(shape.n_rows, 1, generator=made) * 3
    return product_of(low.to(dtype), w_low.to(dtype), bias, signed)


def product_of(low: Tensor, w_low: Tensor, bias: Tensor, signed: bool = False) -> Product:
    """Return the product in small tiles, of which each program takes several."""
    product = Product.of(low.to(PLACE), w_low.to(PLACE), bias.to(PLACE), signed)
    return replace(product, large=SMALL, small=SMALL, n_programs=3)


def exact(product: Product) -> Tensor:
    """Return all pre-activations (B, F) in float64."""
    return (product.low.double() @ product.w_low.double().T + product.bias.double()).cpu()


def sizes(product: Product) -> Tensor:
    return exact(product).abs() if product.signed else exact(product)


def largest(size: Tensor, n: int) -> Tensor:
    """Return True at the n largest positive numbers of each row, of equals at the first ones."""
    places = size.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(size, dtype=torch.bool).scatter_(1, places, True) & (size > 0)


def largest_of_all(size: Tensor, n: int) -> Tensor:
    return largest(size.reshape(1, -1), n).view_as(size)


def spread(entries: Entries, n_features: int) -> tuple[Tensor, Tensor]:
    """Return where entries are (B, F), and their values there; check that they are in order and followed by zeros."""
    starts, ids, values = (each.cpu().long() if each.dtype == torch.int32 else each.cpu() for each in entries)
    n = int(starts[-1])
    rows = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
    assert ((rows * n_features + ids[:n]).diff() > 0).all()
    assert not ids[n:].any()
    assert not values[n:].any()
    chosen = torch.zeros(len(starts) - 1, n_features, dtype=torch.bool)
    spread_values = torch.zeros(chosen.shape, dtype=torch.float64)
    chosen[rows, ids[:n]] = True
    spread_values[rows, ids[:n]] = values[:n].double()
    return chosen, spread_values
