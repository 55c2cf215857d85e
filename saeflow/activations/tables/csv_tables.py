"""Tables of activations in CSV files. Every row counts: a column holds numbers only if each of its cells is one."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from saeflow.activations.tables.stream import RowBlock, TableRows, unreadable_table, without_first_rows
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import encoding_of, separator_of

_MISSING = pa.array(["", "NA", "N/A", "#N/A", "<NA>", "NULL", "null", "None"])
"""Cells without a number. They are refused by row and neuron, as NaN is."""
_NUMBER_CELL = r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*"
_WITH_COMMAS = r"\s*[-+]?\d[\d.,' ]*\s*"
INDEX_NAMES = re.compile(r"__index_level_\d+__|Unnamed: ?\d+|index|level_\d+|row_(nr|index|number)", re.IGNORECASE)
_TEXT_BYTES = 8 << 20


def csv_rows(file: Path) -> TableRows:
    """Stream a CSV file in its own order. Raises UserError if a column of numbers has a cell that is none."""
    try:
        table = _Csv.opened(file)
        n_rows, numbers, index = table.columns()
        texts = [place for place in range(len(table.names)) if place not in {*numbers, *index}]
        table.require_no_numbers(texts, n_rows)
    except (pa.ArrowException, csv.Error, ValueError) as error:
        raise unreadable_table(file.name, error) from error
    if not numbers:
        raise UserError(f"activations.source: {file.name} has no numeric column; it has {', '.join(table.names)}.")
    label = texts[:1]

    def block(batch: pa.RecordBatch) -> RowBlock:
        values = [_floats(batch.column(place)) for place in range(len(numbers))]
        labels = batch.column(len(numbers)).to_pylist() if label else None
        return np.column_stack([each for each in values if each is not None]), labels

    def blocks(start: int) -> Iterator[RowBlock]:
        return without_first_rows(map(block, table.batches([*numbers, *label])), start)

    return TableRows(file.name, n_rows, len(numbers), blocks, index=tuple(table.names[place] for place in index))


@dataclass(frozen=True)
class _Csv:
    """A file, how it is written, and the names of its columns; one without a name is called by its place."""

    file: Path
    encoding: str
    separator: str
    names: list[str]
    has_header: bool

    @classmethod
    def opened(cls, file: Path) -> _Csv:
        with file.open("rb") as opened:
            encoding = encoding_of(opened.read(4))
        with file.open(encoding=encoding, newline="") as text:
            line = text.readline()
            separator = "\t" if file.suffix.lower() == ".tsv" else separator_of(line)
            first = next(csv.reader(chain([line], text), delimiter=separator), [])
        has_header = _is_header(first, file.name)
        names = [cell if has_header and cell else f"column{place}" for place, cell in enumerate(first)]
        return cls(file, encoding.removesuffix("-sig"), separator, names, has_header)

    def batches(self, wanted: list[int]) -> Iterator[pa.RecordBatch]:
        """Yield these columns as text, without the header."""
        if not wanted:
            return
        places = list(map(str, range(len(self.names))))
        read = arrow_csv.ReadOptions(
            use_threads=False, column_names=places, block_size=_TEXT_BYTES, encoding=self.encoding
        )
        parse = arrow_csv.ParseOptions(delimiter=self.separator, newlines_in_values=True)
        convert = arrow_csv.ConvertOptions(
            column_types=dict.fromkeys(places, pa.string()), include_columns=[places[place] for place in wanted]
        )
        with self.file.open("rb") as opened, closing(arrow_csv.open_csv(opened, read, parse, convert)) as reader:
            n_skipped = int(self.has_header)
            for batch in reader:
                yield batch.slice(min(n_skipped, len(batch)))
                n_skipped = max(n_skipped - len(batch), 0)

    def columns(self) -> tuple[int, list[int], list[int]]:
        """Return the number of rows, the columns of numbers, and those that only number the rows or are empty."""
        numbers, n_rows, named = set(range(len(self.names))), 0, False
        whole, filled = set(), set[int]()
        for place, name in enumerate(self.names):
            named |= not self.has_header or name != f"column{place}"
            whole |= {place} if not named or (self.has_header and INDEX_NAMES.fullmatch(name)) else set()
        for batch in self.batches(sorted(numbers)):
            n_rows += len(batch)
            numbers = {place for place in numbers if _floats(batch.column(place)) is not None}
            whole = {place for place in whole if _all_match(batch.column(place), r"\s*\d+\s*")}
            filled |= {place for place in numbers - filled if not _all_match(batch.column(place), "")}
        nameless = {place for place, name in enumerate(self.names) if name == f"column{place}" and self.has_header}
        index = whole | ((nameless & numbers) - filled)
        return n_rows, sorted(numbers - index), sorted(index)

    def require_no_numbers(self, places: list[int], n_rows: int) -> None:
        """Raises UserError if most cells of a column of texts are numbers: a neuron would be lost."""
        alike = [0] * len(places)
        odd: dict[int, tuple[int, str]] = {}
        row = 0
        for batch in self.batches(places):
            for n, column in enumerate(batch.columns):
                is_number = pc.match_substring_regex(column, f"^{_NUMBER_CELL}$")
                alike[n] += (
                    pc.sum(pc.or_(is_number, pc.match_substring_regex(column, f"^{_WITH_COMMAS}$"))).as_py() or 0
                )
                if n not in odd and (first := pc.index(is_number, False).as_py()) >= 0:
                    odd[n] = row + first, column[first].as_py()
            row += len(batch)
        for n, place in enumerate(places):
            if 2 * alike[n] > n_rows and n in odd:
                raise UserError(
                    f"activations.source: {self.file.name} has {odd[n][1]!r} in row {odd[n][0]} (counted from 0) of "
                    f"the column {self.names[place]!r}, in which most cells are numbers.\n"
                    "Write it as a number such as 0.5. Names of rows must be words."
                )


def _is_header(first: list[str], name: str) -> bool:
    """True if the first line names the columns. Raises UserError if it may be a row as well."""
    numbers = [cell for cell in first if re.fullmatch(_NUMBER_CELL, cell)]
    counted = [list(map(str, range(start, start + len(numbers)))) for start in (0, 1)]
    if not any(cell for cell in first if cell not in numbers):
        return len(numbers) > 1 and numbers == counted[0]
    if numbers and numbers not in counted:
        raise UserError(
            f"activations.source: the first line of {name} has words and numbers: {', '.join(first[:5])}.\n"
            "Begin the file with a line that names the columns by words, or by 0, 1, 2 and so on."
        )
    return True


def _floats(column: pa.Array) -> np.ndarray | None:
    """Return cells as float64, NaN if missing; None if one is no number."""
    try:
        return np.asarray(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False))
    except pa.ArrowInvalid:
        plain = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), r"^\+", "")
    try:
        found = pc.cast(pc.if_else(pc.is_in(plain, _MISSING), None, plain), pa.float64())
    except pa.ArrowInvalid:
        return None
    return np.asarray(found.to_numpy(zero_copy_only=False))


def _all_match(column: pa.Array, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(column, f"^{pattern}$")).as_py() in (True, None))
