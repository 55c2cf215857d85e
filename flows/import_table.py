"""Flow: activations from a table instead of a model."""

from __future__ import annotations

from prefect import flow

from flows.support.reporting import reporting, show_table
from flows.support.tasks import open_store, part_task
from saeflow.pipeline import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-bring", flow_run_name="bring {recipe.name}")
def import_table_flow(recipe: Recipe, store: str | None = None) -> str:
    """Store the recipe's table, or its made activations."""
    opened = open_store(recipe, store)
    with reporting("bring") as progress:

        @part_task("bring")
        def bring_table() -> str:
            return import_table.run(Lineage(opened, recipe), progress)[1].id

        made = str(bring_table())
    show_table("bring", {"n_rows": opened.by_id(made).published().total("n_tokens")})
    return made
