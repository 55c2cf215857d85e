"""Many parts of a run merged into few: values in files by feature range, statistics counted anew.

A compacted part holds what several activation parts gave; its record names them and what each followed from. It is
made beside the old parts and shown in their place in one switch, so that a reader sees the old ones or the new one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from saeflow.corpus.selection import TokenSelection
from saeflow.features.counting import (
    Grouped,
    Pairs,
    PairTable,
    best_of_counted,
    count_pairs,
    listed,
    most_frequent_keys,
    place_sorted,
    room_for_best,
    unsigned,
)
from saeflow.features.coverage import FIRST_INDEX, covered, has_every_table, stands_for
from saeflow.features.files import TokenMajorWriter, files_of, pieces, read_tokens, write_table, write_values
from saeflow.features.schema import PART_TABLES, TOP, TOP_VOCAB
from saeflow.features.statistics import Totals
from saeflow.features.token_columns import TokenFacts, facts_of
from saeflow.runtime.progress import Bar, Progress
from saeflow.runtime.threads import map_in_order
from saeflow.sae import kernels
from saeflow.sae.encoder import FeatureMajor, SparseValues, feature_major
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord, damaged

MOST_VALUES = 2_000_000_000
"""Values in one compacted part: what has to be written again when one document of it is forgotten."""

MOST_TOKENS = 1 << 30
"""Places of tokens in one compacted part: their rows are numbered in 32 bits, and their vocabulary ids held in
memory."""

BUCKET_VALUES = 8_000_000
"""Values in one file of the order by feature, about."""

PIECE_VALUES = 8_000_000
"""Values read, counted and written at once."""

_PAIR_BYTES = 512 << 20
"""Memory for counting which features fire together; with more features values are read again for each share of them."""

_MOST_READINGS = 16


def owners(target: Artefact, inputs: Mapping[int, dict[str, str]]) -> dict[int, PartRecord]:
    """Of each activation part the finished part that holds its values as they follow from these inputs.

    Parts of format 1 do not say what they were made from; merged ones hold that of nothing.
    """
    wanted = {
        index: {stands_for(each)} if each.get("hidden") else {stands_for(each), stands_for({})}
        for index, each in inputs.items()
    }

    def held(part: PartRecord) -> list[int]:
        if part.index < FIRST_INDEX:
            return [part.index] if part.index in inputs and part.made_from(inputs[part.index]) else []
        return [index for index, digest in covered(part).items() if digest in wanted.get(index, ())]

    found: dict[int, PartRecord] = {}
    for part in target.parts(lambda part: bool(held(part))).values():
        for index in held(part):
            found.setdefault(index, part)
    return found


ByWorkers = Callable[[list[list[PartRecord]], Bar], Iterator[PartRecord]]
"""Gives the merged part of each group, in their order."""


def run(
    target: Artefact,
    used: TokenSelection,
    progress: Progress,
    enough: int,
    mend: bool = False,
    by_workers: ByWorkers | None = None,
) -> None:
    """Compact where that is worth it, under the artefact's lock."""
    with target.writing():
        if not compact(target, used, progress, enough, mend, by_workers):
            progress.skip("compact", f"{len(target.published().parts)} parts")


def settled(target: Artefact, used: TokenSelection, inputs: Mapping[int, dict[str, str]]) -> list[PartRecord]:
    """The parts to show; a compacted one whose values are not all wanted any more is written again without the
    others."""
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


def compact(
    target: Artefact, used: TokenSelection, progress: Progress, enough: int = 2, mend: bool = True,
    by_workers: ByWorkers | None = None,
) -> list[PartRecord]:  # fmt: skip
    """Merge neighbouring parts into compacted ones, where at least `enough` of them can be; the new parts.

    `mend`: also those that an earlier saeflow made, which lack some statistics.

    Each group is shown as soon as it is written; workers may have finished a later one by then, which no list names
    yet. The caller holds the artefact's lock.
    """
    made: list[PartRecord] = []
    groups = plan(target.published().parts, used.spans, enough, mend)
    if not groups:
        return made
    n_values = sum(part.counts["n_values"] for group in groups for part in group)
    with progress.bar("compact", n_values, "values") as bar:
        here = (merge_whole(target, used, group, bar) for group in groups)
        for group, part in zip(groups, by_workers(groups, bar) if by_workers else here, strict=True):
            gone = {old.folder for old in group}
            made.append(part)
            kept = [p for p in target.published().parts if p.folder not in gone]
            target.publish([*kept, part], clear=len(made) == len(groups))
    return made


