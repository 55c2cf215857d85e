"""Names of rows without labels. They go by their number, and their vocabulary is in text order like any other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def row_name(row: int) -> str:
    return f"row {row}"


def places_in_text_order(numbers: np.ndarray, n_rows: int) -> np.ndarray:
    """Return the place (int64) of each `row <number>` among `row 0` … `row <n_rows - 1>` in text order.

    In text order 10 comes before 2. For each length of numbers, those that come before are counted: they go from 10,
    100, … up to the number cut or filled to that length.
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


def row_names_in_text_order(n_rows: int, batch: int = 1 << 17) -> Iterator[str]:
    """Yield all names in text order. Holds four bytes per row, or eight for more than two thousand million rows."""
    order = np.empty(n_rows, np.int32 if n_rows < 2**31 else np.int64)
    for start in range(0, n_rows, batch):
        numbers = np.arange(start, min(start + batch, n_rows))
        order[places_in_text_order(numbers, n_rows)] = numbers
    for start in range(0, n_rows, batch):
        yield from map(row_name, order[start : start + batch].tolist())
