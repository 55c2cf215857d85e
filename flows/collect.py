"""Flow: token parts through the model to stored activations, one task a part or run of parts."""

from __future__ import annotations

from prefect import flow

from flows.support.gpu import gpu_slot
from flows.support.reporting import reporting, show_table
from flows.support.tasks import make_parts, open_store
from saeflow.pipeline import collect
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-collect", flow_run_name="collect {recipe.name}")
def collect_flow(recipe: Recipe, store: str | None = None) -> str:
    """Store the activations of every token part that has none yet, then publish."""
    lineage = Lineage(open_store(recipe, store), recipe)
    place = recipe.model.device if recipe.model else "cpu"
    with (
        reporting("collect") as progress,
        gpu_slot(recipe, place),
        collect.collecting(lineage, progress) as job,
    ):
        make_parts("collect", job, progress, n_here=1)  # one forward pass at a time
    target, made = lineage.activations, lineage.activations.published()
    n_bytes = sum(part.n_bytes for part in made.parts)
    show_table("collect", {"n_tokens": made.total("n_tokens"), "bytes": n_bytes})
    return target.id
