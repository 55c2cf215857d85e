"""Store a user's table of activations, or a synthetic one, as activations of one-token documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from saeflow.activations.epoch import fit_pool
from saeflow.activations.shards import ITEM_BYTES, plan_layout
from saeflow.activations.synthetic import made_rows
from saeflow.activations.tables.source import check_rows, open_table
from saeflow.activations.tables.stream import (
    TableReader,
    TableRows,
    places_in_text_order,
    row_name,
    row_names_in_text_order,
)
from saeflow.activations.writer import as_on_disk, open_writer, to_precision
from saeflow.corpus import token_parts
from saeflow.corpus.document import is_held_out
from saeflow.corpus.token_parts import Packed
from saeflow.corpus.vocabulary import write_vocab
from saeflow.model.sites import Site
from saeflow.pipeline.collect import skipped
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.data_settings import ActivationsConfig, CorpusConfig
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.progress import Bar, Progress
from saeflow.runtime.threads import n_threads
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord


def run(lineage: Lineage, progress: Progress) -> tuple[Artefact, Artefact]:
    """Store the recipe's table, or a synthetic one. Finished parts are kept."""
    recipe, source, target = lineage.recipe, lineage.tokens, lineage.activations
    with source.writing(), target.writing():
        about = recipe.activations
        if source.generation() and target.generation() and not _missing(source, target, about):
            skipped(target, target.published().parts, progress)
            return source, target
        torch.set_num_threads(n_threads(recipe.threads))
        rows = _open(source, target, about)
        if rows.index:
            progress.say(f"activations: {rows.name}: {', '.join(rows.index)} numbers the rows and is no neuron")
        site = Site("table", rows.width)
        row_bytes = site.width * ITEM_BYTES[about.dtype]
        fit_pool(recipe.feed, row_bytes)
        starts = range(0, rows.n_rows, about.part_rows)
        sizes = {index: min(about.part_rows, rows.n_rows - start) for index, start in enumerate(starts)}
        done = _done(source, sizes).keys() & _done(target, sizes).keys()
        n_left = sum(size for index, size in sizes.items() if index not in done)
        lineage.store.require_free(int(n_left * row_bytes * 1.05), "Storing the table")
        pieces = check_rows(rows, progress)
        source.create(lineage.token_facts | {"context_length": 1})
        target.create(lineage.activation_facts | {"stored": [[site.name, site.width]]}, [source.id])
        table = _Table(rows, TableReader(rows), pieces)
        table.write_vocab(source)
        source.storage.send(source.path / "vocab.parquet")
        with progress.bar("activations", rows.n_rows, "rows") as bar:
            bar.resume_at(rows.n_rows - n_left)
            for index, start in enumerate(starts):
                if index not in done:
                    _bring_part(source, target, recipe, site, table, bar, index, start)
        for item in (source, target):
            item.publish(_done(item, sizes).values())
    return source, target


def _open(source: Artefact, target: Artefact, about: ActivationsConfig) -> TableRows:
    """Open the rows to store. Synthetic rows that are stored stay, even if the recipe now asks for fewer."""
    if about.synthetic is None:
        return open_table(str(about.source), about.source_array)
    if not about.synthetic.grows:
        return made_rows(about.synthetic)
    n_samples = max(about.synthetic.n_samples, _n_rows(source), _n_rows(target))
    return made_rows(about.synthetic.model_copy(update={"n_samples": n_samples}))


def _n_rows(item: Artefact) -> int:
    generation = item.generation()
    return generation.total("n_documents") if generation else 0


def _done(item: Artefact, sizes: dict[int, int]) -> dict[int, PartRecord]:
    """Return finished parts of the right size. After rows were appended, the last part is too small."""
    return item.parts(lambda part: part.counts["n_documents"] == sizes.get(part.index))


@dataclass(frozen=True)
class _Table:
    """Rows, their reader, and their distinct labels in text order (None without labels)."""

    rows: TableRows
    reader: TableReader
    pieces: list[str] | None

    def write_vocab(self, source: Artefact) -> None:
        names = row_names_in_text_order(self.rows.n_rows) if self.pieces is None else self.pieces
        write_vocab(source.path / "vocab.parquet", names)

    def vocab_ids(self, labels: list[str], numbers: np.ndarray) -> np.ndarray:
        """int32 (n, 1)"""
        if self.pieces is None:
            places = places_in_text_order(numbers, self.rows.n_rows)
        else:
            places = pc.index_in(pa.array(labels), pa.array(self.pieces)).to_numpy()
        return places.astype(np.int32)[:, None]


