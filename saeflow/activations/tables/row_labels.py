"""Rows without labels are called by their number; their vocabulary is in text order, as any other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def name_of(row: int) -> str:
    return f"row {row}"


def places_of(numbers: np.ndarray, n_rows: int) -> np.ndarray:
    """int64: place of `row <number>` among `row 0` … `row <n_rows - 1>` in text order, where 10 comes before 2.

    Counts, for each length of numbers, those that come before: they are from 10, 100, … up to the number cut or filled
    to that length.
    """
    numbers = np.asarray(numbers, np.int64)
    n_digits = np.array([len(str(number)) for number in numbers.tolist()], np.int64)
    places = (numbers > 0).astype(np.int64)  # 0 comes first
    for length in range(1, len(str(n_rows)) + 1):
        shorter = length < n_digits
        scale = 10 ** np.abs(n_digits - length)
        cut = np.where(shorter, numbers // scale + 1, numbers * np.where(shorter, 1, scale))
        low = 10 ** (length - 1)
        places += np.clip(np.minimum(cut, min(10**length, n_rows)) - low, 0, None)
    return np.where(numbers == 0, 0, places)


def names_in_order(n_rows: int, batch: int = 1 << 17) -> Iterator[str]:
    """All names in text order; holds four bytes a row, eight beyond two thousand million."""
    order = np.empty(n_rows, np.int32 if n_rows < 2**31 else np.int64)
    for start in range(0, n_rows, batch):
        numbers = np.arange(start, min(start + batch, n_rows))
        order[places_of(numbers, n_rows)] = numbers
    for start in range(0, n_rows, batch):
        yield from map(name_of, order[start : start + batch].tolist())
