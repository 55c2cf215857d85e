"""Made activations: sums of a few of many known directions, more directions than neurons, any number of rows.

    row = offset + sum of (magnitude × direction) over the features that fire + noise

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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as tf

from saeflow.activations.sparse_values import SparseValues, row_starts_of
from saeflow.activations.synthetic.ground_truth import GroundTruth, random_numbers
from saeflow.activations.tables.stream import RowBlock, TableRows
from saeflow.recipe.synthetic import SyntheticConfig

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

    return TableRows("the made table", config.n_samples, config.n_neurons, blocks, sorted(names.tolist()))


def superposed_truth(config: SyntheticConfig) -> GroundTruth:
    """Return what is known about these rows."""
    features = SuperposedFeatures.of(config)
    return GroundTruth(
        features.directions,
        features.rates,
        config.noise,
        lambda: map(partial(features.block, FRESH_STREAM), itertools.count()),
    )
