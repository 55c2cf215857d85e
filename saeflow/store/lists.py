"""Lists of parts, one Parquet file a generation: written whole, opened without reading what is not asked for.

Opening a list reads all of its records but their files, from the column `about`. A part's files are read out of
`record` once somebody asks for them. A list of an earlier saeflow has no `about`: its records are read whole.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter
from pydantic_core import from_json, to_json

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

_FOLDER = r"\A[0-9]{6,}-[0-9a-f]{8}\z"  # what parts are called


@dataclass
class _About:
    format_version: int
    index: int
    counts: dict[str, int]
    inputs: dict[str, str]


@dataclass
class _Files:
    files: list[FileRecord]


_ABOUT, _FILES, _WHOLE = TypeAdapter(_About), TypeAdapter(_Files), TypeAdapter(PartRecord)
_NOT_A_LIST = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)  # of a table that is none


class ListedPart(PartRecord):
    """A part as a list names it. Its files are read when they are asked for, each time: there are millions of them."""

    @classmethod
    def of_row(cls, about: _About, folder: str, n_bytes: int, records: _Records, row: int) -> ListedPart:
        part: ListedPart = object.__new__(cls)
        part.__dict__.update(vars(about), folder=folder, _n_bytes=n_bytes, _records=records, _row=row)
        return part

    @property
    def files(self) -> list[FileRecord]:  # type: ignore[override]
        """Raises Damaged if the list names files that no part has."""
        records: _Records = self.__dict__["_records"]
        return records.files(self.__dict__["_row"])

    @property
    def names_and_sizes(self) -> tuple[tuple[str, ...], list[int]]:
        """As of `files`, without an object for each."""
        records: _Records = self.__dict__["_records"]
        return records.names_and_sizes(self.__dict__["_row"])

    @property
    def n_bytes(self) -> int:
        return int(self.__dict__["_n_bytes"])

    @property
    def record(self) -> str:
        """The whole record, as JSON."""
        records: _Records = self.__dict__["_records"]
        return records.text(self.__dict__["_row"])


def with_files(part: PartRecord) -> PartRecord:
    """Return a part that holds its files, for who needs them more than once; as it is if they can't be read."""
    try:
        held = PartRecord(part.index, part.counts, part.files, part.inputs, part.format_version)
    except Damaged:
        return part
    held.__dict__["folder"] = part.folder
    return held


class _Records:
    """The whole records of a list, in JSON, which are unpacked once a record is asked for."""

    def __init__(self, path: Path, file: pq.ParquetFile) -> None:
        self._path, self._file, self._lock = path, file, threading.Lock()

    @cached_property
    def _texts(self) -> np.ndarray:
        return np.asarray(self._file.read(columns=["record"]).column(0).to_numpy())

    def text(self, row: int) -> str:
        with self._lock:
            texts = self._texts
        return str(texts[row])

    def files(self, row: int) -> list[FileRecord]:
        try:
            return _FILES.validate_json(self.text(row)).files
        except _NOT_A_LIST as error:
            raise damaged(self._path, error) from error

    def names_and_sizes(self, row: int) -> tuple[tuple[str, ...], list[int]]:
        try:
            files = from_json(self.text(row))["files"]
            names, sizes = tuple([file["name"] for file in files]), [file["n_bytes"] for file in files]
        except _NOT_A_LIST as error:
            raise damaged(self._path, error) from error
        if _stay_inside(names) and all(type(size) is int and size >= 0 for size in sizes):
            return names, sizes
        raise damaged(self._path, ValueError("a file's name or size is none"))


@lru_cache(maxsize=1 << 12)
def _stay_inside(names: tuple[str, ...]) -> bool:
    return all(isinstance(name, str) and re.match(INSIDE, name) for name in names)


def generation_table(generation: Generation, with_about: bool = True) -> pa.Table:
    """Return the table of a generation: one row a part. Lists of an earlier saeflow are `with_about` False."""
    parts = generation.parts
    document = pa.struct([("document_id", pa.int64()), ("key_hash", pa.string()), ("reason", pa.string())])
    with no_collection():
        hidden = [[each.model_dump() for each in generation.hidden.get(part.index, ())] for part in parts]
        about = {"about": pa.array([to_json(part.about).decode() for part in parts], pa.string())} if with_about else {}
        return pa.table({
            "part_index": [part.index for part in parts],
            "folder": [part.folder for part in parts],
            "n_bytes": pa.array([part.n_bytes for part in parts], pa.int64()),
            **about,
            "record": [_record_of(part) for part in parts],
            "hidden": pa.array(hidden, pa.list_(document)),
        })  # fmt: skip


def _record_of(part: PartRecord) -> str:
    return part.record if isinstance(part, ListedPart) else to_json(part.as_json).decode()


def read_generation(path: Path, number: int) -> Generation:
    """A generation from its table. Raises Damaged."""
    try:
        file = pq.ParquetFile(pa.BufferReader(read_bytes(path)))
        with no_collection():
            parts = tuple((_opened_parts if "about" in file.schema_arrow.names else _whole_parts)(path, file))
        return Generation(number, parts, dict(_hidden(file, parts)))
    except _NOT_A_LIST as error:
        raise damaged(path, error) from error


def _opened_parts(path: Path, file: pq.ParquetFile) -> Iterator[PartRecord]:
    table, records = file.read(columns=["folder", "n_bytes", "about"]), _Records(path, file)
    abouts = map(_ABOUT.validate_json, table.column("about").to_numpy())
    for row, (about, folder, n_bytes) in enumerate(
        zip(abouts, _folders(table), table.column("n_bytes").to_pylist(), strict=True)
    ):
        yield ListedPart.of_row(about, folder, n_bytes, records, row)


def _whole_parts(path: Path, file: pq.ParquetFile) -> Iterator[PartRecord]:
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
            table = pq.read_table(file)
        if "hidden" not in table.column_names:  # format 1
            return []
        hidden = [Hidden(**each) for each in pc.list_flatten(table.column("hidden")).to_pylist()]
        return [each.key_hash for each in hidden if each.reason == "forgotten"]
    except _NOT_A_LIST as error:
        raise damaged(path, error) from error


def _folders(table: pa.Table) -> np.ndarray:
    """Raises ValueError where one is no name of a part: it could lead anywhere."""
    column = table.column("folder")
    if not pc.all(pc.fill_null(pc.match_substring_regex(column, _FOLDER), False), min_count=0).as_py():
        raise ValueError("a folder is not called as parts are")
    return np.asarray(column.to_numpy())