def merge_whole(target: Artefact, used: TokenSelection, parts: Sequence[PartRecord], bar: Bar) -> PartRecord:
    """Write all values of these parts as one."""
    return merge(target, used, [_Source(part, sorted(covered(part))) for part in parts], bar)


def plan(
    parts: Sequence[PartRecord],
    spans: Mapping[int, tuple[int, int]],
    enough: int = 2,
    mend: bool = False,
    most_values: int = MOST_VALUES,
    most_tokens: int = MOST_TOKENS,
) -> list[list[PartRecord]]:
    """Groups of neighbouring parts to merge, of at most `most_values` values in at most `most_tokens` places (padding
    counts), unless one part alone has more. `spans`: first and last token of each activation part."""
    groups: list[list[PartRecord]] = [[]]
    n_values = first = last = 0
    for part in _in_order(parts):
        begin, end = min(spans[i][0] for i in covered(part)), max(spans[i][1] for i in covered(part))
        n_values, last = n_values + part.counts["n_values"], max(last, end)
        if groups[-1] and (n_values > most_values or last - first >= most_tokens):
            groups.append([])
        if not groups[-1]:
            n_values, first, last = part.counts["n_values"], begin, end
        groups[-1].append(part)
    return [
        group
        for group in groups
        if len(group) >= max(enough, 2) or (mend and not all(has_every_table(part) for part in group))
    ]


def neighbours(parts: Sequence[PartRecord], first: str, last: str) -> list[PartRecord]:
    """A group of `plan`, by the folders of its first and last part."""
    ordered = _in_order(parts)
    folders = [part.folder for part in ordered]
    return ordered[folders.index(first) : folders.index(last) + 1]


def _in_order(parts: Sequence[PartRecord]) -> list[PartRecord]:
    """By the first activation part that they hold."""
    return sorted(parts, key=lambda part: min(covered(part)))


def merge(target: Artefact, used: TokenSelection, sources: Sequence[_Source], bar: Bar | None = None) -> PartRecord:
    """Write the values of these parts as one."""
    taken = dict(sorted((index, source.part) for source in sources for index in source.indices))
    inputs = {f"{index:06d}": covered(part)[index] for index, part in taken.items()}
    counts = {"n_tokens": 0, "n_values": 0, "n_parts": len(taken)}
    index = FIRST_INDEX + min(taken)
    with target.new_part(index, counts, inputs) as folder:
        merger = _Merger(target, used, taken, folder, bar)
        merger.run()
        counts["n_tokens"] = merger.n_tokens
        counts["n_values"] = int(merger.totals.n_tokens.sum())
    return target.made[index]


