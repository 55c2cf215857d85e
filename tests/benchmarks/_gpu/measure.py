"""Sizes, clocks, and the rows that a part of the benchmark gives."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

ROUNDS = 3


@dataclass(frozen=True)
class Size:
    """A batch and a dictionary."""

    width: int
    n_features: int
    k: int
    n_rows: int

    @property
    def name(self) -> str:
        return f"D={self.width} F={self.n_features:,} K={self.k} B={self.n_rows:,}"

    @property
    def n_entries(self) -> int:
        return self.n_rows * self.k

    @property
    def n_weights(self) -> int:
        """Numbers of both matrices."""
        return 2 * self.n_features * self.width

    @property
    def flops(self) -> float:
        """Floating-point operations of the encoder product."""
        return 2.0 * self.n_rows * self.width * self.n_features


SIZES = {
    "small": Size(2304, 65_536, 64, 8192),
    "large": Size(4096, 131_072, 64, 4096),
    "public": Size(4096, 32_768, 128, 4096),
}
"""`public` is that of the best public figure: forward and backward, 124,000 tokens/s."""
TOYS = {name: Size(24, 70, 3, 12) for name in SIZES}


@dataclass(frozen=True)
class Row:
    """What was measured, or why it was not."""

    name: str
    value: float | None = None
    unit: str = ""
    spread: float | None = None
    """Largest less smallest of three rounds."""
    asked: float | None = None
    sense: Literal[">=", "<="] = ">="
    flops: float = 0.0
    n_bytes: float = 0.0
    """What the part has to compute and to move at least: its limit follows from the card's rates."""
    asked_share: float | None = None
    """Least share of that limit."""
    note: str = ""


@dataclass(frozen=True)
class Card:
    """Where the work is done, and for how long each part may."""

    place: torch.device
    is_toy: bool
    """True where only the script's own code is run, not measured."""

    @property
    def on_gpu(self) -> bool:
        return self.place.type == "cuda"

    @property
    def sizes(self) -> dict[str, Size]:
        return TOYS if self.is_toy else SIZES

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.place)

    def free(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.place).manual_seed(seed)

    def normal(self, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator(seed), device=self.place, dtype=dtype)

    def rounds(self, work: Callable[[], Any], seconds: float) -> list[float]:
        """Return seconds of a call, in each of three rounds that last about so long together. One call warms up."""
        if self.is_toy:
            return [self._seconds(work, 1)]
        self._seconds(work, 1)
        once = self._seconds(work, 1)
        n = min(max(int(seconds / ROUNDS / max(once, 1e-6)), 1), 100)
        return [self._seconds(work, n) for _ in range(ROUNDS)]

    def _seconds(self, work: Callable[[], Any], n: int) -> float:
        self.wait()
        began = time.perf_counter()
        for _ in range(n):
            work()
        self.wait()
        return (time.perf_counter() - began) / n

    def timed(self, name: str, work: Callable[[], Any], seconds: float = 2.0, **about: Any) -> Row:
        """Return the milliseconds of a call."""
        found = [1e3 * each for each in self.rounds(work, seconds)]
        return Row(name, statistics.median(found), "ms", max(found) - min(found), **about)


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def rate(n: float, unit: str, name: str, seconds: list[float], **about: Any) -> Row:
    """Return a row of n things in so many seconds, in each of some rounds."""
    found = [n / each for each in seconds]
    return Row(name, statistics.median(found), unit, max(found) - min(found), **about)


def ratio(name: str, asked: float, ours: list[float], theirs: list[float]) -> Row:
    """Return how many times as fast ours is, from the seconds of both."""
    found = [b / a for a, b in zip(ours, theirs, strict=True)]
    return Row(name, statistics.median(found), "×", max(found) - min(found), asked=asked)
