"""Several parts of a run written as one: values in files by feature range, statistics counted anew."""

from __future__ import annotations

import itertools
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
from saeflow.features.coverage import covered, has_every_table
from saeflow.features.files import TokenMajorWriter, files_of, read_tokens, write_table, write_values
from saeflow.features.schema import PART_TABLES, TOP, TOP_VOCAB
from saeflow.features.statistics import PartStatistics
from saeflow.features.token_columns import TokenColumns, read_token_columns
from saeflow.runtime.progress import Bar
from saeflow.runtime.threads import map_in_order, n_threads, ranges
from saeflow.sae.encoding.feature_major import FeatureMajor, feature_major
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord, damaged


@dataclass(frozen=True)
class MergeSettings:
    """Threads, memory and sizes of a merge."""

    threads: int = 0
    """0: one for each core."""
    bucket_values: int = 8_000_000
    """Values in one file of the order by feature, about."""
    piece_values: int = 8_000_000
    """Values read, counted and written at once."""
    table_features: int = TABLE_FEATURES
    pair_bytes: int = PAIR_BYTES
    most_values: int = 2_000_000_000
    """Values in one compacted part: all of them are written again when one document of the part is forgotten."""
    most_tokens: int = 1 << 30
    """Places of tokens in one compacted part: rows are numbered in 32 bits, and vocabulary ids held in memory."""


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
        self.n_features = int(self.target.record.facts["n_features"])
        self.statistics = PartStatistics(self.n_features)
        self.parts = list({part.folder: part for part in self.taken.values()}.values())
        self.whole = all(self.taken.get(index) is part for part in self.parts for index in covered(part))
        changes = sum(a is not b for a, b in itertools.pairwise(self.taken.values()))
        self.interleaved = changes >= len(self.parts)
        self.n_tokens = 0
        spans = self.selection.spans
        first, last = spans[min(self.taken)][0], spans[max(self.taken)][1]
        self.first_token, self.vocab_ids = first, np.zeros(last - first + 1, np.int32)

    def merge(self) -> None:
        """Write values and statistics to the folder."""
        pairs = PairCounter(self.n_features, self.threads, self.settings.table_features, self.settings.pair_bytes)
        self._write_by_token(pairs)
        self._write_by_feature()
        if pairs.exact:
            self.statistics.set_pairs(pairs.best(self.statistics.n_tokens, TOP, self._values))
        for name, table in self.statistics.tables().items():
            write_table(self.folder / f"{name}.parquet", table)

    def _write_by_token(self, pairs: PairCounter) -> None:
        """Write the order by token; the statistics of whole parts are added up, others are counted."""
        counted = self.whole and all(map(has_every_table, self.parts))
        for part in self.parts if counted else []:
            self.statistics.add_tables({name: self._table(part, name) for name in PART_TABLES})
        writer = TokenMajorWriter(self.folder, 2 * self.settings.piece_values)
        columns: dict[int, TokenColumns] = {}
        for index, token_ids, sparse in map_in_order(self._read, self._pieces(), 1):
            if index not in columns:
                columns = {index: self._note_tokens(index, counted)}
            if not counted or not pairs.exact:
                entries = feature_major(sparse, self.n_features, self.threads)
                tokens = columns[index].of(token_ids)
                self.statistics.add(tokens, sparse, entries, totals=not counted, pairs=not pairs.exact)
            pairs.add(sparse)
            writer.append(token_ids, sparse)
            if self.bar is not None:
                self.bar.advance(len(sparse.values))
        writer.close()

    def _note_tokens(self, index: int, counted: bool) -> TokenColumns:
        """Note the tokens of an activation part."""
        tokens = read_token_columns(self.selection, index)
        self.vocab_ids[tokens.first_token - self.first_token :][: len(tokens.mask)] = tokens.vocab_ids
        self.n_tokens += int(tokens.mask.sum())
        if not counted:
            self.statistics.count_tokens(tokens)
        return tokens

    def _table(self, part: PartRecord, name: str) -> pa.Table:
        return pq.read_table(self.target.part_file(part, f"{name}.parquet"))

    def _values(self) -> Iterator[SparseValues]:
        return (sparse for _, _, sparse in map_in_order(self._read, self._pieces(), 1))

    def _pieces(self) -> Iterator[tuple[int, PartRecord, int, int]]:
        """Yield what is read at once, in the order of tokens.

        This is an activation part, the part that holds it, first and last token.
        """
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
        found = feature_buckets(n_tokens, self.settings.bucket_values)
        n_values = [int(n_tokens[a : b + 1].sum()) for a, b in found]
        together = groups_within(n_values, self.settings.piece_values)
        groups = [[found[number] for number in group] for group in together]
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


def groups_within(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield neighbouring numbers 0..n in groups whose sizes add up to at most `most`, unless one alone has more."""
    group: list[int] = []
    for number, size in enumerate(sizes):
        if group and sum(sizes[i] for i in group) + size > most:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


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
