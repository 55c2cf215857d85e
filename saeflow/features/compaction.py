"""Many parts of a run become few: which ones are merged, and how several are written as one.

A compacted part holds what several activation parts gave; its record names them and the inputs of each. It is made
beside the old parts and takes their place in one switch, so a reader sees either the old ones or the new one.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.activations.sparse_values import SparseValues
from saeflow.corpus.selection import TokenSelection
from saeflow.features.coactivation import PAIR_BYTES, TABLE_FEATURES, PairCounter
from saeflow.features.counting import KeyTotals, most_frequent_keys, place_sorted
from saeflow.features.files import (
    FILE_VALUES,
    TokenMajorWriter,
    feature_buckets,
    files_of,
    read_tokens,
    write_table,
    write_values,
)
from saeflow.features.sample import SampleWriter
from saeflow.features.schema import (
    FIRST_INDEX,
    PART_TABLES,
    TOP,
    TOP_VOCAB,
    covered,
    has_every_table,
    indices_held,
    is_of_now,
    stands_for,
)
from saeflow.features.statistics import PartStatistics, TokenColumns, read_token_columns
from saeflow.runtime.progress import Bar
from saeflow.runtime.threads import map_in_order, n_threads, ranges
from saeflow.sae.exact import FeatureMajor, feature_major
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord, damaged


@dataclass(frozen=True)
class MergeSettings:
    """Threads, memory and sizes of a merge."""

    threads: int = 0
    """0: one for each core."""
    bucket_values: int = FILE_VALUES
    """Values in one file of the order by feature, about; more in a part that would have more than `most_files`."""
    most_files: int = 250
    """Files of one part in the order by feature, about; half as many in the order by token."""
    piece_values: int = 8_000_000
    """Values read, counted and written at once."""
    table_features: int = TABLE_FEATURES
    pair_bytes: int = PAIR_BYTES
    most_values: int = 2_000_000_000
    """Values in one compacted part: all of them are written again when one document of the part is forgotten."""
    most_tokens: int = 1 << 30
    """Places of tokens in one compacted part: rows are numbered in 32 bits, and vocabulary ids held in memory."""
    most_at_once: int = sys.maxsize
    """Values in all parts that are merged after one another. A later merge takes what is left."""

    def file_values(self, n_values: int) -> tuple[int, int]:
        """Return how many values a file of a part of `n_values` has in the order by feature, and in that by token."""
        least = n_values // self.most_files
        return max(self.bucket_values, least), max(self.piece_values, 2 * least)


USUAL_MERGE = MergeSettings()


@dataclass
class PartMerger:
    """One merge: values are read and written in the order of tokens, then range by range in the order of features.

    `taken` maps each activation part, in order, to the part that holds its values. Parts are interleaved if one that
    was encoded anew lies between others of a compacted one.
    """

    target: Artefact
    selection: TokenSelection
    taken: Mapping[int, PartRecord]
    folder: Path
    bar: Bar | None
    settings: MergeSettings

    def __post_init__(self) -> None:
        self.threads = n_threads(self.settings.threads)
        self.n_features = int(self.target.fact("n_features"))
        self.statistics = PartStatistics(self.n_features)
        self.sample = SampleWriter(self.folder, self.n_features)
        self.parts = list({part.folder: part for part in self.taken.values()}.values())
        self.whole = all(self.taken.get(index) is part for part in self.parts for index in indices_held(part))
        changes = sum(a is not b for a, b in itertools.pairwise(self.taken.values()))
        self.interleaved = changes >= len(self.parts)
        self.file_values = self.settings.file_values(sum(part.counts["n_values"] for part in self.parts))
        self.n_tokens = 0
        self.left_out: list[pa.Table] = []
        self.left_out_counts: Counter[str] = Counter()
        spans = self.selection.spans
        first, last = spans[min(self.taken)][0], spans[max(self.taken)][1]
        self.first_token, self.vocab_ids = first, np.zeros(last - first + 1, np.int32)

    def merge(self) -> None:
        """Write values and statistics to the folder."""
        pairs = PairCounter(self.n_features, self.threads, self.settings.table_features, self.settings.pair_bytes)
        self._write_by_token(pairs)
        self.sample.close()
        self._write_by_feature()
        if pairs.exact:
            self.statistics.set_pairs(pairs.best(self.statistics.n_tokens, TOP, self._values))
        self.statistics.write(self.folder)
        if self.left_out:
            write_table(self.folder / "left_out.parquet", pa.concat_tables(self.left_out))

    def _write_by_token(self, pairs: PairCounter) -> None:
        """Write the order by token; the statistics of whole parts are added up, others are counted."""
        counted = self.whole and all(map(has_every_table, self.parts))
        for part in self.parts if counted else []:
            self.statistics.add_tables({name: self._table(part, name) for name in PART_TABLES})
        writer = TokenMajorWriter(self.folder, self.file_values[1])
        columns: dict[int, TokenColumns] = {}
        for index, token_ids, sparse in map_in_order(self._read, self._pieces(), 1):
            if index not in columns:
                columns = {index: self._note_tokens(index, counted)}
            if not counted or not pairs.exact:
                entries = feature_major(sparse, self.n_features, self.threads)
                tokens = columns[index].of(token_ids)
                self.statistics.add(tokens, sparse, entries, totals=not counted, pairs=not pairs.exact)
            self.sample.add(columns[index].sampled, columns[index].first_token, token_ids, sparse)
            pairs.add(sparse)
            writer.append(token_ids, sparse)
            if self.bar is not None:
                self.bar.advance(len(sparse.values))
        writer.finish()

    def _note_tokens(self, index: int, counted: bool) -> TokenColumns:
        tokens = self._without_long(read_token_columns(self.selection, index), index)
        self.vocab_ids[tokens.first_token - self.first_token :][: len(tokens.mask)] = tokens.vocab_ids
        self.n_tokens += int(tokens.mask.sum())
        self.sample.add_documents(tokens.sampled, tokens.mask)
        self.left_out_counts.update(tokens.left_out_counts)
        if not counted:
            self.statistics.count_tokens(tokens)
        return tokens

    def _without_long(self, tokens: TokenColumns, index: int) -> TokenColumns:
        """Leave out the tokens that were too long when the activation part was encoded."""
        part = self.taken[index]
        if not any(file.name == "left_out.parquet" for file in part.files):
            return tokens
        first, last = self.selection.spans[index]
        wanted = [("token_id", ">=", first), ("token_id", "<=", last)]
        self.left_out.append(pq.read_table(self.target.part_file(part, "left_out.parquet"), filters=wanted))
        return tokens.without(self.left_out[-1].column("token_id").to_numpy())

    def _table(self, part: PartRecord, name: str) -> pa.Table:
        return pq.read_table(self.target.part_file(part, f"{name}.parquet"))

    def _values(self) -> Iterator[SparseValues]:
        return (sparse for _, _, sparse in map_in_order(self._read, self._pieces(), 1))

    def _pieces(self) -> Iterator[tuple[int, PartRecord, int, int]]:
        """Yield what is read at once: an activation part, the part that holds it, first and last token."""
        for index, part in self.taken.items():
            first, last = self.selection.spans[index]
            per_token = part.counts["n_values"] / max(1, part.counts["n_tokens"])
            at_once = max(1, int(self.settings.piece_values / max(per_token, 1e-9)))
            for start, stop in ranges(last + 1 - first, at_once):
                yield index, part, first + start, first + stop - 1

    def _read(self, piece: tuple[int, PartRecord, int, int]) -> tuple[int, np.ndarray, SparseValues]:
        index, part, first, last = piece
        return index, *read_tokens(self.target, part, first, last)

    def _write_by_feature(self) -> None:
        """Write the order by feature; the values of several files are gathered in one reading."""
        n_tokens = self.statistics.n_tokens
        groups: list[list[tuple[int, int]]] = [[]]
        n_values = 0
        for low, high in feature_buckets(n_tokens, self.file_values[0]):
            size = int(n_tokens[low : high + 1].sum())
            if groups[-1] and n_values + size > self.settings.piece_values:
                groups.append([])
                n_values = 0
            groups[-1].append((low, high))
            n_values += size
        for group, words in zip(groups, map_in_order(self._write_buckets, groups, self.threads), strict=True):
            self.statistics.set_words(group[0][0], words)

    def _write_buckets(self, group: list[tuple[int, int]]) -> KeyTotals:
        """Write neighbouring files; return the most frequent words of their features, numbered from the first."""
        first = group[0][0]
        entries, tokens = self._gather(first, group[-1][1])
        for low, high in group:
            at = slice(*entries.feature_starts[[low - first, high + 1 - first]])
            ids = np.repeat(np.arange(low, high + 1, dtype=np.int32), self.statistics.n_tokens[low : high + 1])
            columns = {"feature_id": ids, "token_id": tokens[at], "value": entries.values[at]}
            write_values(self.folder, "feature_major", (low, high), columns)
        return most_frequent_keys(entries, self.vocab_ids, int(self.vocab_ids.max(initial=0)) + 1, TOP_VOCAB)

    def _gather(self, first: int, last: int) -> tuple[FeatureMajor, np.ndarray]:
        """Return the values of the features first..last, rows counted from the first token; and the token_ids."""
        n_tokens = self.statistics.n_tokens[first : last + 1]
        starts = np.concatenate([[0], n_tokens.cumsum()]).astype(np.int64)
        places = starts[:-1].copy()
        tokens, values = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.float32)
        for part in self.parts:
            for name in files_of(part, "feature_major", first, last):
                ids, token_ids, strengths = self._range(part, name, first, last)
                if np.any(places + np.bincount(ids - first, minlength=len(n_tokens)) > starts[1:]):
                    raise damaged(self.target.part_path(part) / name)
                place_sorted(ids, token_ids, strengths, first, places, tokens, values)
        if not np.array_equal(places, starts[1:]):
            raise damaged(self.target.part_path(self.parts[0]) / "feature_major")
        if self.interleaved:
            order = np.lexsort((tokens, np.repeat(np.arange(len(n_tokens)), n_tokens)))
            tokens, values = tokens[order], values[order]
        rows = (tokens - self.first_token).astype(np.int32)
        return FeatureMajor(starts, rows, values), tokens

    def _range(self, part: PartRecord, name: str, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return feature_id, token_id and value of these features in a file, for the activation parts taken."""
        wanted = [("feature_id", ">=", first), ("feature_id", "<=", last)]
        table = pq.read_table(self.target.part_file(part, name), filters=wanted, partitioning=None)
        ids, tokens, values = (table.column(c).to_numpy() for c in ("feature_id", "token_id", "value"))
        if self.whole:
            return ids, tokens, values
        keep = np.zeros(len(ids), bool)
        for begin, end in (self.selection.spans[index] for index, taken in self.taken.items() if taken is part):
            keep |= (tokens >= begin) & (tokens <= end)
        return ids[keep], tokens[keep], values[keep]


