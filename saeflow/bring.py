"""Bring your own: a table of activations, or a made one, stored as activations of one-token documents."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from saeflow import brought, tokens
from saeflow.activations import artefact, brought_facts, facts, skipped, tokens_artefact
from saeflow.arrays import plan_layout
from saeflow.config import Recipe
from saeflow.model import Site
from saeflow.parallel import n_threads
from saeflow.progress import Progress
from saeflow.store import Artefact, PartRecord, Store
from saeflow.vocab import write_vocab
from saeflow.writer import Writer, stored


def run(store: Store, recipe: Recipe, progress: Progress) -> tuple[Artefact, Artefact]:
    """Store a user's table, or a made one, as activations of one-token documents."""
    source, target = tokens_artefact(store, recipe), artefact(store, recipe)
    with source.writing(), target.writing():
        if source.generation() and target.generation() and not _missing(source, target):
            skipped(target, progress)
            return source, target
        about = recipe.activations
        torch.set_num_threads(n_threads(recipe.threads))
        table = brought.make_table(about.synthetic) if about.synthetic else brought.read_table(str(about.source))
        site = Site("table", table.values.shape[1])
        store.require_free(int(table.values.nbytes * 1.05), "Storing the table")
        source.begin(brought_facts(recipe) | {"context_length": 1})
        target.begin(facts(store, recipe) | {"stored": [[site.name, site.width]]}, [source.id])
        pieces = sorted(set(table.labels))
        write_vocab(source.path / "vocab.parquet", pieces, [piece.encode() for piece in pieces])
        source.send(source.path / "vocab.parquet")
        with progress.bar("activations", len(table.labels), "rows") as bar:
            for index, start in enumerate(range(0, len(table.labels), about.part_rows)):
                _bring_part(source, target, recipe, site, table, pieces, index, start)
                bar.advance(min(about.part_rows, len(table.labels) - start))
        for item in (source, target):
            item.publish(item.parts().values())
    return source, target


def _missing(source: Artefact, target: Artefact) -> list[PartRecord]:
    parts = [(item, part) for item in (source, target) for part in item.published().parts]
    return [part for item, part in parts if part.index not in item.parts()]


def _bring_part(
    source: Artefact, target: Artefact, recipe: Recipe, site: Site,
    table: brought.Table, pieces: list[str], index: int, start: int,
) -> None:  # fmt: skip
    labels = table.labels[start : start + recipe.activations.part_rows]
    numbers = np.arange(start, start + len(labels))
    place = {piece: i for i, piece in enumerate(pieces)}
    packed = tokens.Packed(np.array([[place[label]] for label in labels], np.int32), numbers[:, None])
    n = len(labels)
    counts = {
        "first_sequence": start, "n_sequences": n, "n_train_sequences": n, "first_document": start,
        "n_documents": n, "n_tokens": n, "n_train_tokens": n,
    }  # fmt: skip
    documents = pa.table(
        {
            "document_id": numbers, "key": [f"{label} #{i}" for i, label in zip(numbers, labels, strict=True)],
            "source": ["table"] * n, "content_hash": [""] * n, "held_out": [False] * n,
            "n_tokens": np.ones(n, np.int64), "first_token_id": numbers,
        }
    )  # fmt: skip
    record = tokens.write_part(source, index, counts, packed, documents)
    values = torch.from_numpy(table.values[start : start + n, None, :])
    with target.new_part(index, counts) as folder:
        writer = Writer(folder / site.file, plan_layout(n, 1, site.width, recipe.activations), recipe.activations.dtype)
        writer.append(stored(values, recipe.activations, record, 0))
        writer.close()