def _missing(source: Artefact, target: Artefact, about: ActivationsConfig) -> bool:
    """True if a published part is missing or the recipe asks for more rows than are published."""
    if about.synthetic and about.synthetic.grows and about.synthetic.n_samples > min(_n_rows(source), _n_rows(target)):
        return True
    return any({part.index for part in item.published().parts} - item.parts().keys() for item in (source, target))


def _bring_part(
    source: Artefact, target: Artefact, recipe: Recipe, site: Site, table: _Table, bar: Bar, index: int, start: int
) -> None:
    about = recipe.activations
    n = min(about.part_rows, table.rows.n_rows - start)
    counts = {
        "first_sequence": start, "n_sequences": n, "n_train_sequences": n, "first_document": start,
        "n_documents": n, "n_tokens": n, "n_train_tokens": n,
    }  # fmt: skip
    rows = _PartRows(table, recipe.corpus, np.arange(start, start + n))
    where = PartRecord(index=index, counts=counts, files=[])
    with target.new_part(index, counts) as folder:
        writer = open_writer(folder / site.file, plan_layout(n, 1, site.width, about), about)
        for values, first in rows.in_stored_order():
            writer.append(as_on_disk(to_precision(torch.from_numpy(values)[:, None], about, where, first)))
            bar.advance(len(values))
        writer.close()
        counts["n_train_sequences"] = counts["n_train_tokens"] = n - int(rows.held_out.sum())
    order = np.argsort(rows.held_out, kind="stable")
    documents = pa.table(
        {
            "document_id": rows.numbers, "key": _row_keys(rows.numbers.tolist(), rows.labels),
            "source": ["table"] * n, "content_hash": [""] * n,
            "held_out": rows.held_out, "n_tokens": np.ones(n, np.int64), "first_token_id": start + np.argsort(order),
        }
    )  # fmt: skip
    packed = Packed(table.vocab_ids(rows.labels, rows.numbers)[order], rows.numbers[order, None])
    token_parts.write_part(source, index, counts, packed, documents)


class _PartRows:
    """The rows of one part. As of documents, a share of them is kept for evaluation, chosen by a hash of their keys."""

    def __init__(self, table: _Table, corpus: CorpusConfig | None, numbers: np.ndarray) -> None:
        self._table, self.numbers, self.labels = table, numbers, list[str]()
        self._share, self._seed = (corpus.held_out, corpus.seed) if corpus else (0.0, 0)
        self.held_out = np.zeros(len(numbers), bool)

    def in_stored_order(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield values (n, D) and the place of the block they are from: rows to train on, then the held-out ones.

        Held-out rows are read again, because a part of them may be too large to keep.
        """
        for first, values, labels in self._blocks():
            self._name(first, len(values), labels)
            yield from _chosen_rows(values, ~self.held_out[first : first + len(values)], first)
        if self.held_out.any():
            for first, values, _ in self._blocks():
                yield from _chosen_rows(values, self.held_out[first : first + len(values)], first)

    def _blocks(self) -> Iterator[tuple[int, np.ndarray, list[str] | None]]:
        first, start = 0, int(self.numbers[0])
        for values, labels in self._table.reader.read(start, start + len(self.numbers)):
            yield first, values, labels
            first += len(values)

    def _name(self, first: int, n: int, labels: list[str] | None) -> None:
        self.labels += labels or ()
        if self._share:
            keys = _row_keys(self.numbers[first : first + n].tolist(), labels)
            self.held_out[first : first + n] = [is_held_out(key, self._seed, self._share) for key in keys]


def _row_keys(numbers: list[int], labels: list[str] | None) -> list[str]:
    return [f"{name} #{i}" for i, name in zip(numbers, labels or map(row_name, numbers), strict=True)]


def _chosen_rows(values: np.ndarray, chosen: np.ndarray, first: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the chosen rows, if there are any; all of them are not copied."""
    if chosen.any():
        yield (values if chosen.all() else values[chosen]), first