def part_of_each(target: Artefact, inputs: Mapping[int, dict[str, str]]) -> dict[int, PartRecord]:
    """Map each activation part to the finished part that holds its values as they follow from these inputs.

    Activation parts without one are left out. Parts of format 1 do not say what they were made from; merged ones say
    that it was nothing.
    """
    unsaid = stands_for({})

    def follows(index: int, digest: str) -> bool:
        wanted = inputs.get(index)
        return wanted is not None and (digest == stands_for(wanted) or (digest == unsaid and not wanted.get("hidden")))

    valid: dict[str, list[int]] = {}

    def has_valid(part: PartRecord) -> bool:
        if part.index < FIRST_INDEX:
            valid[part.folder] = [part.index] if part.index in inputs and part.made_from(inputs[part.index]) else []
        else:
            valid[part.folder] = [index for index, digest in covered(part).items() if follows(index, digest)]
        return bool(valid[part.folder])

    found: dict[int, PartRecord] = {}
    for part in target.parts(has_valid).values():
        for index in valid[part.folder]:
            found.setdefault(index, part)
    return found


def replace_group(target: Artefact, group: Sequence[PartRecord], merged: PartRecord, clear: bool) -> None:
    """Show a merged part in the place of the parts that it holds. The caller holds the artefact's lease.

    `clear` removes folders that no list names: only once no later group is merged already.
    """
    gone = {old.folder for old in group}
    kept = [part for part in target.published().parts if part.folder not in gone]
    target.publish([*kept, merged], clear=clear)


