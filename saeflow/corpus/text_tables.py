"""Rows of CSV and JSON files: every cell as it is written, with the line that the row begins on.

Nothing is guessed from a sample. A file that does not read to its end as it began is refused by file and line.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa

from saeflow.corpus.files import open_text
from saeflow.corpus.metadata import ColumnType, is_exact, read_as
from saeflow.corpus.sorting import BATCH_DOCUMENTS, CONTENT, FILE, KEY, SOURCE
from saeflow.corpus.tokenise.messages import TOOLS, conversation
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.text import separator_of

RESERVED = {"document_id", "key", "source", "content_hash", "held_out", "n_tokens", "first_token_id"}
"""Columns of the store's own. Those of a corpus that are called so are no metadata."""
_METADATA = "_saeflow_metadata"
_log = logging.getLogger(__name__)
_BATCH_BYTES = 64 << 20
_COLUMN_FOLDER = re.compile(r"\w+=.*")
_NAMELESS = re.compile(r"column[0-9]+")
_READ_CHARACTERS = 1 << 20
_CUT_CHARACTERS = 12
"""A JSON value that breaks off makes its decoder fail within this many characters of the end, or in a string."""
_WAY_OUT = "corpus.sql can read it, e.g. sql = \"select * from read_csv('{name}', all_varchar = true, {dialect})\"."


class Row(NamedTuple):
    """A row by the names of its columns."""

    line: int
    cells: dict[str, Any]


class WrittenFloat(float):
    """A number of a JSON file that also knows how it is written there."""

    text: str

    @classmethod
    def of(cls, text: str) -> WrittenFloat:
        number = cls(text)
        number.text = text
        return number

    def exact(self) -> float | str:
        """Return the number, or its text if a float64 does not have all of its digits."""
        return float(self) if self.text.strip("-").isalpha() or is_exact(self.text) else self.text


