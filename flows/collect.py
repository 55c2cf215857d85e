"""Flow: token parts through the model to stored activations, one task a part or run of parts."""

from __future__ import annotations

from prefect import flow

from flows.support.gpu import places
from flows.support.reporting import reporting, show_table
from flows.support.tasks import Tasks, open_store
from saeflow.pipeline import collect
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.parts import Through, directly
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-collect", flow_run_name="collect {recipe.name}")
def collect_flow(recipe: Recipe, store: str | None = None) -> str:
    """Store the activations of every token part that has none yet, then publish."""
    return collect_as_tasks(recipe, store)


def collect_as_tasks(recipe: Recipe, store: str | None, around: Through = directly) -> str:
    """The work of the flow. `around`: put around the executor that the tasks call."""
    lineage = Lineage(open_store(recipe, store), recipe)
    with reporting("collect") as progress, places(recipe)("collect"):
        collect.run(lineage, progress, lambda executor: Tasks("collect", around(executor)))
    target, made = lineage.activations, lineage.activations.published()
    n_bytes = sum(part.n_bytes for part in made.parts)
    show_table("collect", {"n_tokens": made.total("n_tokens"), "bytes": n_bytes})
    return target.id
