"""Documents leave the store, because a user or the corpus no longer wants them.

`forget` and `withdraw` hide them at once in every view and feed. `erase_hidden_tokens` removes them from the disk.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeflow.corpus import forgotten, sources
from saeflow.corpus.document import Document
from saeflow.corpus.forgotten import ForgottenHashes, pair_of
from saeflow.corpus.ledger import Ledger, document_rows, group_by_part, key_hash, merge_hidden
from saeflow.corpus.token_parts import write_token_tables
from saeflow.corpus.tokenise.texts import MARK_TYPES
from saeflow.meaning.language_model.forgetting import drop_forgotten
from saeflow.meaning.token_rules.stored import remove_outdated
from saeflow.pipeline import encode
from saeflow.pipeline.lineage import Ancestors, Lineage
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact
from saeflow.store.records import Generation, Hidden, PartRecord, add_provenance, provenance_value
from saeflow.store.store import Store

_NOTE = "corpus_without_removed"


@dataclass
class Forgotten:
    """What a call hid, by id of token artefact, run and SAE."""

    documents: dict[str, int] = field(default_factory=dict)
    same_texts: int = 0
    """How many of them have another key, and the text of one that was named."""
    already: list[str] = field(default_factory=list)
    """Keys that were forgotten before."""
    runs: list[str] = field(default_factory=list)
    """Runs whose values were removed."""
    waiting: dict[str, str] = field(default_factory=dict)
    """Runs that cannot be encoded again now, and why. Answers leave out their parts until then."""
    saes: list[str] = field(default_factory=list)
    """SAEs that were trained on these documents."""
    held_out_only: list[str] = field(default_factory=list)
    """SAEs from whose training these documents were held out."""
    explanations: int = 0
    """Features whose explanation or scores by a language model quoted these documents. They were removed."""


def forget(store: Store, keys: Sequence[str], progress: Progress) -> Forgotten:
    """Hide every document of these keys, every earlier version of them, and every document with one of their texts.

    The store's list says so from now on: no recipe takes them in again. Raises UserError for unknown keys.
    """
    sources = [source for source in store.artefacts("tokens") if source.generation()]
    named = [row for source in sources for row in _Search(source, keys).rows()]
    known, listed = {row["key"] for row in named}, ForgottenHashes.read(store).keys
    unknown = [key for key in keys if key not in known and key_hash(key) not in listed]
    if unknown:
        raise UserError(
            f"No document is called {', '.join(map(repr, unknown))}. Nothing was hidden.\n"
            "List the keys with `saeflow sql 'select key, source, n_tokens from documents'`."
        )
    texts = _list_forgotten(store, named)  # first, so that a killed call leaves no document to come back
    searches = {source.id: _Search(source, keys, texts) for source in sources}
    found = {name: rows for name, search in searches.items() if (rows := search.rows())}
    _list_forgotten(store, (row for rows in found.values() for row in rows))
    done = Forgotten(already=[key for key in keys if key not in known])
    for name in found:
        late = _hide(searches[name].artefact, searches[name].rows, "forgotten")  # a run may have hidden some itself
        found[name] = list({row["document_id"]: row for row in (*found[name], *late)}.values())
        done.documents[name] = len(found[name])
        done.same_texts += sum(row["key"] not in keys for row in found[name])
    _remove_what_followed(store, found, done, progress)
    return done


def _list_forgotten(store: Store, rows: Iterable[dict[str, Any]]) -> frozenset[str]:
    """Add documents to the store's list. Return the digits that stand for their texts."""
    pairs = {pair_of(key_hash(row["key"]), row["content_hash"]) for row in rows}
    if pairs:
        forgotten.add(store, pairs)
    return ForgottenHashes(frozenset(pairs)).contents


def remember(store: Store, keys: Sequence[str]) -> dict[str, int]:
    """Let forgotten documents of these keys, and those with one of their texts, come in again as new ones.

    Return how many were forgotten, by id of token artefact. Raises UserError for keys that are not forgotten.
    """
    listed, done = ForgottenHashes.read(store), {}
    if unknown := [key for key in keys if key_hash(key) not in listed.keys]:
        raise UserError(f"{', '.join(map(repr, unknown))} is not forgotten in {store.name}. Nothing was changed.")
    wanted = listed.with_same_texts(map(key_hash, keys))
    for source in store.artefacts("tokens"):
        generation = source.generation()
        mine = {each.key_hash for each in _forgotten_in(generation)} & wanted if generation else set()
        if mine:
            done[source.id] = _withdraw_only(source, mine)
    forgotten.drop(store, wanted)  # last, so that a killed call can be made again
    return done


def _withdraw_only(source: Artefact, key_hashes: set[str]) -> int:
    """Let forgotten documents count as withdrawn: hidden, but welcome when they come again."""
    with source.writing():
        generation = source.published()
        chosen = [each for each in _forgotten_in(generation) if each.key_hash in key_hashes]
        fresh = [each.model_copy(update={"reason": "replaced"}) for each in chosen]
        source.publish(generation.parts, hidden=merge_hidden(generation.hidden, group_by_part(fresh, generation.parts)))
    return len(fresh)


