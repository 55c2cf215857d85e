"""Features as a person lists them: `3,17,40-59`, or `all`."""

from __future__ import annotations

import re

from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief

_RANGE = re.compile(r"\s*([0-9]{1,10})(?:\s*-\s*([0-9]{1,10}))?\s*")


def parse_features(text: str, n_features: int) -> list[int]:
    """Return the features of a list such as `3,17,40-59`, or all of them for `all`, ascending. Raises UserError."""
    if text.strip().lower() == "all":
        return list(range(n_features))
    found: set[int] = set()
    for word in text.split(","):
        ends = _RANGE.fullmatch(word)
        if ends is None:
            raise UserError(f"--features is {brief(text)!r}. Write numbers and ranges, such as 3,17,40-59, or all.")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise UserError(f"--features has the range {brief(word.strip())!r}. Write its lower end first.")
        if last >= n_features:
            raise UserError(f"--features has {brief(word.strip())!r}, but features go from 0 to {n_features - 1}.")
        found.update(range(first, last + 1))
    return sorted(found)
