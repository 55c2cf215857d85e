"""A new SAE once the store has grown, encoded and judged like the first."""

from __future__ import annotations

import math
from typing import Any

from saeflow.pipeline import run as pipeline
from saeflow.pipeline import train
from saeflow.pipeline.dask.clusters import kept_open
from saeflow.pipeline.lineage import Lineage, n_tokens_seen
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact


def grown(lineage: Lineage) -> float:
    """The share by which the training tokens have grown since the recipe's newest SAE; of a sweep the largest.

    Infinite where none is trained, 0 for an SAE from elsewhere. For one of an earlier saeflow whose generation is
    collected already, growth counts from the oldest that is kept.
    """
    return max(map(_grown, lineage.members))


def _grown(lineage: Lineage) -> float:
    if lineage.recipe.sae.source is not None:
        return 0.0
    stored, trained = lineage.activations, lineage.sae
    if not trained.complete():
        return math.inf
    now, then = stored.published().total("n_train_tokens"), _n_tokens_trained_on(stored, trained)
    return now / then - 1 if then else math.inf


def _n_tokens_trained_on(stored: Artefact, trained: Artefact) -> int:
    """Tokens for training that the store held when the SAE was trained."""
    if (known := n_tokens_seen(trained)) is not None:
        return known
    number = int(trained.record.facts["generation"])
    generation = stored.generation(min(each for each in stored.numbers() if each >= number))
    return generation.total("n_train_tokens") if generation else 0


def run(
    lineage: Lineage, progress: Progress, share: float | None = None,
    place: pipeline.Place = pipeline.anywhere,
) -> dict[str, Any]:  # fmt: skip
    """Train on what the store holds now, encode and judge; with a `share` only if the store has grown by it."""
    recipe, growth = lineage.recipe, grown(lineage)
    if recipe.sae.source is not None or (share is not None and growth < share):
        asked = "the SAE is from elsewhere" if share is None else f"asked for {share:.1%}"
        progress.say(f"retrain: the store has grown by {growth:.1%} since the newest SAE ({asked}); nothing to do")
        return {"run": recipe.name, "trained": [], "grown": growth}
    fresh = lineage.anew(fresh=True)
    with kept_open():
        with place("train"):
            made = train.run_all(fresh, progress)
        stages = list(pipeline.stages(recipe).items())
        last = [name for name, _ in stages].index("train")
        for name, stage in stages[last + 1 :]:
            with place(name):
                stage(fresh, progress)
    runs = [member.features.id for member in fresh.members]
    return {"run": recipe.name, "trained": [each.id for each in made], "grown": growth, "runs": runs}