def _forgotten_in(generation: Generation) -> list[Hidden]:
    every = (document for documents in generation.hidden.values() for document in documents)
    return [each for each in every if each.reason == "forgotten"]


def withdraw(store: Store, source: Artefact, rows: list[dict[str, Any]], progress: Progress) -> Forgotten:
    """Hide documents that the corpus no longer holds, given as rows of documents.parquet.

    A withdrawn document may come back as a new one. A forgotten one stays away.
    """
    done = Forgotten({source.id: len(rows)})
    _hide(source, lambda: rows, "replaced")
    _remove_what_followed(store, {source.id: rows}, done, progress)
    return done


def _remove_what_followed(
    store: Store, found: dict[str, list[dict[str, Any]]], done: Forgotten, progress: Progress
) -> None:
    """Remove the values of hidden documents and rules that may quote them. List the SAEs that were trained on them."""
    for sae, n in remove_outdated(store).items():
        progress.say(f"{sae}: {n:,} rules removed, as they may quote these documents; make new ones: saeflow explain")
    for run in store.artefacts("features"):  # also runs that a killed call left as they were
        try:
            if run.generation() and encode.refresh(store, run, progress):
                done.runs.append(run.id)
        except (UserError, OSError) as error:  # its views leave these parts out
            done.waiting[run.id] = str(error)
    done.explanations = drop_forgotten(store)
    _list_saes(store, found, done)


