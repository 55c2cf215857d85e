"""Many parts of a run merged into few: values in files by feature range, statistics counted anew.

A compacted part holds what several activation parts gave; its record names them and what each followed from. It is
made beside the old parts and shown in their place in one switch, so that a reader sees the old ones or the new one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from saeflow import kernels
from saeflow.artefact import Artefact
from saeflow.encoding import FeatureMajor, SparseValues, feature_major
from saeflow.feature_files import TokenMajorWriter, files_of, pieces, read_tokens, write_table, write_values
from saeflow.feature_kernels import best_of_counted, count_pairs, listed
from saeflow.feature_tables import TOP
from saeflow.fingerprints import fingerprint
from saeflow.marginals import Totals
from saeflow.progress import Bar, Progress
from saeflow.records import PartRecord
from saeflow.relations import literal, unglobbed
from saeflow.token_facts import facts_of
from saeflow.used import Used

FIRST_INDEX = 10_000_000
"""A compacted part has the index of its first activation part, and this added."""

MOST_VALUES = 2_000_000_000
"""Values in one compacted part: what has to be written again when one document of it is forgotten."""

BUCKET_VALUES = 8_000_000
"""Values in one file of the order by feature, about."""

PIECE_VALUES = 16_000_000
"""Values read, counted and written at once."""

ENOUGH_PARTS = 8
"""From so many parts of one activation part each on, `saeflow run` compacts by itself."""

_PAIR_BYTES = 512 << 20
"""Memory for counting which features fire together; with more features values are read again for each share of them."""

_MOST_READINGS = 16


def covered(part: PartRecord) -> dict[int, str]:
    """Activation parts whose values a part holds, by index, and what stands for the inputs of each."""
    if part.index < FIRST_INDEX:
        return {part.index: stands_for(part.inputs)}
    return {int(index): digest for index, digest in part.inputs.items()}


def stands_for(inputs: Mapping[str, str]) -> str:
    """Digits for what values followed from, then those of the hidden documents that were left out."""
    hidden = inputs.get("hidden", "")
    return f"{fingerprint(dict(inputs))} {hidden}".strip()


def hidden_in(digest: str) -> str:
    """What stands for the hidden documents in such digits; empty where none were."""
    return digest.partition(" ")[2]


def owners(target: Artefact, inputs: Mapping[int, dict[str, str]]) -> dict[int, PartRecord]:
    """Of each activation part the finished part that holds its values as they follow from these inputs."""
    wanted = {index: stands_for(each) for index, each in inputs.items()}

    def held(part: PartRecord) -> list[int]:
        if part.index < FIRST_INDEX:
            return [part.index] if part.index in inputs and part.made_from(inputs[part.index]) else []
        return [index for index, digest in covered(part).items() if wanted.get(index) == digest]

    found: dict[int, PartRecord] = {}
    for part in target.parts(lambda part: bool(held(part))).values():
        for index in held(part):
            found.setdefault(index, part)
    return found


def run(target: Artefact, used: Used, progress: Progress, enough: int = ENOUGH_PARTS) -> None:
    """Compact where that is worth it, under the artefact's lock."""
    with target.writing():
        if not compact(target, used, progress, enough):
            progress.skip("compact", f"{len(target.published().parts)} parts")


def settled(target: Artefact, used: Used, inputs: Mapping[int, dict[str, str]]) -> list[PartRecord]:
    """The parts to show; a compacted one whose values are not all wanted any more is written again without the others."""
    owned: dict[str, list[int]] = {}
    records: dict[str, PartRecord] = {}
    for index, part in owners(target, inputs).items():
        owned.setdefault(part.folder, []).append(index)
        records[part.folder] = part
    return [
        part
        if set(owned[folder]) == covered(part).keys()
        else merge(target, used, [_Source(part, sorted(owned[folder]))])
        for folder, part in records.items()
    ]


class _Source(NamedTuple):
    """A part to read from, and of which activation parts the values are taken."""

    part: PartRecord
    indices: list[int]


