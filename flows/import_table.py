"""Flow: a table, or synthetic rows, to activations."""

from __future__ import annotations

from prefect import flow

from flows.support.reporting import reporting, show_table
from flows.support.tasks import in_task, open_lineage
from saeflow.pipeline.foreign import import_table
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-bring", flow_run_name="bring {recipe.name}")
def import_table_flow(recipe: Recipe, store: str | None = None) -> str:
    """Store the recipe's table, or its synthetic activations."""
    lineage = open_lineage(recipe, store)
    with reporting("bring") as progress:
        made = in_task("bring", lambda: import_table.run(lineage, progress)[1].id)
    show_table("bring", {"n_rows": lineage.activations.published().total("n_tokens")})
    return made