@dataclass
class _Search:
    """Looks for documents by their keys or texts. Reads each part once, however often it is asked."""

    artefact: Artefact
    keys: Sequence[str]
    texts: frozenset[str] = frozenset()
    """The first 16 digits of content hashes."""
    _seen: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Return present rows of documents.parquet, with replaced versions, but without forgotten documents."""
        generation = self.artefact.published()
        gone = {each.document_id for each in _forgotten_in(generation)}
        found = (row for part in generation.parts for row in self._rows_of(part))
        return [row for row in found if row["document_id"] not in gone]

    def _rows_of(self, part: PartRecord) -> list[dict[str, Any]]:
        if part.folder not in self._seen:
            path = self.artefact.part_file(part, "documents.parquet")
            table = pq.read_table(path, columns=["document_id", "key", "held_out", "content_hash"])
            texts = pc.utf8_slice_codeunits(table.column("content_hash"), 0, 16)
            by_text = pc.is_in(texts, pa.array(self.texts, pa.string()))
            owned = pc.or_(pc.is_in(table.column("key"), pa.array(self.keys, pa.string())), by_text)
            self._seen[part.folder] = table.filter(owned).to_pylist()
        return self._seen[part.folder]


def _hide(
    source: Artefact, find: Callable[[], list[dict[str, Any]]], reason: Literal["forgotten", "replaced"]
) -> list[dict[str, Any]]:
    """Hide documents that are looked up under the lease: a newer version may have come in before."""
    with source.writing():
        generation, rows = source.published(), find()
        new = [Hidden(document_id=r["document_id"], key_hash=key_hash(r["key"]), reason=reason) for r in rows]
        source.publish(generation.parts, hidden=merge_hidden(generation.hidden, group_by_part(new, generation.parts)))
    return rows


def _list_saes(store: Store, found: dict[str, list[dict[str, Any]]], done: Forgotten) -> None:
    """List SAEs that were trained on a generation which held one of the documents."""
    for sae in (sae for sae in store.artefacts("saes") if sae.record.inputs):
        seen = Ancestors(store, sae)
        new = found.get(seen.tokens.id, [])
        rows = [row for row in new if row["document_id"] < _n_seen(seen.activations, sae)]
        if any(not row["held_out"] for row in rows):
            done.saes.append(sae.id)
        elif rows:
            done.held_out_only.append(sae.id)


def _n_seen(stored: Artefact, sae: Artefact) -> int:
    """Return how many documents existed when the SAE was trained: their numbers are below this.

    An imported SAE saw none. If its activations are gone, an SAE may have seen all.
    """
    if "imported" in sae.record.facts:
        return 0
    number = int(sae.fact("generation"))
    generation = stored.generation(number) if number in stored.numbers() else stored.generation()
    return generation.total("n_documents") if generation else sys.maxsize


def erase_hidden_tokens(source: Artefact, progress: Progress) -> None:
    """Rewrite the token parts that still hold hidden documents.

    Their tokens become padding, so no number changes. Activations and features follow when they are next collected and
    encoded, and `gc` removes the old files.
    """
    with source.writing():
        generation = source.published()
        fresh = {part.index: part for part in generation.parts}
        for index, hidden in generation.hidden.items():
            if fresh[index].counts.get("n_removed_documents", 0) < len(hidden):
                fresh[index] = _without(source, fresh[index], hidden)
        source.publish(fresh.values())
        n_changed = sum(fresh[part.index] != part for part in generation.parts)
        progress.say(f"compact: {n_changed} parts of {source.id} written again")


def _without(source: Artefact, part: PartRecord, hidden: Sequence[Hidden]) -> PartRecord:
    """Write the part with padding in place of the hidden documents, and without their names."""
    ids = pa.array([document.document_id for document in hidden], pa.int64())
    tokens, documents = (pq.read_table(source.part_file(part, f"{name}.parquet")) for name in ("tokens", "documents"))
    gone = pc.is_in(tokens.column("document_id"), ids)
    pad = pa.scalar(0, pa.int32())
    tokens = _replaced(tokens, "vocab_id", pc.if_else(gone, pad, tokens.column("vocab_id")))
    tokens = _replaced(
        tokens, "document_id", pc.if_else(gone, pa.scalar(None, pa.int64()), tokens.column("document_id"))
    )
    tokens = _replaced(tokens, "mask", pc.and_not(tokens.column("mask"), gone))
    for name in (name for name in MARK_TYPES if name in tokens.schema.names):
        column = tokens.column(name)
        tokens = _replaced(tokens, name, pc.if_else(gone, pa.scalar(None, column.type), column))
    documents = documents.filter(pc.invert(pc.is_in(documents.column("document_id"), ids)))
    real = np.asarray(tokens.column("mask").to_numpy(zero_copy_only=False)).reshape(part.counts["n_sequences"], -1)
    counts = part.counts | {
        "n_tokens": int(real.sum()),
        "n_train_tokens": int(real[: part.counts["n_train_sequences"]].sum()),
        "n_removed_documents": len(hidden),
    }
    if "n_offsets" in counts:
        counts["n_offsets"] = len(tokens) - tokens.column("char_start").null_count
    return write_token_tables(source, part.index, counts, tokens, documents)


def _replaced(table: pa.Table, name: str, values: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)


@dataclass(frozen=True)
class Removed:
    """Documents that are gone from the corpus."""

    n: int = 0
    """How many are forgotten now."""
    seen: str | None = None
    """Signature of the corpus that was read, if all documents that it no longer holds are forgotten."""
    refusal: str = ""
    """Why nothing was forgotten, if more than `schedule.most_removed` are gone."""


def forget_removed(lineage: Lineage, progress: Progress) -> Removed:
    """Forget documents that the corpus no longer holds, if `schedule.removed` says so, and never too many at once.

    Reads the corpus once more whenever it has changed. Raises UserError if it cannot be read.
    """
    recipe, source = lineage.recipe, lineage.tokens
    if recipe.schedule.removed == "keep" or recipe.corpus is None or recipe.model is None:
        return Removed()
    about = sources.pin_to_commits(recipe.corpus)
    seen = sources.corpus_signature(about)
    generation = source.generation()
    if generation is None or (seen is not None and seen == provenance_value(source.path, _NOTE)):
        return Removed(seen=seen)
    ledger = Ledger.read(source, generation, ForgottenHashes.read(lineage.store))
    whole = about.model_copy(update={"dedup": False, "share": 1.0})
    look_through(ledger, sources.open_corpus(whole).documents, about)
    gone, n_seen = ledger.ids_not_met(), len(ledger.keys)
    if len(gone) > recipe.schedule.most_removed * n_seen:
        return Removed(refusal=_refusal_to_forget(len(gone), n_seen, recipe.schedule.most_removed))
    if len(gone):
        progress.say(f"removed: {len(gone):,} of {n_seen:,} documents are gone from the corpus and are forgotten")
        withdraw(lineage.store, source, document_rows(source, generation, gone), progress)
    return Removed(len(gone), seen)


def note_seen(source: Artefact, removed: Removed) -> None:
    """Remember that the corpus, as it was read, holds every stored document.

    If the corpus had changed again before it was tokenised, nothing is noted, and the next look reads it again.
    """
    if removed.seen is None:
        return
    if removed.seen == provenance_value(source.path, "corpus") != provenance_value(source.path, _NOTE):
        add_provenance(source.path, {_NOTE: removed.seen})
        source.storage.send(source.path / "provenance.json")


def _refusal_to_forget(n_gone: int, n_seen: int, most: float) -> str:
    return (
        f"{n_gone:,} of {n_seen:,} documents are gone from the corpus, {n_gone / n_seen:.0%}; "
        f"schedule.most_removed is {most:g}. None of them was forgotten; what is new was taken in.\n"
        'Is its disk mounted? If they were meant to go, raise schedule.most_removed, or set schedule.removed to "keep".'
    )


def look_through(ledger: Ledger, documents: Iterator[Document], about: CorpusConfig) -> None:
    """Let the ledger meet all documents of the corpus, also those with repeated texts."""
    read = _without_repeats(documents, ledger) if about.dedup else documents
    deque(ledger.entries_to_store(read, about), maxlen=0)


def _without_repeats(documents: Iterator[Document], ledger: Ledger) -> Iterator[Document]:
    """Yield documents as `corpus.dedup` does. The ledger also meets the repeated ones, which may be stored."""
    seen: set[str] = set()
    for document in documents:
        if document.content_hash in seen:
            ledger.mark_met(document)
        else:
            seen.add(document.content_hash)
            yield document
