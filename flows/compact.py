"""Flow: merge the parts of a run."""

from __future__ import annotations

from prefect import flow

from flows.support.reporting import reporting, show_table
from flows.support.tasks import open_lineage
from saeflow.pipeline import compact
from saeflow.query import catalog
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-compact", flow_run_name="compact {recipe.name}")
def compact_flow(recipe: Recipe, store: str | None = None) -> int:
    """Merge what can be merged; returns the number of parts that are left."""
    lineage = open_lineage(recipe, store)
    with reporting("compact") as progress:
        compact.run(lineage, progress)
    n_parts = len(lineage.features.published().parts)
    catalog.write_catalog(lineage.store)
    show_table("compact", {"n_parts": n_parts})
    return n_parts
