"""Documents that are gone from the corpus: forgotten where the recipe says so, and never too many at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from saeflow.corpus import sources
from saeflow.corpus.document import Document
from saeflow.corpus.ledger import Ledger, document_rows
from saeflow.pipeline.lifecycle.forget import withdraw
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.settings import CorpusConfig
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact
from saeflow.store.records import add_provenance, provenance_value

_NOTE = "corpus_without_removed"


@dataclass(frozen=True)
class Removed:
    """What a look for removed documents found."""

    n: int = 0
    """Documents that are forgotten now."""
    seen: str | None = None
    """The signature of the corpus that was looked at, if all that it no longer holds is forgotten."""
    refusal: str = ""
    """Why nothing was forgotten, where more than `schedule.most_removed` are gone."""


def forget_removed(lineage: Lineage, progress: Progress) -> Removed:
    """Forget what the corpus no longer holds, if `schedule.removed` says so.

    Reads the corpus once more whenever it has changed. Raises UserError where it cannot be read.
    """
    recipe, source = lineage.recipe, lineage.tokens
    if recipe.schedule.removed == "keep" or recipe.corpus is None or recipe.model is None:
        return Removed()
    about = sources.pin_to_commits(recipe.corpus)
    seen = sources.corpus_signature(about)
    generation = source.generation()
    if generation is None or (seen is not None and seen == provenance_value(source.path, _NOTE)):
        return Removed(seen=seen)
    ledger = Ledger.read(source, generation)
    whole = about.model_copy(update={"dedup": False, "share": 1.0})
    look_through(ledger, sources.open_corpus(whole).documents, about)
    gone, n_seen = ledger.ids_not_met(), len(ledger.keys)
    if len(gone) > recipe.schedule.most_removed * n_seen:
        return Removed(refusal=_refusal(len(gone), n_seen, recipe.schedule.most_removed))
    if len(gone):
        progress.say(f"removed: {len(gone):,} of {n_seen:,} documents are gone from the corpus and are forgotten")
        withdraw(lineage.store, source, document_rows(source, generation, gone), progress)
    return Removed(len(gone), seen)


def note_seen(source: Artefact, removed: Removed) -> None:
    """Remember that the corpus, as it was when it was looked at, holds every document that is stored.

    Nothing is noted where the stored tokens are of a corpus that had changed by then: the next look reads it again.
    """
    if removed.seen is None:
        return
    if removed.seen == provenance_value(source.path, "corpus") != provenance_value(source.path, _NOTE):
        add_provenance(source.path, {_NOTE: removed.seen})
        source.storage.send(source.path / "provenance.json")


def _refusal(n_gone: int, n_seen: int, most: float) -> str:
    return (
        f"{n_gone:,} of {n_seen:,} documents are gone from the corpus, {n_gone / n_seen:.0%}; "
        f"schedule.most_removed is {most:g}. None of them was forgotten; what is new was taken in.\n"
        'Is its disk mounted? If they were meant to go, raise schedule.most_removed, or set schedule.removed to "keep".'
    )


def look_through(ledger: Ledger, documents: Iterator[Document], about: CorpusConfig) -> None:
    """Let the ledger meet the documents of the whole corpus, repeated texts among them."""
    read = _without_repeats(documents, ledger) if about.dedup else documents
    deque(ledger.entries_to_store(read, about), maxlen=0)


def _without_repeats(documents: Iterator[Document], ledger: Ledger) -> Iterator[Document]:
    """As `corpus.dedup` reads them. One that is left out now but was stored before, when it came first, is there,
    too."""
    seen: set[str] = set()
    for document in documents:
        if document.content_hash in seen:
            ledger.mark_met(document)
        else:
            seen.add(document.content_hash)
            yield document
