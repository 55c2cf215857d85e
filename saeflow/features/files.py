"""The files of a part of a run: how values are written to them and read again."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.activations.sparse_values import SparseValues, concatenated, no_values, split_rows
from saeflow.features.schema import VALUES, ends_in_name
from saeflow.sae.exact import FeatureMajor
from saeflow.store.artefact import Artefact
from saeflow.store.files import ROW_GROUP
from saeflow.store.records import PartRecord

FILE_VALUES = 4_000_000
"""Values in one file of the order by feature, about. DuckDB takes 8 microseconds to pass over each group of rows that a
question does not need, so smaller files answer sooner; but each file that a statement names costs it 30."""


def write_token_major(folder: Path, token_ids: np.ndarray, sparse: SparseValues) -> None:
    """Write the values of these tokens (ascending), sorted by token, then feature."""
    ends = (int(token_ids[0]), int(token_ids[-1])) if len(token_ids) else (0, 0)
    write_values(folder, "token_major", ends, _by_token(token_ids, sparse))


def _by_token(token_ids: np.ndarray, sparse: SparseValues) -> dict[str, np.ndarray]:
    owners = np.repeat(token_ids, np.diff(sparse.row_starts))
    return {"token_id": owners, "feature_id": sparse.feature_ids, "value": sparse.values}


def write_feature_major(folder: Path, token_ids: np.ndarray, entries: FeatureMajor) -> None:
    """Write the values of all features, sorted by feature, then token; row i is that of token_ids[i]."""
    starts, columns = entries.feature_starts, by_feature(token_ids, entries)
    for low, high in feature_buckets(np.diff(starts), FILE_VALUES):
        at = slice(starts[low], starts[high + 1])
        write_values(folder, "feature_major", (low, high), {name: column[at] for name, column in columns.items()})


def feature_buckets(n_tokens: np.ndarray, wanted: int) -> list[tuple[int, int]]:
    """Cut all features into ranges, both ends included, of about `wanted` values each.

    `n_tokens` (F,) is the number of values of each feature. All ranges have about as many values, where no feature has
    more than a range's share.
    """
    ends = np.cumsum(n_tokens)
    total = int(ends[-1]) if len(ends) else 0
    n = max(1, round(total / wanted))
    cuts = np.unique(np.searchsorted(ends, np.arange(1, n) * total / n)) + 1 if n > 1 else np.empty(0, np.int64)
    edges = np.unique(np.r_[0, cuts, len(n_tokens)])
    return [(int(a), int(b) - 1) for a, b in itertools.pairwise(edges)]


def by_feature(token_ids: np.ndarray, entries: FeatureMajor) -> dict[str, np.ndarray]:
    """Return the columns of values in the order by feature; row i is that of token_ids[i]."""
    ids = np.repeat(np.arange(len(entries.feature_starts) - 1, dtype=np.int32), np.diff(entries.feature_starts))
    return {"feature_id": ids, "token_id": token_ids[entries.rows], "value": entries.values}


def write_values(folder: Path, order: str, ends: tuple[int, int], columns: Mapping[str, np.ndarray]) -> None:
    """Write one more file of an order; `ends` are the first and last feature, or token, that it may hold."""
    write_table(_next_file(folder, order, ends), pa.table(dict(columns), VALUES[order]))


def _next_file(folder: Path, order: str, ends: tuple[int, int]) -> Path:
    place = folder / order / f"low={ends[0]}" / f"high={ends[1]}"
    return place / f"{len(list(place.glob('*.parquet'))):03d}.parquet"


class ValuePieces:
    """Gathers the values of consecutive tokens into pieces of `n_values`, up to the end of a token.

    The pieces do not depend on how the values come.
    """

    def __init__(self, n_values: int) -> None:
        self.n_values = n_values
        self._held: list[tuple[np.ndarray, SparseValues]] = []
        self._n_held = 0

    def add(self, token_ids: np.ndarray, sparse: SparseValues) -> Iterator[tuple[np.ndarray, SparseValues]]:
        """Add values, and yield the pieces that are full."""
        while self._n_held + len(sparse.values) >= self.n_values:
            n_rows = int(np.searchsorted(sparse.row_starts[1:], self.n_values - self._n_held)) + 1
            head, sparse = split_rows(sparse, n_rows)
            self._hold(token_ids[:n_rows], head)
            yield self.rest()
            token_ids = token_ids[n_rows:]
        self._hold(token_ids, sparse)

    def _hold(self, token_ids: np.ndarray, sparse: SparseValues) -> None:
        if len(token_ids):
            self._held.append((token_ids, sparse))
            self._n_held += len(sparse.values)

    def __bool__(self) -> bool:
        """True if it holds tokens."""
        return bool(self._held)

    def rest(self) -> tuple[np.ndarray, SparseValues]:
        """Return what it holds, perhaps nothing, and hold it no longer."""
        ids, values = zip(*(self._held or [(np.empty(0, np.int64), no_values())]), strict=True)
        self._held, self._n_held = [], 0
        return np.concatenate(ids), concatenated(values)


class TokenMajorWriter:
    """Writes values in the order of tokens, piece by piece, into files of at least `file_values` each."""

    def __init__(self, folder: Path, file_values: int) -> None:
        self.folder, self.file_values = folder, file_values
        self._writer: pq.ParquetWriter | None = None
        self._n_values, self._ends = 0, (0, 0)

    def append(self, token_ids: np.ndarray, sparse: SparseValues) -> None:
        if not len(token_ids):
            return
        if self._writer is None:
            schema = VALUES["token_major"]
            self._writer = pq.ParquetWriter(self.folder / _UNNAMED, schema, **column_encodings(schema))
            self._n_values, self._ends = 0, (int(token_ids[0]), 0)
        table = pa.table(_by_token(token_ids, sparse), VALUES["token_major"])
        self._writer.write_table(table, row_group_size=ROW_GROUP)
        self._n_values += len(table)
        self._ends = self._ends[0], int(token_ids[-1])
        if self._n_values >= self.file_values:
            self.close()

    def finish(self) -> None:
        """Close the last file. An order without values has one file, which is empty."""
        self.close()
        if not (self.folder / "token_major").exists():
            write_token_major(self.folder, np.empty(0, np.int64), no_values())

    def close(self) -> None:
        """Close the file and give it its name, which says what it holds."""
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        path = _next_file(self.folder, "token_major", self._ends)
        path.parent.mkdir(parents=True)
        (self.folder / _UNNAMED).rename(path)


_UNNAMED = "token_major.unnamed"


_ROW_GROUPS = dict.fromkeys(("feature_histogram", "feature_positions"), 1 << 13)
"""Rows of a group in tables of which a question reads a few: it decodes a group of each part, 3 ms for 120,000 rows.
Such groups cost 5% of the bytes of these two tables, and half of those of pairs, where they save nothing."""


def write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=_ROW_GROUPS.get(path.stem, ROW_GROUP), **column_encodings(table.schema))


_PAGE_BYTES = 1 << 15
"""Bytes of a page: 8,192 values. A question unpacks the pages of the rows it needs, and passes over the others. Pages
of 1 MiB take 1% fewer bytes, and a tenth more time for a feature of 13 parts."""


def column_encodings(schema: pa.Schema) -> dict[str, object]:
    """Return how columns are packed: see the figures in the README, section on bytes."""
    split = dict.fromkeys(("value", "cosine", "logit"), "BYTE_STREAM_SPLIT")
    plain = {"token_id": "DELTA_BINARY_PACKED"} | split
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": [name for name in schema.names if name not in plain],
        "data_page_size": _PAGE_BYTES,
        "column_encoding": {name: encoding for name, encoding in plain.items() if name in schema.names},
    }


def files_of(part: PartRecord, order: str, first: int = 0, last: int = sys.maxsize) -> list[str]:
    """Return a part's files of one order that may hold values of features, or tokens, first..last; sorted by these."""
    names = (file.name for file in part.files)
    mine = [name for name in names if re.match(rf"{order}[./]", name) and name.endswith(".parquet")]
    found = [(ends_in_name(name) or (0, sys.maxsize), name) for name in mine]
    return [name for (low, high), name in sorted(found) if low <= last and high >= first]


def read_tokens(target: Artefact, part: PartRecord, first: int, last: int) -> tuple[np.ndarray, SparseValues]:
    """Return the token_ids (n,) of tokens first..last of a part that have values, and their values."""
    wanted = [("token_id", ">=", first), ("token_id", "<=", last)]
    tables = [
        pq.read_table(target.part_file(part, name), filters=wanted, partitioning=None)
        for name in files_of(part, "token_major", first, last)
    ]
    table = pa.concat_tables(tables) if tables else VALUES["token_major"].empty_table()
    owners = table.column("token_id").to_numpy()
    begins = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]]) if len(owners) else np.empty(0, np.int64)
    starts = np.r_[begins, len(owners)].astype(np.int64)
    ids, values = (table.column(name).to_numpy() for name in ("feature_id", "value"))
    return owners[begins], SparseValues(starts, ids, values)
