"""Remove what was made of forgotten documents: answers, and explanations, scores and mistakes that follow from them.

An explanation may quote its examples, so it goes with any of their documents. `saeflow explain` makes a new one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from saeflow.features.schema import EXPLANATION_MISTAKES, EXPLANATION_SCORES
from saeflow.meaning.beside_labels import path_beside, read_beside, write_beside
from saeflow.meaning.language_model.cache import AnswerCache, CachedAnswer
from saeflow.query.labels import put
from saeflow.store.store import Store

_JOURNAL = "answers-"


def drop_forgotten(store: Store) -> int:
    """Remove what every source made of hidden documents. Return how many features need a new explanation or score.

    Labels that somebody else wrote stay; only their scores go. Safe to repeat after a kill.
    """
    hidden = _hidden_documents(store)
    return sum(_drop(cache, hidden) for cache in answer_caches(store)) if any(hidden.values()) else 0


def drop_forgotten_of(cache: AnswerCache) -> int:
    """Remove what one source made of hidden documents. Return how many features need a new explanation or score."""
    hidden = _hidden_documents(cache.store)
    return _drop(cache, hidden) if any(hidden.values()) else 0


def _hidden_documents(store: Store) -> dict[str, set[int]]:
    """Return the numbers of hidden documents by artefact of tokens."""
    generations = ((artefact.id, artefact.generation()) for artefact in store.artefacts("tokens"))
    return {name: set(generation.hidden_ids) for name, generation in generations if generation}


def answer_caches(store: Store) -> Iterator[AnswerCache]:
    """Yield the answers of every source of every SAE, those that are only in a journal too."""
    found = set()
    for name in sorted(store.storage.names_below(store.root / "labels")):
        sae, _, file = name.partition("/")
        if file.endswith(".answers.parquet") and "/" not in file:
            found.add((sae, file.removesuffix(".answers.parquet")))
    saes = sorted((sae.path.name for sae in store.artefacts("saes")), key=len, reverse=True)
    for name in sorted(store.storage.work.names()):
        sae = next((sae for sae in saes if name.startswith(f"{_JOURNAL}{sae}-") and name.endswith(".jsonl")), "")
        if sae:
            found.add((sae, name.removeprefix(f"{_JOURNAL}{sae}-").removesuffix(".jsonl")))
    return (AnswerCache(store, sae, source) for sae, source in sorted(found))


def _drop(cache: AnswerCache, hidden: dict[str, set[int]]) -> int:
    if not any(_quotes(answer, hidden) for answer in cache.every()):
        return 0
    with cache.locked():
        every, answers_tag = cache.every_with_tag()
        gone = [answer for answer in every if _quotes(answer, hidden)]
        features = sorted({answer.feature_id for answer in gone})
        explained = {answer.feature_id for answer in gone if answer.method == "explanation"}
        if explained:
            put(cache.store, f"saes/{cache.sae}", cache.source, dict.fromkeys(explained))
        for table, schema in (("mistakes", EXPLANATION_MISTAKES), ("scores", EXPLANATION_SCORES)):
            path = path_beside(cache.store, cache.sae, cache.source, table)
            old, tag = read_beside(cache.store, path, schema)
            kept_rows = old.filter(pc.invert(pc.is_in(old.column("feature_id"), _ids(features))))
            write_beside(cache.store, path, kept_rows, tag)
        # An answer about a feature whose explanation goes may repeat that explanation.
        kept = (answer for answer in every if answer.feature_id not in explained)
        cache.replace((answer for answer in kept if not _quotes(answer, hidden)), answers_tag)
    return len(features)


def _quotes(answer: CachedAnswer, hidden: dict[str, set[int]]) -> bool:
    return not hidden.get(answer.tokens, set()).isdisjoint(answer.document_ids)


def _ids(features: list[int]) -> pa.Array:
    return pa.array(features, pa.int32())
