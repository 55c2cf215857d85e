"""How much work a call is, counted so that a busy machine does not change the count."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable


def n_calls(work: Callable[[], object]) -> int:
    """Return how many functions `work` calls, Python's and C's."""
    profile = cProfile.Profile()
    profile.runcall(work)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def growth(work: Callable[[int], object], n: int, times: int = 8) -> float:
    """Return the factor by which the calls of `work(n)` grow if n grows by `times`. A first call fills the caches."""
    work(n)
    return n_calls(lambda: work(n * times)) / n_calls(lambda: work(n))
