"""Documents leave the store: hidden at once in every view and feed, then removed from the disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeflow.corpus.ledger import group_by_part, key_hash, merge_hidden
from saeflow.corpus.token_parts import write_tables
from saeflow.pipeline import encode
from saeflow.pipeline.lineage import Ancestors
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact
from saeflow.store.records import Generation, Hidden, PartRecord
from saeflow.store.store import Store


@dataclass
class Forgotten:
    """What a call hid: documents by token artefact, runs whose values were removed, SAEs that were trained on them."""

    documents: dict[str, int] = field(default_factory=dict)
    already: list[str] = field(default_factory=list)
    """Keys that were forgotten before."""
    runs: list[str] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    """Runs whose parts are left out of every answer until they can be encoded again, and why they cannot be now."""
    saes: list[str] = field(default_factory=list)
    held_out_only: list[str] = field(default_factory=list)
    """SAEs of a store that held these documents, but only outside of training."""


def forget(store: Store, keys: Sequence[str], progress: Progress) -> Forgotten:
    """Hide every document of these keys, and every earlier version of them. Raises UserError for keys nobody has."""
    sources = {source.id: _Search(source, keys) for source in store.artefacts("tokens") if source.generation()}
    found = {name: source.rows() for name, source in sources.items()}
    known = {row["key"] for rows in found.values() for row in rows}
    unknown = [key for key in keys if key not in known and not _forgotten((s.artefact for s in sources.values()), key)]
    if unknown:
        raise UserError(
            f"No document is called {', '.join(map(repr, unknown))}. Nothing was hidden.\n"
            "List the keys with `saeflow sql 'select key, source, n_tokens from documents'`."
        )
    done = Forgotten(already=[key for key in keys if key not in known])
    for name, rows in found.items():
        if rows:
            found[name] = _hide(sources[name].artefact, sources[name].rows, "forgotten")
            done.documents[name] = len(found[name])
    _follow(store, found, done, progress)
    return done


def withdraw(store: Store, source: Artefact, rows: list[dict[str, Any]], progress: Progress) -> Forgotten:
    """Hide documents of one token artefact, given as rows of documents.parquet: its corpus no longer holds them.

    One that comes back is a new document, while a forgotten one stays away.
    """
    done = Forgotten({source.id: len(rows)})
    _hide(source, lambda: rows, "replaced")
    _follow(store, {source.id: rows}, done, progress)
    return done


def _follow(store: Store, found: dict[str, list[dict[str, Any]]], done: Forgotten, progress: Progress) -> None:
    """Remove the values of what was hidden, and list the SAEs that were trained on it."""
    for run in store.artefacts("features"):  # also those that a killed call has left
        try:
            if run.generation() and encode.refresh(store, run, progress):
                done.runs.append(run.id)
        except UserError as error:  # its views leave these parts out
            done.waiting[run.id] = str(error)
    _list_saes(store, found, done)


@dataclass
class _Search:
    """Looks for documents by their keys; in each part once, however often it is asked."""

    artefact: Artefact
    keys: Sequence[str]
    _seen: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Rows of documents.parquet as it is now, replaced versions included, forgotten ones not."""
        generation = self.artefact.published()
        gone = {d.document_id for each in generation.hidden.values() for d in each if d.reason == "forgotten"}
        found = (row for part in generation.parts for row in self._rows_of(part))
        return [row for row in found if row["document_id"] not in gone]

    def _rows_of(self, part: PartRecord) -> list[dict[str, Any]]:
        if part.folder not in self._seen:
            path = self.artefact.part_file(part, "documents.parquet")
            table = pq.read_table(path, columns=["document_id", "key", "held_out"])
            owned = pc.is_in(table.column("key"), pa.array(self.keys, pa.string()))
            self._seen[part.folder] = table.filter(owned).to_pylist()
        return self._seen[part.folder]


def _forgotten(sources: Iterable[Artefact], key: str) -> bool:
    """Was this key forgotten before?"""
    hashed = key_hash(key)
    every = (d for source in sources for each in source.published().hidden.values() for d in each)
    return any(d.key_hash == hashed and d.reason == "forgotten" for d in every)


