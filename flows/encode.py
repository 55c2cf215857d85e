"""Flow: activations to the values of features."""

from __future__ import annotations

from prefect import flow

from flows.support.reporting import reporting, show_table
from flows.support.tasks import as_tasks, open_lineage, places
from saeflow.pipeline import encode
from saeflow.pipeline.parts import Through, directly
from saeflow.query import catalog
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-encode", flow_run_name="encode {recipe.name}")
def encode_flow(recipe: Recipe, store: str | None = None) -> list[str]:
    """Encode every activation part that is not encoded yet, then publish; the SAEs of a sweep together."""
    return encode_as_tasks(recipe, store)


def encode_as_tasks(recipe: Recipe, store: str | None, around: Through = directly) -> list[str]:
    """Do the work of the flow. `around`: put around the executor that the tasks call."""
    lineage = open_lineage(recipe, store)
    with reporting("encode") as progress, places(recipe)("encode"), as_tasks("encode", around) as through:
        encode.run(lineage, progress, through)
    catalog.write_catalog(lineage.store)
    made = [member.features for member in lineage.members]
    totals = [target.published() for target in made]
    show_table("encode", {count: sum(each.total(count) for each in totals) for count in ("n_tokens", "n_values")})
    return [target.id for target in made]
