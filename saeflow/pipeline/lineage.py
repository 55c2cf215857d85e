"""What a training sees: the generation of the activations, the documents hidden in it, and by what an SAE is known."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from saeflow.corpus.selection import TokenSelection
from saeflow.pipeline import collect, import_sae
from saeflow.recipe.fingerprint import fingerprint, settings_that_count
from saeflow.recipe.recipe import Recipe
from saeflow.store.artefact import Artefact
from saeflow.store.files import read_json
from saeflow.store.records import Generation
from saeflow.store.store import Store
from saeflow.train.training import CHECKPOINT


def newest(store: Store, recipe: Recipe) -> Artefact | None:
    """Of the SAEs with the recipe's settings the one that was trained last."""
    settings = _settings(store, recipe)
    trained = [sae for sae in store.artefacts("saes") if sae.name == recipe.name and sae.complete()]
    mine = [sae for sae in trained if _without_seen(sae.record.facts) == settings]
    return sorted(mine, key=lambda sae: float(_provenance(sae).get("written", 0)))[-1] if mine else None


def facts(store: Store, recipe: Recipe) -> dict[str, Any]:
    """What makes a trained SAE the same: what it has seen, and every setting of the training; or what was imported.

    A training that was killed goes on with what it has seen, although more was appended since.
    """
    if recipe.sae.source is not None:
        return import_sae.facts(store, recipe)
    now = collect.artefact(store, recipe).published()
    settings, hidden = _settings(store, recipe), hidden_in(collect.tokens_artefact(store, recipe).published())
    if (number := _begun(store, recipe, settings, hidden, now.number)) is not None:
        return settings | {"generation": number} | hidden
    about = settings | {"generation": now.number} | hidden
    seen, held = n_seen(store.artefact("saes", recipe.name, fingerprint(about))), now.total("n_train_tokens")
    if seen is None or seen == held:
        return about
    return about | {"n_train_tokens": held}  # the activations were removed and made again: their generations, too


def hidden_in(generation: Generation) -> dict[str, str]:
    """A fact about the tokens of a generation: which documents are hidden in it; nothing where none is."""
    return {"hidden": fingerprint(generation.hidden_ids)} if generation.hidden_ids else {}


def _begun(store: Store, recipe: Recipe, settings: dict[str, Any], hidden: dict[str, str], now: int) -> int | None:
    """The generation that a killed training of these settings has seen; None where there is none to go on with.

    It must be newer than the newest SAE's, its list still there, and its tokens as they were.
    """
    left = _half_trained(store, recipe.name)
    if not left:
        return None
    stored, last = collect.artefact(store, recipe), newest(store, recipe)
    first = int(last.record.facts["generation"]) + 1 if last else 1
    for number in (each for each in reversed(stored.numbers()) if first <= each < now):
        known = fingerprint(settings | {"generation": number} | hidden) in left
        if known and _tokens_are_as_then(store, recipe, stored.generation(number)):
            return number
    return None


def _half_trained(store: Store, name: str) -> set[str]:
    """Fingerprints of the SAEs of this name that have a checkpoint."""
    found = store.storage.work_with(CHECKPOINT)
    matches = (re.fullmatch(rf"saes-{re.escape(name)}-([0-9a-f]{{8}})\.checkpoint", each) for each in found)
    return {match[1] for match in matches if match}


def _tokens_are_as_then(store: Store, recipe: Recipe, generation: Generation | None) -> bool:
    """A part that was compacted or made larger since has other tokens than its activations had."""
    parts = {part.index: part for part in collect.tokens_artefact(store, recipe).published().parts}
    return generation is not None and all(
        part.index in parts and parts[part.index].counts == part.counts for part in generation.parts
    )


def n_seen(trained: Artefact) -> int | None:
    """Tokens for training that the store held when the SAE was trained; None where it is not, or does not say."""
    found = _provenance(trained).get("n_train_tokens") if trained.complete() else None
    return None if found is None else int(found)


def _provenance(trained: Artefact) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(read_json(trained.own_file("provenance.json")))
    return {}


def _settings(store: Store, recipe: Recipe) -> dict[str, Any]:
    no_settings = {"checkpoint_seconds", "device"}
    return {
        "activations": collect.artefact(store, recipe).fp,
        "sae": settings_that_count(recipe.sae),
        "train": {name: value for name, value in settings_that_count(recipe.train).items() if name not in no_settings},
        "feed": settings_that_count(recipe.feed),
        "threads": recipe.threads,
    } | TokenSelection.of(collect.tokens_artefact(store, recipe), recipe.activations).facts


def _without_seen(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in ("generation", "hidden", "n_train_tokens")}
