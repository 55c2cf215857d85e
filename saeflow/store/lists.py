"""Lists of parts, one Parquet file a generation: written whole, opened without reading what is not asked for.

Opening a list reads the indices, folders and sizes of its parts. Each further column is read once somebody asks for it:
counts, inputs, names and sizes of files. A part's whole record, in JSON, is unpacked for the checksums of its files.
A list of an earlier saeflow has no such columns: its records are read whole.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from pydantic import TypeAdapter
from pydantic_core import to_json

from saeflow.store.links import open_unlinked, read_bytes
from saeflow.store.records import (
    INSIDE,
    Damaged,
    FileRecord,
    Generation,
    Hidden,
    PartRecord,
    damaged,
    no_collection,
)

Layout = Literal["columns", "about", "record"]
"""What a list has beside whole records: columns. Those of earlier saeflows have JSON without files, or nothing."""

_FOLDER = r"\A[0-9]{6,}-[0-9a-f]{8}\z"  # what parts are called
_NOT_A_LIST = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)  # of a table that is none


_AT_FIRST = ["part_index", "folder", "n_bytes", "format_version"]
_required = partial(pa.field, nullable=False)
_SCHEMA = pa.schema(
    [
        _required("part_index", pa.int64()),
        _required("folder", pa.string()),
        _required("n_bytes", pa.int64()),
        _required("format_version", pa.int64()),
        _required("counts", pa.map_(pa.string(), _required("value", pa.int64()))),
        _required("inputs", pa.map_(pa.string(), _required("value", pa.string()))),
        _required("names", pa.list_(_required("element", pa.string()))),
        _required("sizes", pa.list_(_required("element", pa.int64()))),
        _required("sum", pa.uint64()),
        _required("record", pa.string()),
    ]
)
_HIDING = pa.list_(pa.struct([("document_id", pa.int64()), ("key_hash", pa.string()), ("reason", pa.string())]))


@dataclass
class _Files:
    files: list[FileRecord]


_FILES, _WHOLE = TypeAdapter(_Files), TypeAdapter(PartRecord)


@dataclass(frozen=True)
class FileColumns:
    """Names and sizes of the files of many parts. Files `first[row]` to `first[row + 1]` are those of a row."""

    first: np.ndarray
    letters: np.ndarray
    """The names of all files in UTF-8, end to end. Nobody has looked whether they stay inside of the part's folder."""
    starts: np.ndarray
    """Where each name begins in `letters`, and where the last one ends."""
    sizes: np.ndarray

    @classmethod
    def of(cls, names: pa.ListArray, sizes: pa.ListArray) -> FileColumns:
        """Raises ValueError if a part has not as many names as sizes."""
        if not names.offsets.equals(sizes.offsets):
            raise ValueError("names and sizes are of different files")
        return cls(names.offsets.to_numpy(), *text_letters(names.values), sizes.values.to_numpy())

    @classmethod
    def of_parts(cls, parts: Sequence[PartRecord]) -> FileColumns:
        """Raises Damaged if a part has files that are none."""
        pairs = [part.names_and_sizes for part in parts]
        names, sizes = _SCHEMA.field("names").type, _SCHEMA.field("sizes").type
        return cls.of(pa.array([each for each, _ in pairs], names), pa.array([each for _, each in pairs], sizes))


