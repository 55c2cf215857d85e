"""Documents that are gone from the corpus: forgotten where the recipe says so, and never too many at once."""

from __future__ import annotations

import contextlib
import re
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from saeflow import activations, corpus
from saeflow.artefact import Artefact
from saeflow.config import Recipe
from saeflow.disk import read_json
from saeflow.forget import withdraw
from saeflow.ledger import key_hash
from saeflow.progress import Progress
from saeflow.records import note_provenance
from saeflow.sections import CorpusConfig, UserError
from saeflow.store import Store

_BY_CONTENT = re.compile(r"(?s)(.*)#([0-9a-f]{8})(?: \(\d+\))?")
"""The key of a document whose own key came before in the corpus."""

_NOTE = "corpus_without_removed"


def forget_removed(store: Store, recipe: Recipe, progress: Progress) -> int:
    """Forget what the corpus no longer holds, if `schedule.removed` says so; how many documents that were.

    Reads the corpus once more whenever it has changed. Raises UserError where more than `schedule.most_removed` are gone.
    """
    if recipe.schedule.removed == "keep" or recipe.corpus is None or recipe.model is None:
        return 0
    source, seen = activations.tokens_artefact(store, recipe), corpus.signature(corpus.pinned(recipe.corpus))
    if source.generation() is None or (seen is not None and seen == _last_seen(source)):
        return 0
    n_seen, gone = _gone(source, corpus.pinned(recipe.corpus))
    if len(gone) > recipe.schedule.most_removed * n_seen:
        raise UserError(
            f"{len(gone):,} of {n_seen:,} documents are gone from the corpus, {len(gone) / n_seen:.0%}; "
            f"schedule.most_removed is {recipe.schedule.most_removed:g}. Nothing was forgotten.\n"
            'Is its disk mounted? If they were meant to go, raise schedule.most_removed, or set schedule.removed to "keep".'
        )
    if gone:
        progress.say(f"removed: {len(gone):,} of {n_seen:,} documents are gone from the corpus and are forgotten")
        withdraw(store, source, gone, progress)
    return len(gone)


def note_seen(store: Store, recipe: Recipe) -> None:
    """Remember that the corpus as it is now holds every document that is stored."""
    if recipe.schedule.removed == "forget" and recipe.corpus is not None and recipe.model is not None:
        source, seen = activations.tokens_artefact(store, recipe), corpus.signature(corpus.pinned(recipe.corpus))
        if seen is not None and seen != _last_seen(source) and seen == _note(source, "corpus"):
            note_provenance(source.path, {_NOTE: seen})
            source.send(source.path / "provenance.json")


def _last_seen(source: Artefact) -> str | None:
    return _note(source, _NOTE)


def _note(source: Artefact, name: str) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(read_json(source.path / "provenance.json")[name])
    return None


def _gone(source: Artefact, about: CorpusConfig) -> tuple[int, list[dict[str, Any]]]:
    """How many documents readers see, and those that the corpus does not hold."""
    keys, contents = array("Q"), array("Q")
    for document in corpus.open_corpus(about.model_copy(update={"dedup": False, "share": 1.0})).documents:
        keys.append(_number(document.key))
        contents.append(_number(f"{document.key}#{document.content_hash[:8]}"))
    every = np.unique(np.concatenate([np.frombuffer(each, np.uint64) for each in (keys, contents)]))
    rows = list(_visible(source))
    named = [
        (row["key"], found[1] + "#" + found[2] if (found := _BY_CONTENT.fullmatch(row["key"])) else None)
        for row in rows
    ]
    present = [_holds(every, key) or (again is not None and _holds(every, again)) for key, again in named]
    return len(rows), [row for row, there in zip(rows, present, strict=True) if not there]


def _visible(source: Artefact) -> Iterator[dict[str, Any]]:
    generation = source.published()
    hidden = set(generation.hidden_ids)
    for part in generation.parts:
        table = pq.read_table(source.part_file(part, "documents.parquet"), columns=["document_id", "key", "held_out"])
        yield from (row for row in table.to_pylist() if row["document_id"] not in hidden)


def _holds(ascending: np.ndarray, key: str) -> bool:
    wanted = np.uint64(_number(key))
    place = int(np.searchsorted(ascending, wanted))
    return place < len(ascending) and bool(ascending[place] == wanted)


def _number(key: str) -> int:
    return int(key_hash(key), 16)