def compact(target: Artefact, used: Used, progress: Progress, enough: int = 2) -> list[PartRecord]:
    """Merge neighbouring parts into compacted ones, where at least `enough` of them can be; the new parts.

    Each group is shown as soon as it is written. The caller holds the artefact's lock.
    """
    made = []
    for group in plan(target.published().parts, enough):
        n_values = sum(part.counts["n_values"] for part in group)
        with progress.bar("compact", n_values, "values") as bar:
            made.append(merge(target, used, [_Source(part, sorted(covered(part))) for part in group], bar))
        gone = {part.folder for part in group}
        target.publish([*(p for p in target.published().parts if p.folder not in gone), made[-1]])
    return made


def plan(parts: Sequence[PartRecord], enough: int = 2, most_values: int = MOST_VALUES) -> list[list[PartRecord]]:
    """Groups of neighbouring parts to merge, of at most `most_values` values unless one part alone has more."""
    groups: list[list[PartRecord]] = [[]]
    for part in sorted(parts, key=lambda part: min(covered(part))):
        if sum(p.counts["n_values"] for p in groups[-1]) + part.counts["n_values"] > most_values and groups[-1]:
            groups.append([])
        groups[-1].append(part)
    return [group for group in groups if len(group) >= max(enough, 2)]


def merge(target: Artefact, used: Used, sources: Sequence[_Source], bar: Bar | None = None) -> PartRecord:
    """Write the values of these parts as one."""
    taken = {index: source.part for source in sources for index in source.indices}
    inputs = {f"{index:06d}": covered(taken[index])[index] for index in sorted(taken)}
    counts = {"n_tokens": 0, "n_values": 0, "n_parts": len(taken)}
    index = FIRST_INDEX + min(taken)
    with target.new_part(index, counts, inputs) as folder:
        merger = _Merger(target, used, taken, folder, bar)
        merger.run()
        counts["n_tokens"] = merger.n_tokens
        counts["n_values"] = int(merger.totals.n_tokens.sum())
    return target.made[index]


class _Piece(NamedTuple):
    """Values of some tokens, in both orders."""

    token_ids: np.ndarray
    sparse: SparseValues
    entries: FeatureMajor