def plan_merges(
    parts: Sequence[PartRecord], spans: Mapping[int, tuple[int, int]], enough: int = 2, mend: bool = False,
    settings: MergeSettings = USUAL_MERGE,
) -> list[list[PartRecord]]:  # fmt: skip
    """Return groups of at least `enough` neighbouring parts to merge, so that as few parts as possible are left.

    A group has at most `settings.most_values` values in at most `settings.most_tokens` places (padding counts), unless
    one part alone has more. `spans` is the first and last token of each activation part. `mend` adds groups, however
    small, with a part that an earlier saeflow made: such a part lacks some statistics.
    """
    groups: list[list[PartRecord]] = [[]]
    n_values = first = last = 0
    for part in by_first_activation_part(parts):
        held = [spans[index] for index in indices_held(part)]
        begin, end = min(first for first, _ in held), max(last for _, last in held)
        n_values, last = n_values + part.counts["n_values"], max(last, end)
        if groups[-1] and (n_values > settings.most_values or last - first >= settings.most_tokens):
            groups.append([])
        if not groups[-1]:
            n_values, first, last = part.counts["n_values"], begin, end
        groups[-1].append(part)
    return [group for group in groups if len(group) >= max(enough, 2) or (mend and not all(map(is_of_now, group)))]


def group_between(parts: Sequence[PartRecord], first: str, last: str) -> list[PartRecord]:
    """Return the neighbouring parts between two folders, both included."""
    ordered = by_first_activation_part(parts)
    folders = [part.folder for part in ordered]
    return ordered[folders.index(first) : folders.index(last) + 1]