def _hide(
    source: Artefact, find: Callable[[], list[dict[str, Any]]], reason: Literal["forgotten", "replaced"]
) -> list[dict[str, Any]]:
    """What is hidden is found once the lease is held: a newer version may have come in since somebody looked."""
    with source.writing():
        generation, rows = source.published(), find()
        new = [Hidden(document_id=r["document_id"], key_hash=key_hash(r["key"]), reason=reason) for r in rows]
        source.publish(generation.parts, hidden=merge_hidden(generation.hidden, group_by_part(new, generation.parts)))
    return rows


def _list_saes(store: Store, found: dict[str, list[dict[str, Any]]], done: Forgotten) -> None:
    """SAEs that were trained on a generation which held one of the documents."""
    for sae in (sae for sae in store.artefacts("saes") if sae.record.inputs):
        seen = Ancestors(store, sae)
        new = found.get(seen.tokens.id, [])
        rows = [row for row in new if row["document_id"] < _n_seen(seen.activations, sae)]
        if any(not row["held_out"] for row in rows):
            done.saes.append(sae.id)
        elif rows:
            done.held_out_only.append(sae.id)


def _n_seen(stored: Artefact, sae: Artefact) -> int:
    """Documents that existed when the SAE was trained: their numbers are below this. One that was imported saw none;
    where its activations are gone nobody knows, and it may have seen all."""
    if "imported" in sae.record.facts:
        return 0
    number = int(sae.record.facts["generation"])
    generation = stored.generation(number) if number in stored.numbers() else stored.generation()
    return generation.total("n_documents") if generation else sys.maxsize


def seen(source: Artefact) -> dict[str, int]:
    """Documents and tokens that readers see: all but the hidden ones, which a compacted part still counts as
    documents."""
    generation = source.published()
    n_tokens = generation.total("n_tokens")
    for part in generation.parts:
        ids = pa.array([document.document_id for document in generation.hidden.get(part.index, ())], pa.int64())
        if len(ids):
            table = pq.read_table(source.part_file(part, "documents.parquet"), columns=["document_id", "n_tokens"])
            hidden = table.filter(pc.is_in(table.column("document_id"), ids))
            n_tokens -= pc.sum(hidden.column("n_tokens")).as_py() or 0
    return {"n_documents": generation.total("n_documents") - len(generation.hidden_ids), "n_tokens": n_tokens}


def compact(store: Store, source: Artefact, progress: Progress) -> list[int]:
    """Rewrite the token parts that still hold hidden documents; indices of these parts.

    Their tokens become padding, so that no number changes; activations and features follow when they are next
    collected and encoded, and `gc` removes the old files.
    """
    with source.writing():
        generation = source.published()
        fresh = {part.index: part for part in generation.parts}
        for index, hidden in generation.hidden.items():
            if fresh[index].counts.get("n_removed_documents", 0) < len(hidden):
                fresh[index] = _without(source, fresh[index], hidden)
        source.publish(fresh.values())
        progress.say(f"compact: {len(_changed(generation, fresh))} parts of {source.id} written again")
        return _changed(generation, fresh)


def _changed(generation: Generation, fresh: dict[int, PartRecord]) -> list[int]:
    return [part.index for part in generation.parts if fresh[part.index] != part]


def _without(source: Artefact, part: PartRecord, hidden: Sequence[Hidden]) -> PartRecord:
    """The part with padding in place of the hidden documents, and their names left out."""
    ids = pa.array([document.document_id for document in hidden], pa.int64())
    tokens, documents = (pq.read_table(source.part_file(part, f"{name}.parquet")) for name in ("tokens", "documents"))
    gone = pc.is_in(tokens.column("document_id"), ids)
    pad = pa.scalar(0, pa.int32())
    tokens = _replaced(tokens, "vocab_id", pc.if_else(gone, pad, tokens.column("vocab_id")))
    tokens = _replaced(
        tokens, "document_id", pc.if_else(gone, pa.scalar(None, pa.int64()), tokens.column("document_id"))
    )
    tokens = _replaced(tokens, "mask", pc.and_not(tokens.column("mask"), gone))
    documents = documents.filter(pc.invert(pc.is_in(documents.column("document_id"), ids)))
    real = np.asarray(tokens.column("mask").to_numpy(zero_copy_only=False)).reshape(part.counts["n_sequences"], -1)
    counts = part.counts | {
        "n_tokens": int(real.sum()),
        "n_train_tokens": int(real[: part.counts["n_train_sequences"]].sum()),
        "n_removed_documents": len(hidden),
    }
    return write_tables(source, part.index, counts, tokens, documents)


def _replaced(table: pa.Table, name: str, values: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)
