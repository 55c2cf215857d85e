"""Flow: a new SAE on what the store holds now, encoded and judged. It ends at once where the store has not grown
enough."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.support.gpu import places
from flows.support.reporting import reporting, show_table
from flows.support.tasks import open_store, part_task
from saeflow.pipeline.lifecycle import retrain
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-retrain", flow_run_name="retrain-{recipe.name}")
def retrain_flow(recipe: Recipe, store: str | None = None, share: float | None = None) -> dict[str, Any]:
    """Train anew, encode and judge.

    Args:
        share: Only if the store has grown by this share since the newest SAE was trained; empty: in any case.
    """
    opened = open_store(recipe, store, overlap="wait")
    with reporting("retrain") as progress:

        @part_task("retrain")
        def train_anew() -> dict[str, Any]:
            return retrain.run(Lineage(opened, recipe), progress, share, places(recipe))

        made = dict(train_anew())
    show_table("retrain", {"grown": f"{made['grown']:.1%}", "trained": ", ".join(made["trained"]) or "nothing"})
    return made
