"""Rows of documents sorted by their keys in bounded memory.

DuckDB needs more memory to sort rows with long texts than the texts take (measured: 1.6 GB of texts of 100 kB fail at a
limit of 4 GB). So the contents wait in a scratch file while DuckDB sorts the other columns.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import duckdb
import pyarrow as pa
from duckdb import ColumnExpression, DuckDBPyConnection, DuckDBPyRelation

from saeflow.corpus.document import in_share
from saeflow.runtime.memory import total_memory
from saeflow.runtime.temporary import temporary_folder

KEY, FILE, CONTENT, SOURCE = "_saeflow_key", "_saeflow_file", "_saeflow_content", "_saeflow_source"
"""Columns that every reader gives: KEY and SOURCE only if the corpus has them, FILE only if it is made of files."""
BATCH_DOCUMENTS = 512
LEAST_MEMORY = 1 << 30
"""Least memory that DuckDB gets; on a large machine it gets a quarter. The rest goes to the scratch folder."""
_NAME_COLUMN = "_saeflow_name"
_CONTENT_PLACE = ("_saeflow_hash", "_saeflow_offset", "_saeflow_bytes")


class Scratch(NamedTuple):
    """A temporary folder, and the memory that DuckDB may use before it writes there."""

    folder: Path
    memory_bytes: int

    @classmethod
    def opened(cls, stack: ExitStack, memory_bytes: int | None) -> Scratch:
        folder = stack.enter_context(temporary_folder("saeflow-corpus-"))
        return cls(folder, memory_bytes or max(LEAST_MEMORY, total_memory() // 4))

    def connect(self, name: str, **settings: str) -> DuckDBPyConnection:
        """Connect with one thread: the rows keep their order, and long texts take half the memory."""
        about: dict[str, Any] = {"memory_limit": f"{self.memory_bytes}B", "threads": "1"}
        return duckdb.connect(config=about | {"temp_directory": str(self.folder / name)} | settings)


class _Row(NamedTuple):
    """A document: the number of its batch, the batch without contents, its place there, and its own content."""

    n_batch: int
    rest: pa.RecordBatch
    place: int
    content: bytes


class SortedRows:
    """Rows that are taken in batch by batch, and given back in the order of their keys."""

    def __init__(self, scratch: Scratch, names: dict[str, str], share: float, stack: ExitStack) -> None:
        self.names, self.share = names, share
        self.contents: IO[bytes] = stack.enter_context((scratch.folder / "contents").open("wb+"))
        self.connection = stack.enter_context(scratch.connect("sort"))
        self.rows: DuckDBPyRelation | None = None

    def take(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Take rows in. Those outside `share` are dropped."""
        rows = (
            _Row(n_batch, rest, place, content)
            for n_batch, batch in enumerate(batches)
            for rest in [batch.drop_columns([CONTENT])]
            for place, content in enumerate(contents_of(batch.column(CONTENT)))
        )
        chosen = in_share(rows, lambda row: document_key(row.rest, row.place, self.names, row.content), self.share)
        for _, some in groupby(chosen, key=lambda row: row.n_batch):
            table = self.connection.from_arrow(pa.table(self._set_contents_aside(some)))
            if self.rows is None:
                table.create("narrow")
                self.rows = self.connection.table("narrow")
            else:
                table.insert_into("narrow")

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows by key, or by the names of files and contents if no row has a key."""
        if self.rows is None:
            return
        has_keys = KEY in self.rows.columns and self.rows.count(KEY).fetchall() != [(0,)]
        by = [KEY, _CONTENT_PLACE[0], FILE] if has_keys else [_NAME_COLUMN, _CONTENT_PLACE[0], FILE]
        self.contents.flush()
        chosen = [ColumnExpression(name) for name in by if name in self.rows.columns]
        for batch in self.rows.sort(*chosen).to_arrow_reader(BATCH_DOCUMENTS):
            yield batch.append_column(CONTENT, self._read_contents(batch))

    def _set_contents_aside(self, rows: Iterable[_Row]) -> dict[str, pa.Array]:
        """Write the contents to the file. Return the other columns, with each content's sha256, offset and size."""
        written, kept = [], []
        for row in rows:
            rest = row.rest
            kept.append(row.place)
            written.append((hashlib.sha256(row.content).hexdigest(), self.contents.tell(), len(row.content)))
            self.contents.write(row.content)
        rest = rest.take(pa.array(kept, pa.int64()))
        kinds = (pa.string(), pa.int64(), pa.int64())
        named = dict(zip(rest.schema.names, rest.columns, strict=True))
        if FILE in named:
            named[_NAME_COLUMN] = pa.array([self.names[each] for each in named[FILE].to_pylist()], pa.string())
        columns = zip(*written, strict=True)
        return named | {name: pa.array(c, kind) for name, c, kind in zip(_CONTENT_PLACE, columns, kinds, strict=True)}

    def _read_contents(self, batch: pa.RecordBatch) -> pa.Array:
        places = zip(*(batch.column(name).to_pylist() for name in _CONTENT_PLACE[1:]), strict=True)
        file = self.contents.fileno()
        return pa.array([os.pread(file, n_bytes, offset) for offset, n_bytes in places], pa.large_binary())


def contents_of(column: pa.Array) -> Iterator[bytes]:
    """Yield each content as bytes: UTF-8, or vocabulary ids as little-endian int64, where -1 is a missing id."""
    if pa.types.is_large_binary(column.type):
        yield from (content or b"" for content in column.to_pylist())
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        yield from ((text.as_py() or "").encode() for text in column)
    else:
        for ids in column:
            yield ids.values.fill_null(-1).to_numpy().astype("<i8").tobytes() if ids.is_valid else b""


def document_key(batch: pa.RecordBatch, row: int, names: dict[str, str], content: bytes) -> str:
    key = batch.column(KEY)[row].as_py() if KEY in batch.schema.names else None
    if key is not None:
        return str(key)
    return f"{file_name(batch, row, names)}#{hashlib.sha256(content).hexdigest()[:32]}"


def file_name(batch: pa.RecordBatch, row: int, names: dict[str, str]) -> str:
    if FILE not in batch.schema.names:
        return "query"
    return names[str(batch.column(FILE)[row].as_py())]
