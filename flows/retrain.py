"""Flow: a new SAE on the present store, encoded and judged, if the store has grown enough."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.support.reporting import reporting, show_table
from flows.support.tasks import in_task, open_lineage, places
from saeflow.pipeline.lifecycle import ingest
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-retrain", flow_run_name="retrain-{recipe.name}")
def retrain_flow(recipe: Recipe, store: str | None = None, share: float | None = None) -> dict[str, Any]:
    """Train anew, encode and judge.

    Args:
        share: Train only if the store has grown by this share since the newest SAE. Empty: train in any case.
    """
    lineage = open_lineage(recipe, store, overlap="wait")
    with reporting("retrain") as progress:
        made = in_task("retrain", lambda: ingest.retrain(lineage.anew(), progress, share, places(recipe)))
    show_table("retrain", {"grown": f"{made['grown']:.1%}", "trained": ", ".join(made["trained"]) or "nothing"})
    return made
