"""A table of activations as a stream of blocks of rows, so that no table need fit into memory."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError

from saeflow.runtime.errors import UserError, first_line

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


@dataclass(frozen=True)
class InMemoryTable:
    """A small table: `values` float32 (N, D), one label per row, and the known directions (n, D), if any."""

    labels: list[str]
    values: np.ndarray
    directions: np.ndarray | None = None

    def rows(self) -> TableRows:
        n_rows, width = self.values.shape
        return TableRows("the table", n_rows, width, lambda start: iter([(self.values[start:], self.labels[start:])]))


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
            values, labels = self._left or self._next()
            n = min(len(values), stop - self._at)
            self._left = (values[n:], labels[n:] if labels else None) if n < len(values) else None
            self._at += n
            with np.errstate(over="ignore"):  # numbers too large for float32 become inf, which is refused
                yield values[:n].astype(np.float32), labels[:n] if labels else None

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