@dataclass
class _Merger:
    """One merge: a reading that counts and writes the order by token, then the order by feature, file by file."""

    target: Artefact
    used: Used
    taken: Mapping[int, PartRecord]
    folder: Path
    bar: Bar | None

    def __post_init__(self) -> None:
        self.n_features = int(self.target.record.facts["n_features"])
        self.totals = Totals(self.n_features)
        self.n_tokens = 0

    def run(self) -> None:
        share = max(1, _PAIR_BYTES // (4 * self.n_features))
        readings = -(-self.n_features // share)
        exact = readings <= _MOST_READINGS
        together = np.zeros((min(share, self.n_features), self.n_features), np.int32) if exact else None
        self._read_and_write(together)
        if together is not None:
            self._pairs(together)
        self._write_buckets()
        for name, table in self.totals.tables().items():
            write_table(self.folder / f"{name}.parquet", table)

    def _read_and_write(self, together: np.ndarray | None) -> None:
        """The order by token, and every statistic."""
        writer = TokenMajorWriter(self.folder, PIECE_VALUES)
        for index, part in self.taken.items():
            facts = facts_of(self.used, index)
            self.totals.see(facts)
            self.n_tokens += int(facts.mask.sum())
            for piece in self._pieces(index, part):
                self.totals.add(facts.of(piece.token_ids), piece.sparse, piece.entries, pairs=together is None)
                if together is not None:
                    _count(piece, together, 0)
                writer.append(piece.token_ids, piece.sparse)
                if self.bar is not None:
                    self.bar.advance(len(piece.sparse.values))
        writer.close()

    def _pieces(self, index: int, part: PartRecord) -> Iterator[_Piece]:
        """What a part holds of one activation part, in the order of tokens."""
        first, last = self._ends(index)
        per_token = part.counts["n_values"] / max(1, part.counts["n_tokens"])
        for begin, end in pieces(first, last, max(1, int(PIECE_VALUES / max(per_token, 1e-9)))):
            token_ids, sparse = read_tokens(self.target, part, begin, end)
            yield _Piece(token_ids, sparse, feature_major(sparse, self.n_features))

    def _ends(self, index: int) -> tuple[int, int]:
        """First and last token of an activation part."""
        counts = self.used.parts[index].counts
        first = counts["first_sequence"] * self.used.length
        return first, first + counts["n_sequences"] * self.used.length - 1

    def _pairs(self, together: np.ndarray) -> None:
        """Which features fire together, exactly: of the first features from what is counted, of others by reading again."""
        n, top = len(together), (self.n_features, TOP)
        found, others, n_both = np.zeros(self.n_features, np.int64), np.empty(top, np.int32), np.empty(top, np.int64)
        for first in range(0, self.n_features, n):
            if first:
                together[:] = 0
                for index, part in self.taken.items():
                    for piece in self._pieces(index, part):
                        _count(piece, together, first)
            last = min(first + n, self.n_features)

            def best(features: tuple[int, int], first: int = first) -> None:
                best_of_counted(*features, first, together, self.totals.n_tokens, TOP, found, others, n_both)

            kernels.in_parallel(best, [(first + a, first + b) for a, b in kernels.ranges(last - first, 256)])
        self.totals.together(*listed(found, others, n_both))

    def _write_buckets(self) -> None:
        """The order by feature: one file after the other, each sorted by DuckDB."""
        parts = {part.folder: part for part in self.taken.values()}.values()
        with duckdb.connect(config={"temp_directory": str(self.target.work / "sort")}) as connection:
            for first, last in buckets(self.totals.n_tokens, BUCKET_VALUES):
                paths = [
                    unglobbed(str(self.target.part_file(part, name)))
                    for part in parts
                    for name in files_of(part, "feature_major", first, last)
                ]
                found = connection.sql(
                    f"select feature_id, token_id, value from read_parquet({literal(paths)}, hive_partitioning = false) "
                    f"where feature_id between {first} and {last}{self._unwanted(parts)} order by feature_id, token_id"
                )
                table: pa.Table = found.to_arrow_table()
                write_values(
                    self.folder, "feature_major", (first, last), {c: table.column(c) for c in table.column_names}
                )

    def _unwanted(self, parts: Iterable[PartRecord]) -> str:
        """Leaves out what a part holds of activation parts that are not taken from it."""
        others = [i for part in parts for i in covered(part) if self.taken.get(i) is not part and i in self.used.parts]
        return "".join(f" and token_id not between {a} and {b}" for a, b in map(self._ends, others))


def _count(piece: _Piece, together: np.ndarray, first: int) -> None:
    """Count the pairs of the features first..first + n with all others, each feature by one worker."""
    last = min(first + len(together), together.shape[1])
    entries = piece.entries

    def work(features: tuple[int, int]) -> None:
        count_pairs(
            *features, entries.feature_starts, entries.rows, piece.sparse.row_starts, piece.sparse.feature_ids, first,
            together,
        )  # fmt: skip

    kernels.in_parallel(work, [(first + a, first + b) for a, b in kernels.ranges(last - first, 64)])


def buckets(n_tokens: np.ndarray, wanted: int) -> list[tuple[int, int]]:
    """Ranges of features, both ends included, that together are all: of about `wanted` values each, of about as many in
    all of them where no feature has more than a share of its own. `n_tokens` (F,) of each feature."""
    ends = np.cumsum(n_tokens)
    total = int(ends[-1]) if len(ends) else 0
    n = max(1, round(total / wanted))
    cuts = np.unique(np.searchsorted(ends, np.arange(1, n) * total / n)) + 1 if n > 1 else np.empty(0, np.int64)
    edges = np.unique(np.r_[0, cuts, len(n_tokens)])
    return [(int(a), int(b) - 1) for a, b in itertools.pairwise(edges)]