def text_letters(texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """Return all texts end to end in UTF-8, and where each begins and the last one ends."""
    _, starts, letters = texts.buffers()
    return np.frombuffer(letters or b"", np.uint8), np.frombuffer(starts or bytes(4), np.int32)


class OpenList:
    """A list, each of whose columns is read once somebody asks for it."""

    def __init__(self, path: Path, file: pq.ParquetFile) -> None:
        self._path, self._file, self._lock = path, file, threading.Lock()
        self._columns: dict[str, Any] = {}
        opened = file.read(columns=_AT_FIRST)
        self.folders: list[str] = _folders(opened).tolist()
        self.indices: list[int] = opened.column("part_index").to_pylist()
        self.n_bytes: list[int] = opened.column("n_bytes").to_pylist()
        self.format_versions: list[int] = opened.column("format_version").to_pylist()

    def rows(self, rows: list[int]) -> pa.Table:
        """Return some rows, at least one, but not what is hidden in them. Raises Damaged."""
        table = pa.table([self._column(name) for name in _SCHEMA.names], schema=_SCHEMA)
        first = rows[0]
        are_neighbours = rows == list(range(first, first + len(rows)))
        return table.slice(first, len(rows)) if are_neighbours else table.take(np.asarray(rows, np.int64))

    def _column(self, name: str) -> Any:
        """Raises Damaged."""
        with self._lock:
            if name not in self._columns:
                try:
                    self._columns[name] = self._file.read(columns=[name]).column(0).combine_chunks()
                except _NOT_A_LIST as error:
                    raise damaged(self._path, error) from error
            return self._columns[name]

    @cached_property
    def counts(self) -> _Maps:
        return _Maps(self._column("counts"))

    @cached_property
    def inputs(self) -> _Maps:
        return _Maps(self._column("inputs"))

    @cached_property
    def file_columns(self) -> FileColumns:
        """Raises Damaged."""
        try:
            return FileColumns.of(self._column("names"), self._column("sizes"))
        except ValueError as error:
            raise damaged(self._path, error) from error

    def says(self, row: int, content: bytes | memoryview) -> bool:
        """True if this is the content of a part's record, and the list has what was written into it about the part."""
        return bool(_xxh3(content, self._column("record")[row].as_buffer()) == self._column("sum")[row].as_py())

    def record(self, row: int) -> str:
        return str(self._column("record")[row])

    def files(self, row: int) -> list[FileRecord]:
        try:
            return _FILES.validate_json(self.record(row)).files
        except ValueError as error:
            raise damaged(self._path, error) from error

    def names_and_sizes(self, row: int) -> tuple[tuple[str, ...], list[int]]:
        names, sizes = (self._column(name)[row].as_py() for name in ("names", "sizes"))
        if len(names) == len(sizes) and _stay_inside(tuple(names)) and all(size >= 0 for size in sizes):
            return tuple(names), sizes
        raise damaged(self._path, ValueError("a file's name or size is none"))


class _Maps:
    """A column of maps, whose rows are made as they are asked for."""

    def __init__(self, column: pa.MapArray) -> None:
        self._column, self._of_key = column, dict[str, list[Any]]()
        keys = column.keys.dictionary_encode()
        names = keys.dictionary.to_pylist()
        self._first = column.offsets.to_pylist()
        self._keys = [names[each] for each in keys.indices.to_pylist()]  # few names: one object for each
        self._values = column.items.to_pylist()

    def __getitem__(self, row: int) -> dict[str, Any]:
        span = slice(self._first[row], self._first[row + 1])
        return dict(zip(self._keys[span], self._values[span], strict=True))

    def of_key(self, key: str, default: Any) -> list[Any]:
        """Return the value of one key in each row."""
        if key not in self._of_key:
            places = np.flatnonzero(pc.equal(self._column.keys, key))
            found = [default] * (len(self._first) - 1)
            for row, place in zip(np.searchsorted(self._first, places, "right") - 1, places, strict=True):
                found[row] = self._values[place]
            self._of_key[key] = found
        return self._of_key[key]


@lru_cache(maxsize=1 << 12)
def _stay_inside(names: tuple[str, ...]) -> bool:
    return all(re.match(INSIDE, name) for name in names)


def _xxh3(content: bytes | memoryview, record: Any) -> int:
    digest = xxhash.xxh3_64(content)
    digest.update(record)
    return digest.intdigest()


class ListedPart(PartRecord):
    """A part as a list names it. What the list says is read when it is asked for: there are millions of files.

    Whatever is asked for raises Damaged if the list says something else there than a part's record can.
    """

    source: OpenList
    row: int

    @classmethod
    def of_row(cls, source: OpenList, row: int) -> ListedPart:
        part: ListedPart = object.__new__(cls)
        object.__setattr__(part, "source", source)
        object.__setattr__(part, "row", row)
        return part

    @property
    def index(self) -> int:  # type: ignore[override]
        return self.source.indices[self.row]

    @property
    def folder(self) -> str:  # type: ignore[override]
        return self.source.folders[self.row]

    @property
    def n_bytes(self) -> int:
        return self.source.n_bytes[self.row]

    @property
    def format_version(self) -> int:  # type: ignore[override]
        return self.source.format_versions[self.row]

    @cached_property
    def counts(self) -> dict[str, int]:  # type: ignore[override]
        return self.source.counts[self.row]

    def count(self, name: str) -> int:
        return int(self.source.counts.of_key(name, 0)[self.row])

    @property
    def inputs(self) -> dict[str, str]:  # type: ignore[override]
        return self.source.inputs[self.row]

    @property
    def files(self) -> list[FileRecord]:  # type: ignore[override]
        return self.source.files(self.row)

    @property
    def names_and_sizes(self) -> tuple[tuple[str, ...], list[int]]:
        return self.source.names_and_sizes(self.row)

    def is_written_as(self, content: bytes | memoryview) -> bool:
        return self.source.says(self.row, content)


def by_list(parts: Sequence[PartRecord]) -> Iterator[tuple[OpenList | None, list[int], list[int]]]:
    """Yield each open list that names some of these parts, with their places here and their rows there.

    For other parts, the list is None, and the rows are counted from 0.
    """
    found: dict[OpenList | None, tuple[list[int], list[int]]] = {None: ([], [])}
    others = found[None][1]
    for place, part in enumerate(parts):
        source, row = (part.source, part.row) if isinstance(part, ListedPart) else (None, len(others))
        places, rows = found.setdefault(source, ([], []))
        places.append(place)
        rows.append(row)
    yield from ((source, places, rows) for source, (places, rows) in found.items() if places)


def with_files(part: PartRecord) -> PartRecord:
    """Return a part that holds its files, for who needs them more than once; as it is if they can't be read."""
    try:
        held = PartRecord(part.index, part.counts, part.files, part.inputs, part.format_version)
    except Damaged:
        return part
    held.__dict__["folder"] = part.folder
    return held


def generation_table(generation: Generation, layout: Layout = "columns") -> pa.Table:
    """Return the table of a generation: one row a part."""
    parts = generation.parts
    with no_collection():
        table = _table_of_parts(parts) if layout == "columns" else _records_of(parts, layout)
        hidden = [[each.model_dump() for each in generation.hidden.get(part.index, ())] for part in parts]
        return table.append_column("hidden", pa.array(hidden, _HIDING))


def _table_of_parts(parts: Sequence[PartRecord]) -> pa.Table:
    """Rows of lists that are open already are taken as they are."""
    tables, places = list[pa.Table](), list[int]()
    for source, found, rows in by_list(parts):
        tables.append(source.rows(rows) if source else _new_rows([parts[place] for place in found]))
        places += found
    table = pa.concat_tables(tables) if tables else _SCHEMA.empty_table()
    return (table if places == sorted(places) else table.take(np.argsort(places))).cast(_SCHEMA).combine_chunks()


def _new_rows(parts: Sequence[PartRecord]) -> pa.Table:
    records = list(map(_record_of, parts))
    files = [part.names_and_sizes for part in parts]
    return pa.table({
        "part_index": [part.index for part in parts],
        "folder": [part.folder for part in parts],
        "n_bytes": [part.n_bytes for part in parts],
        "format_version": [part.format_version for part in parts],
        "counts": [list(part.counts.items()) for part in parts],
        "inputs": [list(part.inputs.items()) for part in parts],
        "names": [names for names, _ in files],
        "sizes": [sizes for _, sizes in files],
        "sum": [_xxh3(part.text.encode(), record.encode()) for part, record in zip(parts, records, strict=True)],
        "record": records,
    }, schema=_SCHEMA)  # fmt: skip


def _records_of(parts: Sequence[PartRecord], layout: Layout) -> pa.Table:
    about = {"about": pa.array([to_json(part.about).decode() for part in parts], pa.string())}
    return pa.table({
        "part_index": [part.index for part in parts],
        "folder": [part.folder for part in parts],
        "n_bytes": pa.array([part.n_bytes for part in parts], pa.int64()),
        **(about if layout == "about" else {}),
        "record": list(map(_record_of, parts)),
    })  # fmt: skip


def _record_of(part: PartRecord) -> str:
    return to_json(part.as_json).decode()


def read_generation(path: Path, number: int) -> Generation:
    """A generation from its table. Raises Damaged."""
    try:
        file = pq.ParquetFile(pa.BufferReader(read_bytes(path)))
        with no_collection():
            parts = tuple(_parts_of_columns(path, file) if "sum" in file.schema_arrow.names else _whole_parts(file))
        return Generation(number, parts, dict(_hidden(file, parts)))
    except _NOT_A_LIST as error:
        raise damaged(path, error) from error


def _parts_of_columns(path: Path, file: pq.ParquetFile) -> Iterator[PartRecord]:
    """Raises ValueError if a column has another type, which nobody would notice before it is asked for."""
    if pa.schema(list(file.schema_arrow)[: len(_SCHEMA)]) != _SCHEMA:
        raise ValueError("the columns of the list are others")
    opened = OpenList(path, file)
    return (ListedPart.of_row(opened, row) for row in range(len(opened.indices)))


def _whole_parts(file: pq.ParquetFile) -> Iterator[PartRecord]:
    table = file.read(columns=["folder", "record"])
    parts = map(_WHOLE.validate_json, table.column("record").to_numpy())
    for part, folder in zip(parts, _folders(table), strict=True):
        part.__dict__["folder"] = folder  # known: it need not be computed
        yield part


def _hidden(file: pq.ParquetFile, parts: Sequence[PartRecord]) -> Iterator[tuple[int, tuple[Hidden, ...]]]:
    if "hidden" in file.schema_arrow.names:
        column = file.read(columns=["hidden"]).column("hidden")
        for row in np.flatnonzero(pc.fill_null(pc.list_value_length(column), 0)).tolist():
            yield parts[row].index, tuple(Hidden(**each) for each in column[row].as_py())


def read_part_folders(path: Path) -> list[str]:
    """Folders of the parts in a list, without their records. Raises Damaged."""
    try:
        with open_unlinked(path) as file:
            return list(_folders(pq.read_table(file, columns=["folder"])))
    except _NOT_A_LIST as error:
        raise damaged(path, error) from error


def read_forgotten_keys(path: Path) -> list[str]:
    """Return the hashes of the keys that a list of parts hides for good. Raises Damaged."""
    try:
        with open_unlinked(path) as file:
            if "hidden" not in pq.read_schema(file).names:  # format 1
                return []
            column = pq.read_table(file, columns=["hidden"]).column("hidden")
        hidden = [Hidden(**each) for each in pc.list_flatten(column).to_pylist()]
        return [each.key_hash for each in hidden if each.reason == "forgotten"]
    except _NOT_A_LIST as error:
        raise damaged(path, error) from error


def _folders(table: pa.Table) -> np.ndarray:
    """Raises ValueError where one is no name of a part: it could lead anywhere."""
    column = table.column("folder")
    if not pc.all(pc.fill_null(pc.match_substring_regex(column, _FOLDER), False), min_count=0).as_py():
        raise ValueError("a folder is not called as parts are")
    return np.asarray(column.to_numpy())
