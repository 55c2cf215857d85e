"""Read answers. Models chat, think aloud and miscount, so each reader looks for the one form it asked for."""

from __future__ import annotations

import json
import math
import re

_THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_LIST = re.compile(r"\[([^\[\]]*)\]")
_OBJECT = re.compile(r"\{[^{}]*\}")
_SAID = re.compile(r"^[\W_]*explanation[\W_]*:[\W_]*(\S.*)$", re.IGNORECASE | re.MULTILINE)
_YES = {"1", "true", "yes"}
_NO = {"0", "false", "no"}

LONGEST_EXPLANATION = 400
"""Longer texts are no explanation but an essay."""

STRONGEST = 10
"""Strengths are told and asked for on a scale from 0 to this."""


def read_explanation(text: str) -> str | None:
    """Return the explanation on one line: the last line `Explanation: …`, or the whole answer if it is one line."""
    said = _THOUGHTS.sub("", text).strip()
    found = _SAID.findall(said)
    lines = [line for line in said.splitlines() if line.strip()]
    chosen = found[-1] if found else lines[0] if len(lines) == 1 else ""
    line = " ".join(chosen.split()).strip("*`\"' ")
    return line if 3 <= len(line) <= LONGEST_EXPLANATION and re.search(r"\w", line) else None


def read_judgements(text: str, n: int) -> list[bool] | None:
    """Return yes or no for each of `n` examples, from the answer's last list of `n` items, 0 or 1; None without one."""
    said = _THOUGHTS.sub("", text)
    lists = [found.split(",") for found in _LIST.findall(said)]
    if n == 1 and not lists:
        lists = [[said]]
    for items in reversed(lists):
        words = [item.strip(" \t\r\n\"'.").lower() for item in items]
        if len(words) == n and all(word in _YES | _NO for word in words):
            return [word in _YES for word in words]
    return None


def read_strengths(text: str, n: int) -> list[float] | None:
    """Return a strength from 0 to 10 for each of `n` tokens, or None.

    The answer is a JSON object from a token's number, from 1, to its strength. Tokens that it leaves out have 0.
    """
    for found in reversed(_OBJECT.findall(_THOUGHTS.sub("", text))):
        try:
            given = {int(number): float(strength) for number, strength in json.loads(found).items()}
        except (ValueError, TypeError, OverflowError, RecursionError):
            continue
        if all(
            1 <= number <= n and 0 <= value <= STRONGEST and math.isfinite(value) for number, value in given.items()
        ):
            return [given.get(number, 0.0) for number in range(1, n + 1)]
    return None
