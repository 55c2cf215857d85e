"""Made activations whose features are known: the toys of the founding articles, and superposition at any size.

A superposed row = offset + sum of (magnitude × direction) over the features that fire + noise, with more directions
than neurons.

Feature i is the i-th most frequent. Its rate follows Zipf's law, `c / (i + 1) ** zipf_exponent`, cut off at `max_rate`.
c is chosen so that the rates sum to `l0`.

A share of the features form groups of four neighbours in frequency. A group has events, and its members fire only at
events. The rate of events is the rate of the most frequent member over `group_chance`. At an event each member fires
independently, with its own rate over the group's. So every member keeps its rate, and two members fire together
`1 / group rate` times as often as if they were independent.

Rows come in blocks of 4,096, and each block has its own generator. Block n is the same whatever comes before it, so a
store can be cut into parts anywhere, continue after a kill, and grow. Only one block is in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.activations.sparse_values import SparseValues, row_starts_of, values_above_zero
from saeflow.activations.tables.stream import InMemoryTable, RowBlock, TableRows, row_name
from saeflow.recipe.synthetic import SyntheticConfig


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


BLOCK_ROWS = 4096
"""Rows of one generator. Another number would make other rows."""
GROUP_SIZE = 4
"""Features in a correlated group."""
FEATURE_STREAM, STORED_STREAM, FRESH_STREAM = 0, 1, 2
"""Streams of random numbers: for directions and groups, for rows that are stored, for rows that never are."""
NO_FEATURE_LABEL = "nothing"
"""Label of a row in which no feature fires."""


def zipf_rates(n: int, l0: float, exponent: float, largest: float) -> np.ndarray:
    """Return firing rates (n,) in descending order that sum to `l0`, none above `largest`. Needs l0 <= n × largest."""
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    tails = weights[::-1].cumsum()[::-1]
    factors = (l0 - largest * np.arange(n)) / tails
    fits = factors * weights <= largest * (1 + 1e-12)
    n_cut = int(fits.argmax()) if fits.any() else n
    return np.where(np.arange(n) < n_cut, largest, factors[min(n_cut, n - 1)] * weights)


@dataclass(frozen=True)
class SuperposedFeatures:
    """The known features: unit directions float32 (n, D), rates (n,), groups (g, 4), and the offset (D)."""

    config: SyntheticConfig
    directions: np.ndarray
    rates: np.ndarray
    groups: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(cls, config: SyntheticConfig) -> SuperposedFeatures:
        n, width = config.n_true, config.n_neurons
        dice = random_numbers(config.seed, FEATURE_STREAM)
        drawn = dice.standard_normal((n + 1, width))
        directions = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
        quarters = np.sort(dice.permutation(n // GROUP_SIZE)[: round(config.group_share * n / GROUP_SIZE)])
        return cls(
            config, directions[:n], zipf_rates(n, config.l0, config.zipf_exponent, config.max_rate),
            quarters[:, None] * GROUP_SIZE + np.arange(GROUP_SIZE), directions[n] * np.float32(config.offset),
        )  # fmt: skip

    @cached_property
    def _alone(self) -> np.ndarray:
        """The features outside all groups."""
        return np.setdiff1d(np.arange(len(self.rates)), self.groups)

    @cached_property
    def group_rates(self) -> np.ndarray:
        """(g,): the rate of each group's events."""
        return np.asarray(self.rates[self.groups[:, 0]] / self.config.group_chance)

    @cached_property
    def _intensities(self) -> np.ndarray:
        """Mean number of draws of each unit (a feature alone, or a group) per row; one draw is enough.

        The number of draws is Poisson, so the unit is absent with chance exp(-intensity) = 1 - rate, independently in
        every row.
        """
        return np.asarray(-np.log1p(-np.concatenate([self.rates[self._alone], self.group_rates])))

    @cached_property
    def _weights(self) -> torch.Tensor:
        return torch.from_numpy(self.directions)

    def block(self, stream: int, number: int) -> tuple[np.ndarray, SparseValues]:
        """Return the rows float32 (4096, D) of one block, and their codes."""
        dice = random_numbers(self.config.seed, stream, number)
        codes = self._codes(dice)
        # a normal number takes numpy 10 ns, torch 4 ns; torch's generator uses 32 bits of a seed
        noise = torch.Generator().manual_seed(int(dice.integers(2**32)))
        starts, features, strengths = map(torch.from_numpy, codes)
        values = torch.empty(BLOCK_ROWS, self.config.n_neurons).normal_(0, self.config.noise, generator=noise)
        values += tf.embedding_bag(features, self._weights, starts[:-1], mode="sum", per_sample_weights=strengths)
        values += torch.from_numpy(self.offset)
        return values.numpy(), codes

    def _codes(self, dice: np.random.Generator) -> SparseValues:
        n, n_units, n_alone = len(self.rates), len(self._intensities), len(self._alone)
        units = np.repeat(np.arange(n_units), dice.poisson(BLOCK_ROWS * self._intensities))
        drawn = np.sort(dice.integers(0, BLOCK_ROWS, len(units)) * n_units + units)
        drawn = drawn[np.diff(drawn, prepend=-1) > 0]
        rows, units = np.divmod(drawn, n_units)
        single = units < n_alone
        groups = units[~single] - n_alone
        chances = self.rates[self.groups] / self.group_rates[:, None]
        fires = dice.random((len(groups), GROUP_SIZE)) < chances[groups]
        together = (rows[~single, None] * n + self.groups[groups])[fires]
        places = np.sort(np.concatenate([rows[single] * n + self._alone[units[single]], together]))
        rows, features = np.divmod(places, n)
        magnitudes = np.abs(dice.standard_normal(len(places), np.float32)) * np.float32(self.config.magnitude_scale)
        return SparseValues(
            row_starts_of(rows, BLOCK_ROWS), features, magnitudes + np.float32(self.config.magnitude_floor)
        )