class TextTables:
    """The rows of CSV or JSON files as batches, and the types of their metadata once all of them were read."""

    def __init__(self, names: dict[str, str], reader: str, config: CorpusConfig) -> None:
        """`names`: local paths, each with the path or URL that stands for it in messages."""
        self.names, self.reader, self.config = names, reader, config
        self.column = config.content
        self.types: dict[str, ColumnType] = {}
        self.others: set[str] = set()
        """Columns that are no metadata."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows with contents as bytes or ids, and metadata as one column of JSON."""
        made: list[dict[str, Any]] = []
        n_bytes = 0
        for path in self.names:
            for row in self._rows(path):
                made.append(self._prepared(path, row))
                n_bytes += len(made[-1][CONTENT] or "")
                if len(made) == BATCH_DOCUMENTS or n_bytes > _BATCH_BYTES:
                    yield self._batch(made)
                    made, n_bytes = [], 0
        yield self._batch(made)

    def _rows(self, path: str) -> Iterator[Row]:
        """Yield the rows of a file. Raises UserError if one lacks the text, or the key that the recipe names."""
        name = self.names[path]
        folders = _hive_columns(name)
        with open_text(path) as file, _cells_of_any_length():
            for line, cells in _csv_rows(file, name, self.column) if self.reader == "csv" else _objects(file, name):
                if self.column not in cells:
                    raise _no_text(name, line, self.column, cells)
                if self.config.key and self.config.key not in cells:
                    raise UserError(
                        f"corpus.key is {self.config.key!r}, but {name}, line {line}, has only: {', '.join(cells)}."
                    )
                yield Row(line, folders | cells)

    def _prepared(self, path: str, row: Row) -> dict[str, Any]:
        where = f"corpus.files: {self.names[path]}, line {row.line}"
        key, source = (_as_written(row.cells.get(name)) for name in (self.config.key or "key", "source"))
        if isinstance(row.cells.get(self.config.key or "key"), list | dict):
            raise UserError(f"{where}: the key is {str(key)[:40]!r}, but it must be a text or a number.")
        try:
            f"{key}{source}".encode()
            metadata = json.dumps(self._metadata_of(row.cells), ensure_ascii=False).encode()
            content = self._content(row.cells, where)
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: a text has half of a character (a lone surrogate) in it, which UTF-8 cannot hold."
            ) from error
        except RecursionError as error:
            raise UserError(f"{where}: lists or objects stand too deep within one another.") from error
        return {KEY: key, FILE: path, SOURCE: source, CONTENT: content, _METADATA: metadata}

    def _metadata_of(self, cells: dict[str, Any]) -> dict[str, Any]:
        """Return the other cells of a row, and take note of their types."""
        named = {self.config.text, self.column, self.config.key or "key"} | RESERVED
        named |= {TOOLS} if self.config.messages else set()
        found = {name: value for name, value in cells.items() if name not in named}
        self.others |= cells.keys() - found.keys()
        for name, value in found.items():
            found[name] = _exact(value)
            self.types.setdefault(name, ColumnType(self.reader == "csv")).see(found[name])
        return found

    def _content(self, cells: dict[str, Any], where: str) -> bytes | list[int | None]:
        value = cells[self.column]
        if self.config.messages:
            return conversation(_exact(value), _exact(cells.get(TOOLS)), where).encode()
        if self.config.token_ids:
            if value is None or (isinstance(value, list) and all(_is_id(each) for each in value)):
                return value or []
            raise UserError(
                f"{where}: corpus.token_ids is {self.column!r}, but {str(value)[:40]!r} is no list of integers: the "
                "vocabulary ids of each document."
            )
        if isinstance(value, list | dict):
            kind = "a list" if isinstance(value, list) else "an object"
            raise UserError(
                f"{where}: corpus.text is {self.column!r}, {kind}, but it must be text.\n"
                'Extract the text with corpus.sql, or name a column of ids with token_ids = "...".'
            )
        return (_as_written(value) or "").encode()

    def _batch(self, made: list[dict[str, Any]]) -> pa.RecordBatch:
        content = pa.list_(pa.int64()) if self.config.token_ids else pa.large_binary()
        kinds = {KEY: pa.string(), FILE: pa.string(), SOURCE: pa.string(), CONTENT: content, _METADATA: pa.binary()}
        return pa.RecordBatch.from_pylist(made, pa.schema(list(kinds.items())))

    def metadata(self) -> pa.Schema:
        """Return the columns of the rows that were read. A nameless CSV column without any value is none."""
        named = [name for name, each in self.types.items() if not (each.is_empty and _NAMELESS.fullmatch(name))]
        require_unlike_names(named)
        return pa.schema([(name, self.types[name].type) for name in named])

    def with_metadata(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the batch with the metadata in columns of their own."""
        rows = [json.loads(each) for each in batch.column(_METADATA).to_pylist()]
        for field in self.metadata():
            values = [read_as(field.type, row.get(field.name)) for row in rows]
            batch = batch.append_column(field, pa.array(values, field.type))
        return batch


def _hive_columns(path: str) -> dict[str, str]:
    """Return the columns that the names of folders give, e.g. `year=2024`."""
    return dict(part.split("=", 1) for part in Path(path).parent.parts if _COLUMN_FOLDER.fullmatch(part))


def folder_columns(paths: dict[str, str], present: set[str], as_text: set[str]) -> dict[str, pa.Array]:
    """Return the columns that the names of folders give and the files lack, a value for each file."""
    found = [_hive_columns(name) for name in paths.values()]
    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(name for each in found for name in each if name.casefold() not in present):
        about = ColumnType(is_csv=True)
        for each in found:
            about.see(each.get(name))
        kind = pa.string() if name in as_text else about.type
        columns[name] = pa.array([read_as(kind, each.get(name)) for each in found], kind)
    return columns


def _as_written(value: Any) -> str | None:
    """Return a single value of a row as the file has it."""
    if value is None or isinstance(value, str):
        return value
    return value.text if isinstance(value, WrittenFloat) else json.dumps(value, ensure_ascii=False)


def _exact(value: Any) -> Any:
    """Return a value of JSON with numbers that a float64 does not hold as they are written, also within lists."""
    if isinstance(value, list):
        return [_exact(each) for each in value]
    if isinstance(value, dict):
        return {name: _exact(each) for name, each in value.items()}
    return value.exact() if isinstance(value, WrittenFloat) else value


def _integer(text: str) -> int | WrittenFloat:
    return WrittenFloat.of(text) if text == "-0" else int(text)


def _is_id(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 64)


def _no_text(name: str, line: int, column: str, found: Iterable[str]) -> UserError:
    return no_column(f"corpus.files: {name}, line {line}, has", column, found)


def no_column(which: str, column: str, found: Iterable[str]) -> UserError:
    """Return the error for a table, or a row of one, without the column of the texts or ids."""
    return UserError(
        f"{which} no column {column!r}; it has: {', '.join(found)}.\n"
        'Name the column with the text, e.g. text = "content" under [corpus], or token_ids = "input_ids".'
    )


def say_left_out(names: Iterable[str], config: CorpusConfig) -> None:
    """Log the columns that are lost because the store has columns of its own that are called so."""
    used = {config.content, config.key or "key", "source"}
    if left := (RESERVED | {config.text}).intersection(names) - used:
        _log.warning("corpus: left out: %s. Rename a column to keep it.", ", ".join(sorted(left)))


def require_unlike_names(names: Sequence[str], which: str = "The corpus") -> None:
    """Raises UserError if two columns have one name, in capitals or not, as DuckDB reads names, or one is * or ours."""
    if own := [name for name in names if name.casefold().startswith("_saeflow_")]:
        raise UserError(f"{which} has a column called {own[0]!r}, as saeflow names its own. Rename it.")
    if "*" in names:
        raise UserError(f"{which} has a column called *, which stands for all columns. Rename it.")
    twice = [name for name, n in Counter(map(str.casefold, names)).items() if n > 1]
    if twice:
        raise UserError(
            f"{which} has several columns called {twice[0]!r} but for case. Leave out or rename all but one."
        )


@contextlib.contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Let Python's reader of CSV take cells above 128 KiB. The limit is one for the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_rows(file: TextIO, name: str, column: str) -> Iterator[Row]:
    first = file.readline()
    separator = "\t" if _is_tsv(name) else separator_of(first, column)
    lines = csv.reader(chain([first], file), delimiter=separator, strict=True)
    with _bad_csv(name, 1):
        header = _header(next(lines, []), name)
    if column not in header:
        raise _no_text(name, 1, column, header)
    while True:
        begins = lines.line_num + 1
        with _bad_csv(name, begins):
            cells = next(lines, None)
        if cells is None:
            return
        if cells:
            yield Row(begins, _cells_by_name(header, cells, f"corpus.files: {name}, line {begins},"))


@contextlib.contextmanager
def _bad_csv(name: str, line: int) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        dialect = r"delim = '\t', quote = ''" if _is_tsv(name) else r"escape = '\\'"
        way_out = _WAY_OUT.format(name=Path(name).name, dialect=dialect)
        raise UserError(f"corpus.files: {name}, line {line}, cannot be read as CSV: {error}.\n{way_out}") from error


def _is_tsv(name: str) -> bool:
    return ".tsv" in map(str.lower, Path(name).suffixes[-2:])


def _header(cells: list[str], name: str) -> list[str]:
    """Return the names of the columns. One without a name is called by its place: column0 is the first."""
    named = [cell or f"column{place}" for place, cell in enumerate(cells)]
    require_unlike_names(named, f"corpus.files: {name}")
    return named


def _cells_by_name(header: list[str], cells: list[str], where: str) -> dict[str, Any]:
    """Return the cells by column, an empty one as None. Empty cells beyond the last column are passed over."""
    while len(cells) > len(header) and not cells[-1]:
        cells.pop()
    if len(cells) != len(header):
        raise UserError(
            f"{where} has {len(cells)} cells, but the header has {len(header)}: {', '.join(header)}.\n"
            'A cell with a separator in it stands in quotes: "one, two".'
        )
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _objects(file: TextIO, name: str) -> Iterator[Row]:
    for line, value in _JsonValues(file, name):
        if not isinstance(value, dict):
            raise UserError(f"corpus.files: {name}, line {line}: {str(value)[:40]!r} is no object with named values.")
        yield Row(line, value)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises ValueError if it gives a name two values: one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has two values called {name!r}")
    return found


class _JsonValues:
    """Values of a file that follow one another, or stand in one array, decoded as they are read."""

    def __init__(self, file: TextIO, name: str) -> None:
        self.file, self.name = file, name
        self.decoder = json.JSONDecoder(
            parse_float=WrittenFloat.of, parse_int=_integer, parse_constant=WrittenFloat.of,
            object_pairs_hook=_once_each,
        )  # fmt: skip
        self.buffer, self.position, self.line = "", 0, 1
        self.between = " \t\r\n"

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        if self._next_sign() == "[":
            self._pass(1)
            self.between += ","
        while sign := self._next_sign():
            if sign == "]" and "," in self.between:
                self._pass(1)
                self.between = self.between.replace(",", "")
                continue
            line = self.line
            value, end = self._decode()
            self._pass(end - self.position)
            yield line, value
        if "," in self.between:
            raise self._bad_json(self.line, "the file ends within its list")

    def _pass(self, n: int) -> None:
        self.line += self.buffer.count("\n", self.position, self.position + n)
        self.position += n

    def _next_sign(self) -> str:
        """Return the first sign of the next value; an empty text at the end of the file."""
        while True:
            while self.position < len(self.buffer):
                sign = self.buffer[self.position]
                if sign not in self.between:
                    return sign
                self._pass(1)
            if not self._read_more():
                return ""

    def _read_more(self) -> bool:
        more = self.file.read(max(_READ_CHARACTERS, len(self.buffer) - self.position))
        self.buffer, self.position = self.buffer[self.position :] + more, 0
        return bool(more)

    def _decode(self) -> tuple[Any, int]:
        while True:
            try:
                return self.decoder.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos >= len(self.buffer) - _CUT_CHARACTERS
                if not (is_cut and self._read_more()):
                    line = self.line + self.buffer.count("\n", self.position, error.pos)
                    raise self._bad_json(line, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self._bad_json(self.line, first_line(error)) from error

    def _bad_json(self, line: int, why: str) -> UserError:
        return UserError(f"corpus.files: {self.name}, line {line}, cannot be read as JSON: {why}.")
