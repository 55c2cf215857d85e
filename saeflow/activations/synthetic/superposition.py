"""Made activations that are sums of a few known directions, of many more than there are neurons; of any number of rows.

    row = offset + sum of (magnitude × direction) over the features that fire + noise

Feature i is the i-th most frequent. Its rate follows Zipf's law, `c / (i + 1) ** zipf_exponent`, cut off at `max_rate`;
c is such that the rates sum to `l0`. A share of the features, four neighbours in frequency each time, form groups. A
group has events, at the rate of its most frequent member over `group_chance`; nobody fires without one. At an event
each member fires by itself, the most frequent with `group_chance`, another with its own rate over the group's: so every
member keeps its rate, and two of them fire together `1 / group rate` times as often as if they were independent.

Rows come in blocks of 4,096, each from a generator of its own: block n is the same whatever lies before it, so a store
can be cut into parts anywhere, continue after a kill, and grow. Memory is that of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as tf

from saeflow.activations.synthetic.truth import Codes, Truth, random_numbers, starts_of
from saeflow.activations.tables.arrays import Block, Rows
from saeflow.recipe.synthetic import SyntheticConfig

BLOCK_ROWS = 4096
"""Rows of one generator. Other blocks would hold other rows."""
GROUP = 4
"""Features in a correlated group."""
WORLD, TRAINING, FRESH = 0, 1, 2
"""Streams of random numbers: directions and groups; rows that are stored; rows that never are."""
NOTHING = "nothing"
"""Label of a row in which no feature fires."""


def zipf_rates(n: int, l0: float, exponent: float, largest: float) -> np.ndarray:
    """Firing rates (n,) in descending order that sum to `l0`, none above `largest`; needs l0 <= n × largest."""
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    tails = weights[::-1].cumsum()[::-1]
    factors = (l0 - largest * np.arange(n)) / tails
    fits = factors * weights <= largest * (1 + 1e-12)
    n_cut = int(fits.argmax()) if fits.any() else n
    return np.where(np.arange(n) < n_cut, largest, factors[min(n_cut, n - 1)] * weights)


@dataclass(frozen=True)
class World:
    """What is known: directions float32 (n, D) of unit length, rates (n,), groups (g, 4) of features, the mean (D)."""

    config: SyntheticConfig
    directions: np.ndarray
    rates: np.ndarray
    groups: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(cls, config: SyntheticConfig) -> World:
        n, width = config.n_true, config.n_neurons
        dice = random_numbers(config.seed, WORLD)
        drawn = dice.standard_normal((n + 1, width))
        directions = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
        quarters = np.sort(dice.permutation(n // GROUP)[: round(config.group_share * n / GROUP)])
        return cls(
            config, directions[:n], zipf_rates(n, config.l0, config.zipf_exponent, config.max_rate),
            quarters[:, None] * GROUP + np.arange(GROUP), directions[n] * np.float32(config.offset),
        )  # fmt: skip

    @cached_property
    def _alone(self) -> np.ndarray:
        """Features that are in no group."""
        return np.setdiff1d(np.arange(len(self.rates)), self.groups)

    @cached_property
    def group_rates(self) -> np.ndarray:
        """(g,): how often each group has an event."""
        return np.asarray(self.rates[self.groups[:, 0]] / self.config.group_chance)

    @cached_property
    def _intensities(self) -> np.ndarray:
        """Mean number of draws of a unit (a feature alone, or a group) for a row, of which one is enough: of Poisson's
        law, so that the unit is absent with a chance of exp(-intensity) = 1 - rate, independently in every row."""
        return np.asarray(-np.log1p(-np.concatenate([self.rates[self._alone], self.group_rates])))

    @cached_property
    def _weights(self) -> torch.Tensor:
        return torch.from_numpy(self.directions)

    def block(self, stream: int, number: int) -> tuple[np.ndarray, Codes]:
        """Rows float32 (4096, D) of one block, and their codes."""
        dice = random_numbers(self.config.seed, stream, number)
        codes = self._codes(dice)
        # numpy takes 10 ns for a normal number, torch 4; its generator knows 32 bits of a seed
        noise = torch.Generator().manual_seed(int(dice.integers(2**32)))
        starts, features, strengths = map(torch.from_numpy, codes)
        values = torch.empty(BLOCK_ROWS, self.config.n_neurons).normal_(0, self.config.noise, generator=noise)
        values += tf.embedding_bag(features, self._weights, starts[:-1], mode="sum", per_sample_weights=strengths)
        values += torch.from_numpy(self.offset)
        return values.numpy(), codes

    def _codes(self, dice: np.random.Generator) -> Codes:
        n, n_units, n_alone = len(self.rates), len(self._intensities), len(self._alone)
        units = np.repeat(np.arange(n_units), dice.poisson(BLOCK_ROWS * self._intensities))
        drawn = np.sort(dice.integers(0, BLOCK_ROWS, len(units)) * n_units + units)
        drawn = drawn[np.diff(drawn, prepend=-1) > 0]
        rows, units = np.divmod(drawn, n_units)
        single = units < n_alone
        groups = units[~single] - n_alone
        chances = self.rates[self.groups] / self.group_rates[:, None]
        fires = dice.random((len(groups), GROUP)) < chances[groups]
        together = (rows[~single, None] * n + self.groups[groups])[fires]
        places = np.sort(np.concatenate([rows[single] * n + self._alone[units[single]], together]))
        rows, features = np.divmod(places, n)
        magnitudes = np.abs(dice.standard_normal(len(places), np.float32)) * np.float32(self.config.magnitude_scale)
        return Codes(starts_of(rows, BLOCK_ROWS), features, magnitudes + np.float32(self.config.magnitude_floor))


def label_of(feature: int) -> str:
    return f"true {feature}"


def strongest(codes: Codes) -> np.ndarray:
    """int64 (B,): the strongest feature of each row (the last of equal ones), -1 where none fires."""
    n_active = np.diff(codes.row_starts)
    some = n_active > 0
    found = np.full(len(n_active), -1)
    if some.any():
        largest = np.maximum.reduceat(codes.values, codes.row_starts[:-1][some])
        top = np.flatnonzero(codes.values == np.repeat(largest, n_active[some]))
        found[codes.rows[top]] = codes.feature_ids[top]
    return found


def rows_of(config: SyntheticConfig) -> Rows:
    """The rows that are stored, each labelled by the strongest known feature in it."""
    world = World.of(config)
    names = np.array([*map(label_of, range(config.n_true)), NOTHING], object)

    def blocks(start: int) -> Iterator[Block]:
        skip = start % BLOCK_ROWS
        for number in range(start // BLOCK_ROWS, -(-config.n_samples // BLOCK_ROWS)):
            values, codes = world.block(TRAINING, number)
            yield values[skip:], names[strongest(codes)][skip:].tolist()
            skip = 0

    return Rows("the made table", config.n_samples, config.n_neurons, blocks, sorted(names.tolist()))


def truth(config: SyntheticConfig) -> Truth:
    """What is known of these rows."""
    world = World.of(config)
    return Truth(
        world.directions, world.rates, config.noise, lambda: map(partial(world.block, FRESH), itertools.count())
    )
