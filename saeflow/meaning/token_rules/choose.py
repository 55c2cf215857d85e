"""The best rule of each feature: chosen on training documents, measured on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saeflow.features.counting import Counts
from saeflow.meaning.token_rules import counting, testing
from saeflow.meaning.token_rules.counting import MOST_KEYS, PRICE, Firings, Unions
from saeflow.meaning.token_rules.families import Family
from saeflow.meaning.token_rules.hashing import HELD_OUT, Sides
from saeflow.meaning.token_rules.testing import Keyed, Mistakes, no_mistakes
from saeflow.meaning.token_rules.token_table import TokenTable
from saeflow.runtime.threads import in_parallel
from saeflow.sae.kernels import Ids

SECOND_PRICE = 0.03
"""F1 on training documents that a second kind of rule must add."""

_WORTH_A_SECOND = (0.2, 0.95)
"""Scores between which a second kind of rule is looked for."""


@dataclass(frozen=True)
class Counted:
    """Tokens of one side: at which a feature fires, in its rule, and both."""

    fired: int
    size: int
    hits: int

    @property
    def precision(self) -> float | None:
        return self.hits / self.size if self.size else None

    @property
    def recall(self) -> float | None:
        return self.hits / self.fired if self.fired else None

    @property
    def f1(self) -> float | None:
        """None if the feature does not fire on this side."""
        return 2 * self.hits / (self.fired + self.size) if self.fired else None


@dataclass(frozen=True)
class Rule:
    """The best rule of one feature; `text` is empty if no family says anything about it."""

    feature_id: int
    kind: str
    text: str
    held_out: Counted
    missed: tuple[int, ...] = ()
    """Some held-out tokens outside the rule at which the feature fires, the strongest first."""
    false_alarms: tuple[int, ...] = ()
    """Some held-out tokens in the rule at which it is silent."""


@dataclass(frozen=True)
class _Chunk:
    """Features with their firings, or some of them."""

    ids: NDArray[np.int64]
    firings: Firings
    samples: Sides

    def at(self, places: NDArray[np.int64]) -> _Chunk:
        starts, ends, token_ids, values = self.firings
        chosen = Firings(starts[places], ends[places], token_ids, values)
        return _Chunk(self.ids[places], chosen, self.samples[places])


class _Kinds(NamedTuple):
    """The keys (F, MOST_KEYS) of one kind in each feature's rule, the place of the kind's family, and the score."""

    keys: Ids
    family: NDArray[np.int64]
    score: NDArray[np.float64]


class Chooser:
    """Chooses rules for features of one run."""

    def __init__(self, table: TokenTable, families: Sequence[Family], promoted: Ids, threads: int) -> None:
        self.table, self.families, self.threads = table, families, threads
        self._promoted = promoted
        """(F, A): entries that each feature makes the model say, -1 where there are fewer."""

    def rules(self, features: Sequence[int], firings: Firings) -> list[Rule]:
        """Return the best rule of each of these features, whose firings are given in their order."""
        levels, sides = self.table.levels, self.table.sides
        samples = counting.choose_samples(firings, levels)
        chosen_on = counting.select_firings(firings, levels, samples + np.uint8(1), counting.N_LEVELS)
        tested_on = counting.select_firings(firings, sides, np.full(len(features), HELD_OUT, np.uint8), HELD_OUT)
        chunk = _Chunk(np.array(features), chosen_on, samples)
        first = self._first_kind(chunk)
        second = self._second_kind(chunk, first)
        counts, mistakes = self._tested(_Chunk(chunk.ids, tested_on, samples), first, second)
        tokens = [[tuple(row[row >= 0].tolist()) for row in side] for side in (mistakes.missed, mistakes.false_alarms)]
        return [
            Rule(feature, *self._worded(i, first, second), Counted(*counts[i].tolist()), *(side[i] for side in tokens))
            for i, feature in enumerate(features)
        ]

    def _unions(self, chunk: _Chunk, family: Family, first: Family | None = None, chosen: Ids | None = None) -> Unions:
        """Find the best unions for these features, alone or beside the chosen keys of a first family."""
        n = len(chunk.ids)
        found = Unions(np.full((n, MOST_KEYS), -1, np.int32), np.zeros(n))
        none = np.empty((n, 0), np.int32)
        starts, token_ids = first.index if first else (np.zeros(1, np.int64), np.empty(0, np.int32))
        counting.best_unions(
            chunk.firings, self.table.levels, chunk.samples, family.keys, family.sizes,
            self._promoted[chunk.ids] if family.is_next else none, PRICE,
            (first or family).keys, none if chosen is None else chosen, starts, token_ids, found,
        )  # fmt: skip
        return found

    def _best_of(self, families: Sequence[Family], work: Callable[[Family], Unions]) -> _Kinds:
        """Return the best union over families. Equal ones: that of the first, which is the simplest."""
        tried = in_parallel(work, families, self.threads)
        nets = np.stack([found.score - family.price for found, family in zip(tried, families, strict=True)])
        place, every = np.argmax(nets, axis=0), np.arange(nets.shape[1])
        keys = np.stack([found.keys for found in tried])[place, every]
        numbers = np.array([self.families.index(family) for family in families])
        return _Kinds(keys, numbers[place], nets[place, every])

    def _first_kind(self, chunk: _Chunk) -> _Kinds:
        return self._best_of(self.families, lambda family: self._unions(chunk, family))

    def _second_kind(self, chunk: _Chunk, first: _Kinds) -> _Kinds:
        """Return what rules gain from another family; no keys where they gain too little."""
        n = len(chunk.ids)
        second = _Kinds(np.full((n, MOST_KEYS), -1, np.int32), np.zeros(n, np.int64), np.zeros(n))
        least, most = _WORTH_A_SECOND
        for number, family in enumerate(self.families):
            at = np.flatnonzero((first.family == number) & (first.score > least) & (first.score < most))
            others = [each for each in self.families if each.may_be_second and each is not family]
            if not len(at):
                continue
            found = self._best_of(others, partial(self._unions, chunk.at(at), first=family, chosen=first.keys[at]))
            paid = family.price + PRICE * ((first.keys[at] >= 0).sum(axis=1) - 1) + SECOND_PRICE
            gains = found.score - paid > first.score[at]
            second.keys[at[gains]], second.family[at[gains]] = found.keys[gains], found.family[gains]
        return second

    def _tested(self, chunk: _Chunk, first: _Kinds, second: _Kinds) -> tuple[Counts, Mistakes]:
        """Return (F, 3) exact counts of each feature's rule on held-out tokens, and mistakes: see `test_rules`."""
        n = len(chunk.ids)
        counts, mistakes = np.zeros((n, 3), np.int64), no_mistakes(n)

        def work(pair: tuple[int, int]) -> None:
            at = np.flatnonzero((first.family == pair[0]) & (second.family == pair[1]))
            a, b = (self.families[number] for number in pair)
            in_first, in_second = Keyed(a.keys, first.keys[at], *a.index), Keyed(b.keys, second.keys[at], *b.index)
            counted, wrong = np.zeros((len(at), 3), np.int64), no_mistakes(len(at))
            testing.test_rules(
                chunk.ids[at], chunk.at(at).firings, self.table.sides, in_first, in_second, counted, wrong
            )
            counts[at], mistakes.missed[at], mistakes.false_alarms[at] = counted, wrong.missed, wrong.false_alarms

        in_parallel(work, sorted(set(zip(first.family.tolist(), second.family.tolist(), strict=True))), self.threads)
        return counts, mistakes

    def _worded(self, i: int, first: _Kinds, second: _Kinds) -> tuple[str, str]:
        """Return the kind and the text of a rule; both are empty if no key of any family says anything."""
        kinds, texts = [], []
        for chosen in (first, second):
            if keys := [int(key) for key in chosen.keys[i] if key >= 0]:
                kinds.append(self.families[chosen.family[i]].kind)
                texts.append(self.families[chosen.family[i]].say(keys))
        return " + ".join(kinds), "; or ".join(texts)