def feature_label(feature: int) -> str:
    return f"true {feature}"


def strongest_features(codes: SparseValues) -> np.ndarray:
    """Return the strongest feature of each row, int64 (B,): the last of equal ones, -1 if none fires."""
    n_active = np.diff(codes.row_starts)
    some = n_active > 0
    found = np.full(len(n_active), -1)
    if some.any():
        largest = np.maximum.reduceat(codes.values, codes.row_starts[:-1][some])
        top = np.flatnonzero(codes.values == np.repeat(largest, n_active[some]))
        found[codes.rows[top]] = codes.feature_ids[top]
    return found


def superposed_rows(config: SyntheticConfig) -> TableRows:
    """Return the rows to store, each labelled by its strongest known feature."""
    features = SuperposedFeatures.of(config)
    names = np.array([*map(feature_label, range(config.n_true)), NO_FEATURE_LABEL], object)

    def blocks(start: int) -> Iterator[RowBlock]:
        skip = start % BLOCK_ROWS
        for number in range(start // BLOCK_ROWS, -(-config.n_samples // BLOCK_ROWS)):
            values, codes = features.block(STORED_STREAM, number)
            yield values[skip:], names[strongest_features(codes)][skip:].tolist()
            skip = 0

    return TableRows("the made table", config.n_samples, config.n_neurons, blocks, pieces=sorted(names.tolist()))


def superposed_truth(config: SyntheticConfig) -> GroundTruth:
    """Return what is known about these rows."""
    features = SuperposedFeatures.of(config)
    return GroundTruth(
        features.directions,
        features.rates,
        config.noise,
        lambda: map(partial(features.block, FRESH_STREAM), itertools.count()),
    )


_TOY_STEPS = 3000
_TOY_STREAM, _FRESH_ROWS = 1, 4096
"""The stream of random numbers that makes fresh rows of toys, and the rows in one block of them."""
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
            seed = int(random_numbers(config.seed, _TOY_STREAM, number).integers(2**32))
            rows, strengths = draw(_FRESH_ROWS, torch.Generator().manual_seed(seed))
            yield rows.numpy(), values_above_zero((strengths * lengths)[:, known].numpy())

    units = tf.normalize(directions[known], dim=1).numpy()
    return GroundTruth(units, np.full(len(units), _firing_rate(config)), 0.0, fresh)


def _firing_rate(config: SyntheticConfig) -> float:
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


def make_table(config: SyntheticConfig) -> InMemoryTable:
    """Make a small table in memory, with the true directions of its features."""
    if config.kind == "superposed":
        return InMemoryTable.of(superposed_rows(config), SuperposedFeatures.of(config).directions)
    values, directions = toy_rows(config)
    return InMemoryTable([row_name(row) for row in range(len(values))], values, directions)


def made_rows(config: SyntheticConfig) -> TableRows:
    """Make the rows to store, block by block."""
    return superposed_rows(config) if config.kind == "superposed" else make_table(config).rows()


def truth_of(config: SyntheticConfig) -> GroundTruth:
    """Return what is known about made activations of any kind."""
    return superposed_truth(config) if config.kind == "superposed" else toy_truth(config)
