"""Scores of an explanation and their 95% intervals. Pure functions of what was asked and answered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959963984540054
"""The normal quantile of a 95% interval."""

_RESAMPLINGS = 1000


@dataclass(frozen=True)
class JudgedExample:
    """One example of detection or fuzzing, and the answer to it (None: the answer could not be read)."""

    stratum: str
    """`band_1` (the strongest) and so on where the feature fires; `near_misses` or `random` where it is silent."""
    token_id: int
    asked: bool
    """True if yes is right."""
    answered: bool | None


@dataclass(frozen=True)
class Simulated:
    """The strengths of one context, and those that were predicted (None: the answer could not be read)."""

    stratum: str
    token_id: int
    actual: Sequence[float]
    predicted: Sequence[float] | None


@dataclass(frozen=True)
class Score:
    """A score of a stratum with its interval. `n` examples were answered, `n_unusable` were not."""

    stratum: str
    score: float | None
    low: float | None
    high: float | None
    n: int
    n_unusable: int = 0


@dataclass(frozen=True)
class Rate:
    """A share of right answers with its Wilson interval."""

    right: int
    n: int

    @property
    def share(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (Wilson 1927), which stays inside 0 to 1 also for few examples."""
        p, n, z2 = self.share, self.n, _Z * _Z
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def judged_scores(judged: Sequence[JudgedExample]) -> list[Score]:
    """Return the scores of detection or fuzzing: balanced accuracies, then the share of right answers by stratum.

    `all` is balanced accuracy: the mean of the share of firing examples with a yes and of silent ones with a no, so
    that always saying yes scores 0.5. `against_near_misses` and `against_random` take silent examples of one kind.
    The intervals of these means combine the two Wilson intervals by squares (MOVER: Zou and Donner 2008). Examples of
    one question are taken as independent.
    """
    strata = sorted({each.stratum for each in judged}, key=_order)
    silent = {"near_misses", "random"}
    firing = [each for each in judged if each.stratum not in silent]
    wholes = {
        "all": [each for each in judged if each.stratum in silent],
        "against_near_misses": [each for each in judged if each.stratum == "near_misses"],
        "against_random": [each for each in judged if each.stratum == "random"],
    }
    found = [_balanced(name, firing, negatives) for name, negatives in wholes.items()]
    return found + [_share(name, [each for each in judged if each.stratum == name]) for name in strata]


def _order(stratum: str) -> tuple[int, str]:
    return (int(stratum.removeprefix("band_")), "") if stratum.startswith("band_") else (1 << 30, stratum)


def _rate_of_right_answers(judged: Sequence[JudgedExample]) -> Rate | None:
    answered = [each for each in judged if each.answered is not None]
    return Rate(sum(each.answered == each.asked for each in answered), len(answered)) if answered else None


def _share(stratum: str, judged: Sequence[JudgedExample]) -> Score:
    rate = _rate_of_right_answers(judged)
    if rate is None:
        return Score(stratum, None, None, None, 0, len(judged))
    return Score(stratum, rate.share, *rate.interval, rate.n, len(judged) - rate.n)


def _balanced(stratum: str, firing: Sequence[JudgedExample], silent: Sequence[JudgedExample]) -> Score:
    yes, no = _rate_of_right_answers(firing), _rate_of_right_answers(silent)
    n = sum(rate.n for rate in (yes, no) if rate is not None)
    n_unusable = len(firing) + len(silent) - n
    if yes is None or no is None:
        return Score(stratum, None, None, None, n, n_unusable)
    score = (yes.share + no.share) / 2
    pairs = [(rate.share, *rate.interval) for rate in (yes, no)]
    below = math.sqrt(sum((p - low) ** 2 for p, low, _ in pairs)) / 2
    above = math.sqrt(sum((high - p) ** 2 for p, _, high in pairs)) / 2
    return Score(stratum, score, max(0.0, score - below), min(1.0, score + above), n, n_unusable)


def simulated_scores(simulated: Sequence[Simulated], seed: int = 0) -> list[Score]:
    """Return the scores of simulation: the correlation of predicted and actual strengths over all tokens (Bills 2023).

    `all` takes every context, as Bills et al.'s top-and-random score; `firing` those in which the feature fires; then
    each band. A constant prediction has the correlation 0. Intervals are percentiles of 1,000 resamplings of whole
    contexts, because tokens of one context are not independent; they need two contexts. `n` counts contexts.
    """
    firing = [each for each in simulated if each.stratum.startswith("band_")]
    strata = sorted({each.stratum for each in firing}, key=_order)
    groups = {"all": list(simulated), "firing": firing}
    groups |= {name: [each for each in firing if each.stratum == name] for name in strata}
    return [_correlated(name, group, seed) for name, group in groups.items()]


def _correlated(stratum: str, simulated: Sequence[Simulated], seed: int) -> Score:
    pairs = [(each.actual, each.predicted) for each in simulated if each.predicted is not None]
    n_unusable = len(simulated) - len(pairs)
    score = correlation(pairs)
    if score is None or len(pairs) < 2:
        return Score(stratum, score, None, None, len(pairs), n_unusable)
    sampled = list(_resampled(pairs, seed))
    low, high = map(float, np.quantile(sampled, [0.025, 0.975]))
    return Score(stratum, score, low, high, len(pairs), n_unusable)


def _resampled(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int) -> Iterator[float]:
    """Yield the correlation of resampled contexts, from the sums of each context alone."""
    sums = np.array([_sums(*pair) for pair in pairs])
    dice = np.random.default_rng(seed)
    for chosen in dice.integers(0, len(pairs), size=(_RESAMPLINGS, len(pairs))):
        found = _from_sums(sums[chosen].sum(axis=0))
        if found is not None:
            yield found


def correlation(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """Return Pearson's r over the tokens of all contexts; None if the actual strengths are all equal."""
    return _from_sums(np.sum([_sums(*pair) for pair in pairs], axis=0)) if pairs else None


def _sums(actual: Sequence[float], predicted: Sequence[float]) -> list[float]:
    x, y = np.asarray(actual, float), np.asarray(predicted, float)
    return [len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y]


def _from_sums(sums: np.ndarray) -> float | None:
    n, x, y, xx, yy, xy = map(float, sums)
    x_spread, y_spread = n * xx - x * x, n * yy - y * y
    if x_spread <= 1e-12 * n * xx:
        return None
    if y_spread <= 1e-12 * n * yy:
        return 0.0
    return float(np.clip((n * xy - x * y) / math.sqrt(x_spread * y_spread), -1, 1))