@dataclass
class _Merger:
    """One merge: a reading in the order of tokens, which is written again, then the order by feature, range by range.

    `taken`: the part to read by activation part, in their order. Parts are interleaved where one was encoded anew that
    lies between others of a compacted one.
    """

    target: Artefact
    used: TokenSelection
    taken: Mapping[int, PartRecord]
    folder: Path
    bar: Bar | None

    def __post_init__(self) -> None:
        self.n_features = int(self.target.record.facts["n_features"])
        self.totals = Totals(self.n_features)
        self.parts = list({part.folder: part for part in self.taken.values()}.values())
        self.whole = all(self.taken.get(index) is part for part in self.parts for index in covered(part))
        changes = sum(a is not b for a, b in itertools.pairwise(self.taken.values()))
        self.interleaved = changes >= len(self.parts)
        self.n_tokens = 0
        first, last = self.used.spans[min(self.taken)][0], self.used.spans[max(self.taken)][1]
        self.first_token, self.vocab_ids = first, np.zeros(last - first + 1, np.int32)

    def run(self) -> None:
        pairs = _Pairs(self.n_features)
        self._read_and_write(pairs)
        self._write_buckets()
        if pairs.exact:
            self.totals.together(pairs.best(self.totals.n_tokens, self._values))
        for name, table in self.totals.tables().items():
            write_table(self.folder / f"{name}.parquet", table)

    def _read_and_write(self, pairs: _Pairs) -> None:
        """The order by token; statistics of whole parts are added up, else counted."""
        counted = self.whole and all(map(has_every_table, self.parts))
        for part in self.parts if counted else []:
            self.totals.absorb({name: self._table(part, name) for name in PART_TABLES})
        writer = TokenMajorWriter(self.folder, 2 * PIECE_VALUES)
        about: dict[int, TokenFacts] = {}
        for index, token_ids, sparse in map_in_order(self._read, self._pieces(), 1):
            if index not in about:
                about = {index: self._see(index, counted)}
            if not counted or not pairs.exact:
                entries = feature_major(sparse, self.n_features)
                facts = about[index].of(token_ids)
                self.totals.add(facts, sparse, entries, stats=not counted, pairs=not pairs.exact)
            pairs.add(sparse)
            writer.append(token_ids, sparse)
            if self.bar is not None:
                self.bar.advance(len(sparse.values))
        writer.close()

    def _see(self, index: int, counted: bool) -> TokenFacts:
        """Note the tokens of an activation part."""
        facts = facts_of(self.used, index)
        self.vocab_ids[facts.first_token - self.first_token :][: len(facts.mask)] = facts.vocab_ids
        self.n_tokens += int(facts.mask.sum())
        if not counted:
            self.totals.see(facts)
        return facts

    def _table(self, part: PartRecord, name: str) -> pa.Table:
        return pq.read_table(self.target.part_file(part, f"{name}.parquet"))

    def _values(self) -> Iterator[SparseValues]:
        return (sparse for _, _, sparse in map_in_order(self._read, self._pieces(), 1))

    def _pieces(self) -> Iterator[tuple[int, PartRecord, int, int]]:
        """What is read at once: an activation part, the part that holds it, first and last token. In the order of
        tokens."""
        for index, part in self.taken.items():
            first, last = self.used.spans[index]
            per_token = part.counts["n_values"] / max(1, part.counts["n_tokens"])
            for begin, end in pieces(first, last, max(1, int(PIECE_VALUES / max(per_token, 1e-9)))):
                yield index, part, begin, end

    def _read(self, piece: tuple[int, PartRecord, int, int]) -> tuple[int, np.ndarray, SparseValues]:
        index, part, first, last = piece
        return index, *read_tokens(self.target, part, first, last)

    def _write_buckets(self) -> None:
        """The order by feature; several files of it are gathered in one reading."""
        found = buckets(self.totals.n_tokens, BUCKET_VALUES)
        n_values = [int(self.totals.n_tokens[a : b + 1].sum()) for a, b in found]
        groups = [[found[number] for number in group] for group in together_within(n_values, PIECE_VALUES)]
        for group, words in zip(groups, map_in_order(self._write_group, groups, torch.get_num_threads()), strict=True):
            self.totals.words(group[0][0], words)

    def _write_group(self, group: list[tuple[int, int]]) -> Grouped:
        """Neighbouring files; returns the most frequent words of their features, numbered from the first."""
        first = group[0][0]
        entries, tokens = self._gather(first, group[-1][1])
        for low, high in group:
            at = slice(*entries.feature_starts[[low - first, high + 1 - first]])
            ids = np.repeat(np.arange(low, high + 1, dtype=np.int32), self.totals.n_tokens[low : high + 1])
            columns = {"feature_id": ids, "token_id": tokens[at], "value": entries.values[at]}
            write_values(self.folder, "feature_major", (low, high), columns)
        return most_frequent_keys(entries, self.vocab_ids, int(self.vocab_ids.max(initial=0)) + 1, TOP_VOCAB)

    def _gather(self, first: int, last: int) -> tuple[FeatureMajor, np.ndarray]:
        """Values of the features first..last, rows counted from the first token; and the token_ids."""
        n_tokens = self.totals.n_tokens[first : last + 1]
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
        """feature_id, token_id and value of these features in a file, without activation parts that are not taken."""
        wanted = [("feature_id", ">=", first), ("feature_id", "<=", last)]
        table = pq.read_table(self.target.part_file(part, name), filters=wanted, partitioning=None)
        ids, tokens, values = (table.column(c).to_numpy() for c in ("feature_id", "token_id", "value"))
        if self.whole:
            return ids, tokens, values
        keep = np.zeros(len(ids), bool)
        for begin, end in (self.used.spans[index] for index, taken in self.taken.items() if taken is part):
            keep |= (tokens >= begin) & (tokens <= end)
        return ids[keep], tokens[keep], values[keep]


