"""A new SAE once the store has grown, encoded and judged like the first."""

from __future__ import annotations

import math
from typing import Any

from saeflow.pipeline import collect, encode, train
from saeflow.pipeline import lineage as seen
from saeflow.pipeline import run as pipeline
from saeflow.pipeline.dask import workers
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store

_LATER = ("encode", "compact", "evaluate", "report")


def grown(store: Store, recipe: Recipe) -> float:
    """By what share the tokens for training have grown since the recipe's newest SAE was trained; of a sweep the
    largest.

    Infinite where none is trained, 0 for an SAE from elsewhere. For one of an earlier saeflow whose generation is
    collected already, growth counts from the oldest that is kept.
    """
    return max(_grown(store, member) for member in recipe.members())


def _grown(store: Store, recipe: Recipe) -> float:
    if recipe.sae.source is not None:
        return 0.0
    stored, trained = collect.artefact(store, recipe), train.artefact(store, recipe)
    if not trained.complete():
        return math.inf
    now, seen = stored.published().total("n_train_tokens"), _n_seen(stored, trained)
    return now / seen - 1 if seen else math.inf


def _n_seen(stored: Artefact, trained: Artefact) -> int:
    """Tokens for training that the store held when the SAE was trained."""
    if (known := seen.n_seen(trained)) is not None:
        return known
    number = int(trained.record.facts["generation"])
    generation = stored.generation(min(each for each in stored.numbers() if each >= number))
    return generation.total("n_train_tokens") if generation else 0


def run(
    store: Store, recipe: Recipe, progress: Progress, share: float | None = None,
    place: pipeline.Place = pipeline.anywhere,
) -> dict[str, Any]:  # fmt: skip
    """Train on what the store holds now, encode and judge; with a share only if the store has grown by it. Says
    which."""
    growth = grown(store, recipe)
    if recipe.sae.source is not None or (share is not None and growth < share):
        asked = "the SAE is from elsewhere" if share is None else f"asked for {share:.1%}"
        progress.say(f"retrain: the store has grown by {growth:.1%} since the newest SAE ({asked}); nothing to do")
        return {"run": recipe.name, "trained": [], "grown": growth}
    with workers.kept_open():
        with place("train"):
            made = train.run_all(store, recipe, progress, fresh=True)
        stages = pipeline.stages(recipe)
        for name in (name for name in _LATER if name in stages):
            with place(name):
                stages[name](store, recipe, progress)
        if recipe.is_sweep:
            with place("encode"):
                pipeline.encode_all(store, recipe, progress)
    runs = [encode.artefact(store, member).id for member in recipe.members()]
    return {"run": recipe.name, "trained": [each.id for each in made], "grown": growth, "runs": runs}
