"""A run of up to 10^10 values: a run of ten million, copied with its tokens renumbered, as compaction would lay it out.

Every figure of a copy is known from the original, and 128 features fire in the first copy alone, so that some are rare
at any size. A part of tokens has three million tokens, as a corpus of that size should have.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeflow.activations.sparse_values import SparseRows
from saeflow.corpus.token_parts import write_token_tables
from saeflow.corpus.vocabulary import write_vocab
from saeflow.features.compaction import USUAL_MERGE
from saeflow.features.files import feature_buckets, files_of, write_table, write_values
from saeflow.features.sample import SampledDocuments, SampleWriter, is_sampled
from saeflow.features.schema import FIRST_INDEX, PART_TABLES, VALUES, stands_for
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord
from saeflow.store.store import Store
from tests.benchmarks._made_run import LENGTH, N_VOCAB

COPIES_A_PART = 10
"""Of tokens."""

PARTS_TOGETHER = 20
"""Parts of tokens in one part of values: 2 * 10^9 values."""

N_RARE = 128


@dataclass(frozen=True)
class Original:
    """The run that is copied: one compacted part."""

    run: Artefact
    tokens: Artefact

    @cached_property
    def part(self) -> PartRecord:
        (part,) = self.run.published().parts
        return part

    @cached_property
    def token_tables(self) -> tuple[pa.Table, pa.Table]:
        """The tokens and documents of all parts."""
        parts = self.tokens.published().parts
        every = ("tokens.parquet", "documents.parquet")
        tokens, documents = (
            pa.concat_tables(pq.read_table(self.tokens.part_file(part, name)) for part in parts) for name in every
        )
        return tokens, documents

    @cached_property
    def by_feature(self) -> pa.Table:
        return self._values("feature_major")

    @cached_property
    def by_token(self) -> pa.Table:
        return self._values("token_major")

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each feature's values begin in `by_feature`, and the end (F + 1)."""
        n_features = int(self.run.fact("n_features"))
        ids = self.by_feature.column("feature_id").to_numpy()
        return np.searchsorted(ids, np.arange(n_features + 1))

    @cached_property
    def rare(self) -> np.ndarray:
        """True for each feature (F,) that only the first copy has: those that fire about 100 times."""
        counts = np.diff(self.starts)
        rare = np.zeros(len(counts), bool)
        rare[np.argsort(np.abs(counts - 100), kind="stable")[:N_RARE]] = True
        return rare

    def _values(self, order: str) -> pa.Table:
        names = files_of(self.part, order)
        tables = [pq.read_table(self.run.part_file(self.part, name), partitioning=None) for name in names]
        return pa.concat_tables(tables).combine_chunks()


def copied(run_store: Store, run: Artefact, store: Store, n_copies: int, n_threads: int = 2) -> Artefact:
    """Publish a run in `store` that holds `n_copies` of this one, which has one compacted part, and its tokens."""
    original = Original(run, run_store.input_of(run, "tokens"))
    source = _copy_tokens(store, original, n_copies)
    target = store.artefact("features", "made", f"{n_copies:08x}")
    target.create(run.record.facts, [source.id, *run.record.inputs[1:]])
    parts = source.published().parts
    groups = [parts[at : at + PARTS_TOGETHER] for at in range(0, len(parts), PARTS_TOGETHER)]
    with target.writing():
        target.publish([_copy_values(original, target, group, n_copies, n_threads) for group in groups])
    return target


def _copy_tokens(store: Store, original: Original, n_copies: int) -> Artefact:
    source = store.artefact("tokens", "made", f"{n_copies:08x}")
    source.create(original.tokens.record.facts)
    write_vocab(source.path / "vocab.parquet", [f" w{i}" for i in range(N_VOCAB)])
    tokens, documents = original.token_tables
    made = []
    with source.writing():
        for index, first in enumerate(range(0, n_copies, COPIES_A_PART)):
            copies = range(first, min(first + COPIES_A_PART, n_copies))
            shifted = pa.concat_tables(
                _shifted(tokens, {"token_id": c * len(tokens), "document_id": c * len(documents)}) for c in copies
            ).combine_chunks()
            about = pa.concat_tables(_shifted_documents(documents, c, len(tokens)) for c in copies).combine_chunks()
            counts = {
                "first_sequence": first * len(tokens) // LENGTH, "n_sequences": len(shifted) // LENGTH,
                "n_train_sequences": len(shifted) // LENGTH, "first_document": first * len(documents),
                "n_documents": len(about), "n_tokens": len(shifted), "n_train_tokens": len(shifted),
            }  # fmt: skip
            made.append(write_token_tables(source, index, counts, shifted, about))
        source.publish(made)
    return source


def _shifted(table: pa.Table, by: dict[str, int]) -> pa.Table:
    for name, offset in by.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pc.add(table.column(name), offset))
    return table


def _shifted_documents(documents: pa.Table, copy: int, n_tokens: int) -> pa.Table:
    table = _shifted(documents, {"document_id": copy * len(documents), "first_token_id": copy * n_tokens})
    keys = pa.array([f"document {i}" for i in table.column("document_id").to_pylist()])
    return table.set_column(table.schema.get_field_index("key"), "key", keys)