class _Pairs:
    """Which features fire together, exactly: in one table, or with more features in several readings of the values.

    With so many that it would take too many readings, pairs are those of the pieces, added up (`exact` is False).
    """

    def __init__(self, n_features: int) -> None:
        self.n_features = n_features
        self._table = PairTable(n_features) if n_features <= PairTable.MOST_FEATURES else None
        self._share = min(n_features, max(1, _PAIR_BYTES // (4 * n_features)))
        self.exact = self._table is not None or -(-n_features // self._share) <= _MOST_READINGS

    def add(self, sparse: SparseValues) -> None:
        if self._table is not None:
            self._table.add(sparse)

    def best(self, n_tokens: np.ndarray, read: Callable[[], Iterator[SparseValues]]) -> Pairs:
        if self._table is not None:
            return self._table.best(n_tokens, TOP)
        out = room_for_best(self.n_features, TOP)
        for first in range(0, self.n_features, self._share):
            last = min(first + self._share, self.n_features)
            together = np.zeros((last - first, self.n_features), np.uint32)
            for sparse in read():
                _count(sparse, together, first)

            def choose(a: int, b: int, first: int = first, counts: np.ndarray = together) -> None:
                best_of_counted(a, b, first, counts, n_tokens, TOP, *out)

            _in_ranges(choose, first, last)
        return listed(*out)


def _count(sparse: SparseValues, together: np.ndarray, first: int) -> None:
    """Count the pairs of the features first..first + n with all others, each feature by one worker."""
    n_features = together.shape[1]
    entries, ids = feature_major(sparse, n_features), unsigned(sparse.feature_ids, n_features)

    def work(a: int, b: int) -> None:
        count_pairs(a, b, entries.feature_starts, entries.rows, sparse.row_starts, ids, first, together)

    _in_ranges(work, first, first + len(together))


def _in_ranges(work: Callable[[int, int], None], first: int, last: int) -> None:
    kernels.in_parallel(
        lambda features: work(*features), [(first + a, first + b) for a, b in kernels.ranges(last - first, 64)]
    )


def together_within(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Neighbouring numbers 0..n in groups whose sizes add up to at most `most`, unless one alone has more."""
    group: list[int] = []
    for number, size in enumerate(sizes):
        if group and sum(sizes[i] for i in group) + size > most:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def buckets(n_tokens: np.ndarray, wanted: int) -> list[tuple[int, int]]:
    """Ranges of features, both ends included, that together are all: of about `wanted` values each, of about as many in
    all of them where no feature has more than a share of its own. `n_tokens` (F,) of each feature."""
    ends = np.cumsum(n_tokens)
    total = int(ends[-1]) if len(ends) else 0
    n = max(1, round(total / wanted))
    cuts = np.unique(np.searchsorted(ends, np.arange(1, n) * total / n)) + 1 if n > 1 else np.empty(0, np.int64)
    edges = np.unique(np.r_[0, cuts, len(n_tokens)])
    return [(int(a), int(b) - 1) for a, b in itertools.pairwise(edges)]
