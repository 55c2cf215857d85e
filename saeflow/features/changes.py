"""The value that a feature is set to: zero, its mean, a multiple of its maximum, or another number."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief

_NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
_OF_MAXIMUM = re.compile(rf"max(?:\*{_NUMBER})?|{_NUMBER}x", re.IGNORECASE)
_LARGEST_CHANGE = 1e30

WAYS = "zero, mean, same, max*2 (or 2x), or a number such as 3.5"


@dataclass(frozen=True)
class FeatureLevels:
    """How strong a feature is in a corpus, in the units of its values."""

    mean: float
    """Over all encoded tokens, those where the feature is silent too."""
    maximum: float
    """The strongest value, with its sign."""


@dataclass(frozen=True)
class FeatureChange:
    """A change of a feature's value, as a user wrote it."""

    kind: Literal["same", "mean", "max", "value"]
    number: float = 1.0
    """The value, or how many times the maximum."""

    @classmethod
    def parse(cls, text: str | float, setting: str = "--change") -> FeatureChange:
        """Return the change that a text such as `zero`, `mean`, `max*2`, `3x`, `same` or `3.5` means.

        Raises UserError that names the setting.
        """
        word = str(text).strip().lower()
        if word == "zero":
            return cls("value", 0.0)
        if word in ("same", "mean"):
            return cls("same" if word == "same" else "mean")
        found = _OF_MAXIMUM.fullmatch(word)
        if found is None and re.fullmatch(_NUMBER, word) is None:
            raise UserError(f"{setting} is {brief(str(text))!r}; it may be {WAYS}.")
        number = float((found[1] or found[2] or 1) if found else word)
        if not abs(number) < _LARGEST_CHANGE or not math.isfinite(number):
            raise UserError(f"{setting} is {brief(str(text))!r}; numbers may be at most {_LARGEST_CHANGE:g}.")
        return cls("max" if found else "value", number)

    def __str__(self) -> str:
        """Two different changes have two texts: a text names an artefact and is part of its fingerprint."""
        short = f"{self.number:g}"
        digits = short if float(short) == self.number else repr(self.number)
        match self.kind:
            case "max":
                return f"max*{digits}"
            case "value":
                return digits if self.number else "zero"
        return self.kind

    def new_value(self, levels: FeatureLevels) -> float | None:
        """Return the value that the feature gets at every token; None if it keeps its own."""
        match self.kind:
            case "same":
                return None
            case "mean":
                return levels.mean
            case "max":
                return self.number * levels.maximum
            case "value":
                return self.number
