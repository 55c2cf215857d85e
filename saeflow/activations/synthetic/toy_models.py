"""The toys of the founding articles: a few neurons and a few known features, with all rows in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.activations.sparse_values import SparseValues, values_above_zero
from saeflow.activations.synthetic.ground_truth import GroundTruth, random_numbers
from saeflow.recipe.synthetic import SyntheticConfig

_TOY_STEPS = 3000
_FRESH_STREAM, _FRESH_ROWS = 1, 4096
"""The stream of random numbers that makes fresh rows, and the rows in one block of them."""
_REPRESENTED = 0.5
"""The toy model of superposition represents a feature if its direction in the hidden layer is at least this long."""

_Sampler = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""Draws at most the given number of rows (B, D), and the strengths (B, n) of the known features, 0 if absent."""


def toy_rows(config: SyntheticConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return rows float32 (N, D) and the known directions (n, D)."""
    generator = torch.Generator().manual_seed(config.seed)
    directions, draw = _directions_and_sampler(config, generator)
    return draw(config.n_samples, generator)[0].numpy(), directions.numpy()


def toy_truth(config: SyntheticConfig) -> GroundTruth:
    """Return what is known about `toy_rows`, without features that the toy model does not represent."""
    directions, draw = _directions_and_sampler(config, torch.Generator().manual_seed(config.seed))
    lengths = torch.linalg.vector_norm(directions, dim=1)
    known = lengths > _REPRESENTED

    def fresh() -> Iterator[tuple[np.ndarray, SparseValues]]:
        for number in itertools.count():
            seed = int(random_numbers(config.seed, _FRESH_STREAM, number).integers(2**32))
            rows, strengths = draw(_FRESH_ROWS, torch.Generator().manual_seed(seed))
            yield rows.numpy(), values_above_zero((strengths * lengths)[:, known].numpy())

    units = tf.normalize(directions[known], dim=1).numpy()
    return GroundTruth(units, np.full(len(units), _rate(config)), 0.0, fresh)


def _rate(config: SyntheticConfig) -> float:
    """Return the share of rows in which a feature fires. It is the same for all features."""
    if config.kind == "sparse":
        return (1 + config.n_active) / 2 / config.n_true
    return float(config.density / (1 - (1 - config.density) ** config.n_true))  # rows without any feature are left out


def _directions_and_sampler(config: SyntheticConfig, generator: torch.Generator) -> tuple[Tensor, _Sampler]:
    """Return the directions (n, D) and a sampler of rows. The generator makes the directions first."""
    return _sparse_mixture(config, generator) if config.kind == "sparse" else _toy_superposition(config, generator)


def _sparse_mixture(config: SyntheticConfig, generator: torch.Generator) -> tuple[Tensor, _Sampler]:
    """Rows are sums of one to `n_active` of `n_true` random unit directions, with strengths uniform in [0, 1]."""
    directions = tf.normalize(torch.randn(config.n_true, config.n_neurons, generator=generator), dim=1)

    def draw(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        order = torch.rand(n_rows, config.n_true, generator=generator).argsort(1)[:, : config.n_active]
        strengths = torch.rand(n_rows, config.n_active, generator=generator)
        n_present = torch.randint(1, config.n_active + 1, (n_rows, 1), generator=generator)
        strengths *= torch.arange(config.n_active) < n_present
        rows = (directions[order] * strengths[:, :, None]).sum(1)
        return rows, torch.zeros(n_rows, config.n_true).scatter_(1, order, strengths)

    return directions, draw


def _toy_superposition(config: SyntheticConfig, generator: torch.Generator) -> tuple[Tensor, _Sampler]:
    """Rows are the hidden layer of `relu(W'Wx + b)`, trained to copy sparse x. Rows of x = 0 are left out.

    Elhage et al. 2022 (transformer-circuits.pub/2022/toy_model). Directions are the columns of W (m, n).
    """
    n, m = config.n_true, config.n_neurons
    weight = torch.nn.Parameter(torch.randn(m, n, generator=generator) * 0.5)
    bias = torch.nn.Parameter(torch.zeros(n))
    adam = torch.optim.Adam([weight, bias], lr=1e-2)
    for step in range(_TOY_STEPS):
        adam.param_groups[0]["lr"] = 1e-2 * min(1.0, 2 - 2 * step / _TOY_STEPS)
        x = _sparse_inputs(512, n, config.density, generator)
        loss = (torch.relu(x @ weight.T @ weight + bias) - x).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    directions = weight.detach().T

    def draw(n_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = _sparse_inputs(n_rows, n, config.density, generator)
        x = x[x.sum(1) > 0]
        return x @ directions, x

    return directions, draw


def _sparse_inputs(n_rows: int, n: int, density: float, generator: torch.Generator) -> Tensor:
    present = torch.rand(n_rows, n, generator=generator) < density
    return torch.rand(n_rows, n, generator=generator) * present