def by_first_activation_part(parts: Sequence[PartRecord]) -> list[PartRecord]:
    """Return parts in the order of the corpus: each by the first activation part that it holds."""
    return sorted(parts, key=lambda part: min(indices_held(part)))


def merge_whole_parts(
    target: Artefact, selection: TokenSelection, parts: Sequence[PartRecord], bar: Bar,
    settings: MergeSettings = USUAL_MERGE,
) -> PartRecord:  # fmt: skip
    """Write all values of these parts as one part."""
    return _merge(target, selection, {index: part for part in parts for index in indices_held(part)}, settings, bar)


def parts_to_show(
    target: Artefact, selection: TokenSelection, inputs: Mapping[int, dict[str, str]],
    settings: MergeSettings = USUAL_MERGE,
) -> list[PartRecord]:  # fmt: skip
    """Return the parts that hold the values of these inputs, and no others.

    A compacted part that also holds values no longer wanted is written again without them.
    """
    owned: dict[str, dict[int, PartRecord]] = {}
    for index, part in part_of_each(target, inputs).items():
        owned.setdefault(part.folder, {})[index] = part
    shown = []
    for taken in owned.values():
        part = next(iter(taken.values()))
        whole = taken.keys() == set(indices_held(part))
        shown.append(part if whole else _merge(target, selection, taken, settings))
    return shown


def _merge(
    target: Artefact, selection: TokenSelection, taken: Mapping[int, PartRecord], settings: MergeSettings,
    bar: Bar | None = None,
) -> PartRecord:  # fmt: skip
    """Write the values of these activation parts, each out of the part that holds them, as one part."""
    taken = dict(sorted(taken.items()))
    inputs = {f"{index:06d}": covered(part)[index] for index, part in taken.items()}
    counts = {"n_tokens": 0, "n_values": 0, "n_parts": len(taken)}
    index = FIRST_INDEX + min(taken)
    with target.new_part(index, counts, inputs) as folder:
        merger = PartMerger(target, selection, taken, folder, bar, settings)
        merger.merge()
        counts |= {"n_tokens": merger.n_tokens} | merger.left_out_counts
        counts["n_values"] = int(merger.statistics.n_tokens.sum())
    return target.made[index]
