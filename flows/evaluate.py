"""Flow: the figures and the picture of a run."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.support.reporting import reporting, show_table
from flows.support.tasks import in_task, open_lineage, places
from saeflow.pipeline.judge import evaluate, report
from saeflow.query import catalog
from saeflow.recipe.recipe import Recipe, require_one


@flow(name="saeflow-evaluate", flow_run_name="evaluate {recipe.name}")
def evaluate_flow(recipe: Recipe, store: str | None = None) -> dict[str, float]:
    """Write the figures of quality and the picture beside the run's features."""
    require_one(recipe, "evaluate")
    lineage = open_lineage(recipe, store)
    with reporting("evaluate") as progress, places(recipe)("evaluate"):

        def judge() -> dict[str, Any]:
            quality = evaluate.run(lineage, progress)
            report.run(lineage, progress)
            return quality

        quality = in_task("evaluate", judge)
    catalog.write_catalog(lineage.store)
    show_table("evaluate", quality)
    return quality
