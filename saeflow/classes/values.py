"""The values of a run read feature by feature, in blocks of features that fit in memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from saeflow.classes.membership import Membership
from saeflow.classes.ranking import place_values
from saeflow.features.files import files_of
from saeflow.query.runs import Run

BLOCK_VALUES = 8_000_000
"""Values of a block: about 26 bytes each while they are read."""

VALUE_COLUMNS = ["feature_id", "token_id", "value"]


@dataclass(frozen=True)
class FeatureEntries:
    """The values of consecutive features at counted tokens: feature `first + f` has entries starts[f] to ends[f]."""

    first: int
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    values: NDArray[np.float32]
    codes: NDArray[np.unsignedinteger]
    documents: NDArray[np.int32]

    def of(self, feature: int) -> FeatureEntries:
        """Return a copy of one feature's entries."""
        rows = slice(self.starts[feature - self.first], self.ends[feature - self.first])
        n = np.array([rows.stop - rows.start])
        values, codes, documents = self.values[rows].copy(), self.codes[rows].copy(), self.documents[rows].copy()
        return FeatureEntries(feature, np.zeros(1, np.int64), n, values, codes, documents)

    @property
    def n_bytes(self) -> int:
        return self.values.nbytes + self.codes.nbytes + self.documents.nbytes


@dataclass(frozen=True)
class ValueFiles:
    """The files of a run that are shown now, with all its values by feature, or those of its sample."""

    paths: tuple[Path, ...]
    n_features: int

    @classmethod
    def of(cls, run: Run, table: str = "feature_major") -> ValueFiles:
        """`table`: `feature_major` or `sample`."""
        artefact, shown = run.artefact, set(run.files[table])
        found = [
            artefact.part_file(part, name)
            for part in artefact.published().parts
            for name in files_of(part, table)
            if artefact.storage.location(artefact.part_path(part) / name) in shown
        ]
        return cls(tuple(found), int(artefact.fact("n_features")))

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """(groups, 5): file, row group, first and last feature, number of values."""
        rows = [row for number in range(len(self.paths)) for row in self._groups_of(number)]
        return np.array(rows, np.int64).reshape(-1, 5)

    @cached_property
    def _footers(self) -> tuple[pq.FileMetaData, ...]:
        return tuple(pq.read_metadata(path) for path in self.paths)

    def _groups_of(self, number: int) -> list[tuple[int, int, int, int, int]]:
        about, found = self._footers[number], []
        column = about.schema.names.index("feature_id")
        for group in range(about.num_row_groups):
            of_group = about.row_group(group)
            limits = of_group.column(column).statistics
            ends = (limits.min, limits.max) if limits and limits.has_min_max else (0, self.n_features - 1)
            if of_group.num_rows:
                found.append((number, group, *ends, of_group.num_rows))
        return found

    def blocks(self, block_values: int = BLOCK_VALUES, threads: int = 1) -> list[tuple[int, int]]:
        """Return first and last feature of blocks of about so many values, every feature in one of them.

        Blocks are somewhat smaller if that gives each thread as many.
        """
        _, _, low, high, n = self.groups.T
        n_blocks = -(-max(int(n.sum()), 1) // (block_values * threads)) * threads
        return cut_features(low, high, n, self.n_features, int(1.02 * n.sum() / n_blocks) + 1)

    def read(self, first: int, last: int, members: Membership, wanted: Sequence[int] | None = None) -> FeatureEntries:
        """Return the values of these features at counted tokens, each feature's in the order of its files.

        `wanted`: features whose values are needed, ascending; others may lack some or all.
        """
        some = np.array(range(first, last + 1) if wanted is None else wanted, np.int64)
        found_in = (self._table(number, first, last, some) for number in range(len(self.paths)))
        tables = [table for table in found_in if table is not None]
        counts = np.zeros(last - first + 1, np.int64)
        for features, _, _ in tables:
            counts += np.diff(np.searchsorted(features, np.arange(first, last + 2, dtype=np.int32)))
        starts = np.cumsum(counts) - counts
        ends, n = starts.copy(), int(counts.sum())
        found = FeatureEntries(
            first, starts, ends, np.empty(n, np.float32), np.empty(n, members.codes.dtype), np.empty(n, np.int32)
        )
        for features, tokens, values in tables:
            place_values(
                first, features, tokens, values, members.first_token, members.codes, members.documents, ends,
                found.values, found.codes, found.documents,
            )  # fmt: skip
        return found

    def _table(
        self, number: int, first: int, last: int, wanted: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.float32]] | None:
        """Return feature_ids, token_ids and values of the groups of one file that hold wanted features, if any do."""
        mine = self.groups[self.groups[:, 0] == number]
        holds = np.searchsorted(wanted, mine[:, 2]) < np.searchsorted(wanted, mine[:, 3], side="right")
        if not holds.any():
            return None
        with pq.ParquetFile(self.paths[number], metadata=self._footers[number]) as file:
            table = file.read_row_groups(mine[holds, 1].tolist(), columns=VALUE_COLUMNS, use_threads=False)
        # A sample may lie in stretches, each sorted by feature, one behind another by token.
        if (mine[1:, 2] < mine[:-1, 3]).any():
            table = table.take(np.argsort(_as_array(table.column("feature_id")), kind="stable"))
        columns = [_as_array(table.column(name)) for name in VALUE_COLUMNS]
        start, stop = np.searchsorted(columns[0], np.array([first, last + 1], np.int32))
        features, tokens, values = (column[start:stop] for column in columns)
        return features, tokens, values


def _as_array(column: pa.ChunkedArray) -> NDArray[Any]:
    return np.asarray(column.to_numpy() if column.num_chunks != 1 else column.chunk(0).to_numpy())


def cut_features(
    low: NDArray[np.int64], high: NDArray[np.int64], n: NDArray[np.int64], n_features: int, block_values: int
) -> list[tuple[int, int]]:
    """Cut 0..n_features into ranges (first, last) of about `block_values`, given how many values lie in which features.

    Values are taken as spread evenly over the features `low` to `high`. A feature with more values is a block alone.
    """
    change = np.zeros(n_features + 1)
    share = n / (high - low + 1)
    np.add.at(change, low, share)
    np.add.at(change, high + 1, -share)
    before = np.concatenate([[0.0], np.cumsum(np.cumsum(change[:-1]))])
    firsts = [0]
    while (first := firsts[-1]) < n_features:
        last = int(np.searchsorted(before, before[first] + block_values, side="right")) - 1
        firsts.append(max(first + 1, min(last, n_features)))
    return [(a, b - 1) for a, b in itertools.pairwise(firsts)]
