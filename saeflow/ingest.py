"""A corpus that changes, brought through every stage: what is new is read, stored, encoded and can be asked about."""

from __future__ import annotations

from typing import Any

from saeflow import activations, catalog, features, integrity, pipeline, retrain, train
from saeflow.artefact import Artefact
from saeflow.config import Recipe
from saeflow.progress import Progress
from saeflow.removed import forget_removed, note_seen
from saeflow.sections import UserError
from saeflow.store import Store

_FIRST = ("tokens", "collect", "bring")
"""Stages that every run of a store shares."""


def run(store: Store, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Bring new and changed documents through every stage, and forget removed ones if the recipe says so.

    Every published run over these activations encodes what is new; one that another run is writing does at the next
    ingest. Where the recipe's newest SAE has no run yet, it is trained, encoded and judged. Where nothing has changed, only
    records are read. The summary counts what is new: documents and tokens, and the indices of parts by artefact. Raises
    UserError where a run could not follow, after the others have, and where too many documents are gone to be forgotten.
    """
    before = _folders(store)
    removed = forget_removed(store, recipe, progress)
    stages = pipeline.stages(recipe)
    for name in (name for name in _FIRST if name in stages):
        stages[name](store, recipe, progress)
    note_seen(store, recipe, removed)
    trained = not _has_run(store, recipe) and _make_run(store, recipe, progress)
    waiting = _encode_new(store, recipe, progress)
    catalog.write(store)
    failed = [f"{name} does not hold the new documents yet: {why}" for name, why in waiting.items()]
    if removed.refusal or failed:
        raise UserError("\n".join(filter(None, [removed.refusal, *failed])))
    return _summary(store, recipe, before) | {
        "n_removed": removed.n, "trained": trained, "grown": retrain.grown(store, recipe),
    }  # fmt: skip


def _has_run(store: Store, recipe: Recipe) -> bool:
    """Is every SAE of the recipe trained, encoded and judged?"""
    runs = [features.artefact(store, member) for member in recipe.members()]
    return all(each.generation() is not None for each in runs) and (
        recipe.is_sweep or (runs[0].path / "quality.json").is_file()
    )


def _make_run(store: Store, recipe: Recipe, progress: Progress) -> bool:
    """Train, encode and judge what is missing, unless another run is at that already."""
    for member in recipe.members():
        for each in (train.artefact(store, member), features.artefact(store, member)):
            if integrity.at_work(each):
                progress.say(f"ingest: another run is making {each.id}")
                return False
    pipeline.run(store, recipe, progress)
    if recipe.is_sweep:
        pipeline.encode_all(store, recipe, progress)
    return True


def _encode_new(store: Store, recipe: Recipe, progress: Progress) -> dict[str, str]:
    """Let every published run over the recipe's activations hold all of them; those that cannot, and why."""
    waiting = {}
    for each in runs_over(store, recipe):
        if integrity.at_work(each):
            progress.say(f"ingest: another run is writing {each.id}, which follows at the next ingest")
            continue
        try:
            features.refresh(store, each, progress, grow=True)
        except (UserError, OSError) as error:
            waiting[each.id] = str(error)
    return waiting


def runs_over(store: Store, recipe: Recipe) -> list[Artefact]:
    """The published runs that read the recipe's activations, its own and others."""
    stored = activations.artefact(store, recipe).id
    return [each for each in store.artefacts("features") if stored in each.record.inputs and each.generation()]


def _folders(store: Store) -> dict[str, set[str]]:
    """The published parts of every artefact."""
    found = {each.id: each.generation() for each in store.artefacts("tokens", "activations", "features")}
    return {name: {part.folder for part in generation.parts} for name, generation in found.items() if generation}


def _summary(store: Store, recipe: Recipe, before: dict[str, set[str]]) -> dict[str, Any]:
    source, stored = activations.tokens_artefact(store, recipe), activations.artefact(store, recipe)
    parts = {
        each.id: [part for part in each.published().parts if part.folder not in before.get(each.id, ())]
        for each in (source, stored, *runs_over(store, recipe))
    }
    return {
        "run": recipe.name,
        "store": store.name,
        **{count: sum(part.counts[count] for part in parts[source.id]) for count in ("n_documents", "n_tokens")},
        "parts": {name: [part.index for part in fresh] for name, fresh in parts.items()},
    }
