"""Flow: judge the SAE on held-out documents and draw the run's picture."""

from __future__ import annotations

from prefect import flow

from flows.support.gpu import places
from flows.support.reporting import reporting, show_table
from flows.support.tasks import open_store, part_task
from saeflow.pipeline import evaluate, report
from saeflow.pipeline.lineage import Lineage
from saeflow.query import catalog
from saeflow.recipe.recipe import Recipe, require_one


@flow(name="saeflow-evaluate", flow_run_name="evaluate {recipe.name}")
def evaluate_flow(recipe: Recipe, store: str | None = None) -> dict[str, float]:
    """Write the figures of quality and the picture beside the run's features."""
    require_one(recipe, "evaluate")
    lineage = Lineage(open_store(recipe, store), recipe)
    with reporting("evaluate") as progress, places(recipe)("evaluate"):

        @part_task("evaluate")
        def judge() -> dict[str, float]:
            quality = evaluate.run(lineage, progress)
            report.run(lineage, progress)
            return quality

        quality = dict(judge())
    catalog.write_catalog(lineage.store)
    show_table("evaluate", quality)
    return quality
