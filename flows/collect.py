"""Flow: tokens to activations."""

from __future__ import annotations

from prefect import flow

from flows.support.reporting import reporting, show_table
from flows.support.tasks import as_tasks, open_lineage, places
from saeflow.pipeline import collect
from saeflow.pipeline.parts import Through, directly
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-collect", flow_run_name="collect {recipe.name}")
def collect_flow(recipe: Recipe, store: str | None = None) -> str:
    """Store the activations of every token part that has none yet, then publish."""
    return collect_as_tasks(recipe, store)


def collect_as_tasks(recipe: Recipe, store: str | None, around: Through = directly) -> str:
    """Do the work of the flow. `around`: put around the executor that the tasks call."""
    lineage = open_lineage(recipe, store)
    with reporting("collect") as progress, places(recipe)("collect"), as_tasks("collect", around) as through:
        target = collect.run(lineage, progress, through)
    made = target.published()
    n_bytes = sum(part.n_bytes for part in made.parts)
    show_table("collect", {"n_tokens": made.total("n_tokens"), "bytes": n_bytes})
    return target.id