def _copy_values(
    original: Original, target: Artefact, tokens: list[PartRecord], n_copies: int, n_threads: int
) -> PartRecord:
    first = tokens[0].index * COPIES_A_PART
    copies = range(first, min(first + len(tokens) * COPIES_A_PART, n_copies))
    times = np.where(original.rare, int(copies.start == 0), len(copies))
    n_values = int((np.diff(original.starts) * times).sum())
    counts = {"n_tokens": sum(part.counts["n_tokens"] for part in tokens), "n_values": n_values, "n_parts": len(tokens)}
    inputs = {f"{each.index:06d}": stands_for({"tokens": each.folder, "activations": each.folder}) for each in tokens}
    with target.new_part(FIRST_INDEX + tokens[0].index, counts, inputs) as folder:
        of_feature, of_token = USUAL_MERGE.file_values(n_values)
        with ThreadPoolExecutor(n_threads) as pool:
            buckets = feature_buckets(np.diff(original.starts) * times, of_feature)
            list(pool.map(partial(_write_features, original, folder, copies), buckets))
            pieces = _pieces(original, copies, of_token)
            list(pool.map(partial(_write_tokens, original, folder), pieces))
        _write_sample(original, folder, copies)
        for name in PART_TABLES:
            _write_statistics(original, folder, name, len(copies), times)
    return target.made[FIRST_INDEX + tokens[0].index]


def _write_features(original: Original, folder: Path, copies: range, ends: tuple[int, int]) -> None:
    n_tokens = len(original.token_tables[0])
    ids, tokens, values = (original.by_feature.column(name).to_numpy() for name in VALUES["feature_major"].names)
    found: list[list[np.ndarray]] = [[], [], []]
    for feature in range(ends[0], ends[1] + 1):
        at = slice(original.starts[feature], original.starts[feature + 1])
        shifts = [0] * (copies.start == 0) if original.rare[feature] else copies
        found[0].append(np.tile(ids[at], len(shifts)))
        found[1].append(np.add.outer(np.array(shifts, np.int64) * n_tokens, tokens[at]).ravel())
        found[2].append(np.tile(values[at], len(shifts)))
    columns = dict(zip(VALUES["feature_major"].names, map(np.concatenate, found), strict=True))
    write_values(folder, "feature_major", ends, columns)


def _pieces(original: Original, copies: range, at_once: int) -> Iterator[range]:
    step = max(1, round(at_once / len(original.by_token)))
    return (copies[at : at + step] for at in range(0, len(copies), step))


def _write_tokens(original: Original, folder: Path, copies: range) -> None:
    n_tokens = len(original.token_tables[0])
    columns = {name: original.by_token.column(name).to_numpy() for name in VALUES["token_major"].names}
    often = ~original.rare[columns["feature_id"]]
    taken = [slice(None) if copy == 0 else often for copy in copies]
    written = {name: np.concatenate([column[at] for at in taken]) for name, column in columns.items()}
    sizes = [len(columns["token_id"][at]) for at in taken]
    written["token_id"] = written["token_id"] + np.repeat(np.array(copies, np.int64) * n_tokens, sizes)
    ends = copies.start * n_tokens, (copies[-1] + 1) * n_tokens - 1
    write_values(folder, "token_major", ends, written)


def _write_sample(original: Original, folder: Path, copies: range) -> None:
    """Keep the values of the documents whose keys, which are each copy's own, are in the sample."""
    about = original.token_tables[1]
    n_documents, firsts = len(about), about.column("first_token_id").to_numpy()
    n_tokens = len(original.token_tables[0])
    owners = np.searchsorted(firsts, np.arange(n_tokens), "right") - 1
    tokens, ids, values = (original.by_token.column(name).to_numpy() for name in VALUES["token_major"].names)
    writer = SampleWriter(folder, len(original.rare))
    for copy in copies:
        numbers = np.arange(n_documents) + copy * n_documents
        chosen = np.array([is_sampled(f"document {number}") for number in numbers])
        places = np.where(chosen, chosen.cumsum() - 1, -1).astype(np.int32)[owners]
        sampled = SampledDocuments(numbers[chosen], firsts[chosen] + copy * n_tokens, places)
        keep = (places[tokens] >= 0) & ((copy == 0) | ~original.rare[ids])
        there, starts = np.unique(tokens[keep], return_index=True)
        sparse = SparseRows(np.append(starts, keep.sum()), ids[keep], values[keep])
        writer.add(sampled, copy * n_tokens, there + copy * n_tokens, sparse)
        writer.add_documents(sampled, np.ones(n_tokens, bool))
    writer.close()


def _write_statistics(original: Original, folder: Path, name: str, n_copies: int, times: np.ndarray) -> None:
    table = pq.read_table(original.run.part_file(original.part, f"{name}.parquet"))
    ids = table.column("feature_id").to_numpy() if "feature_id" in table.schema.names else None
    factors = np.full(len(table), n_copies) if ids is None else times[ids]
    if "other_id" in table.schema.names:
        factors = np.minimum(factors, times[table.column("other_id").to_numpy()])
    for column in ("n_tokens", "n_both", "sum_value", "sum_squares"):
        if column in table.schema.names:
            field = table.schema.field(column)
            scaled = pa.array(table.column(column).to_numpy() * factors, field.type)
            table = table.set_column(table.schema.get_field_index(column), field, scaled)
    write_table(folder / f"{name}.parquet", table)
