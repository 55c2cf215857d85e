"""Suggest names for one that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from saeflow.runtime.text import brief

LEAST_ALIKE = 0.4
"""Names less alike than this (difflib's ratio, 0 to 1) are not suggested."""


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Return at most `n` names that look like this one, the most alike first."""
    return difflib.get_close_matches(brief(name), list(names), n=n, cutoff=LEAST_ALIKE)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a hint as a sentence: the nearest names, or all names if none is near."""
    names = list(names)
    near = nearest(name, names)
    return f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(names) or 'none'}."
