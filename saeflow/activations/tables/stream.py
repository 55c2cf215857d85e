"""A table of activations as a stream of blocks of rows, so that no table need fit into memory.

Rows without labels go by their number. Their vocabulary is in text order like any other.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError

from saeflow.runtime.errors import UserError, first_line


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


RowBlock = tuple[np.ndarray, list[str] | None]
"""Numbers (n, D) of any numeric type, and one label per row if the table has labels."""

BLOCK_BYTES = 4 << 20
"""Bytes to read at once, counted as float32."""

READ_FAILURES = (OSError, ValueError, EOFError, KeyError, RuntimeError, NotImplementedError, zlib.error,
                 zipfile.BadZipFile, SafetensorError)  # fmt: skip
"""What the readers of files raise if a file is damaged or of another kind."""


@dataclass(frozen=True)
class TableRows:
    """A table of N rows and D columns that is read block by block."""

    name: str
    """The file's name, for messages."""
    n_rows: int
    width: int
    blocks: Callable[[int], Iterator[RowBlock]]
    """Reads everything from the given row on, in order, in blocks of any size."""
    pieces: list[str] | None = None
    """Every label in text order, if the rows are known to be finite and labelled without reading them."""
    index: tuple[str, ...] = ()
    """Columns of numbers that are left out, since they count the rows."""


@dataclass(frozen=True)
class InMemoryTable:
    """A small table: `values` float32 (N, D), one label per row, and the known directions (n, D), if any."""

    labels: list[str]
    values: np.ndarray
    directions: np.ndarray | None = None

    @classmethod
    def of(cls, rows: TableRows, directions: np.ndarray | None = None) -> InMemoryTable:
        """Read a whole table."""
        found = list(TableReader(rows).read(0, rows.n_rows))
        labels = [label for _, each in found for label in each or ()] or [row_name(n) for n in range(rows.n_rows)]
        return cls(labels, np.concatenate([values for values, _ in found]), directions)

    def rows(self) -> TableRows:
        n_rows, width = self.values.shape
        return TableRows("the table", n_rows, width, lambda start: iter([(self.values[start:], self.labels[start:])]))


def without_first_rows(blocks: Iterator[RowBlock], n_rows: int) -> Iterator[RowBlock]:
    """Leave out the first rows of a stream."""
    for values, labels in blocks:
        if n_rows < len(values):
            yield values[n_rows:], labels[n_rows:] if labels else None
        n_rows = max(n_rows - len(values), 0)


def rows_at_once(width: int, block_bytes: int) -> int:
    return max(1, block_bytes // (4 * width))


def unreadable_table(name: str, error: Exception) -> UserError:
    return UserError(f"activations.source: {name} cannot be read: {first_line(error)}")


def not_a_table(name: str, shape: Iterable[int]) -> UserError:
    return UserError(
        f"activations.source: {name} has shape {tuple(shape)}, but it must be a table of rows × neurons,\n"
        "or an array [sequence, position, neuron], which is read row by row."
    )


class TableReader:
    """Read ranges of rows as float32. A range that begins where the last one ended costs no search.

    Raises UserError that names the file if it cannot be read or ends too early.
    """

    def __init__(self, rows: TableRows) -> None:
        self.rows, self._at = rows, -1
        self._stream: Iterator[RowBlock] = iter(())
        self._left: RowBlock | None = None

    def read(self, start: int, stop: int) -> Iterator[RowBlock]:
        if start != self._at:
            self._stream, self._left, self._at = self.rows.blocks(start), None, start
        while self._at < stop:
            yield self._take(min(stop - self._at, rows_at_once(self.rows.width, BLOCK_BYTES)))

    def _take(self, most: int) -> RowBlock:
        values, labels = self._left or self._next()
        n = min(len(values), most)
        self._left = (values[n:], labels[n:] if labels else None) if n < len(values) else None
        self._at += n
        with np.errstate(over="ignore"):  # numbers too large for float32 become inf, which is refused
            return values[:n].astype(np.float32), labels[:n] if labels else None

    def _next(self) -> RowBlock:
        try:
            block = next(self._stream, None)
        except READ_FAILURES as error:
            raise unreadable_table(self.rows.name, error) from error
        if block is None:
            raise UserError(
                f"activations.source: {self.rows.name} ends after {self._at:,} of {self.rows.n_rows:,} rows. "
                "Copy it or make it again."
            )
        return block
