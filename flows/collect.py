"""Flow: token parts through the model to stored activations, one task a part or run of parts."""

from __future__ import annotations

from prefect import flow

from flows.support.gpu import gpu_slot
from flows.support.reporting import reporting, show_table
from flows.support.tasks import make_parts, open_store
from saeflow.pipeline import collect
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-collect", flow_run_name="collect {recipe.name}")
def collect_flow(recipe: Recipe, store: str | None = None) -> str:
    """Store the activations of every token part that has none yet, then publish."""
    opened = open_store(recipe, store)
    place = recipe.model.device if recipe.model else "cpu"
    with (
        reporting("collect") as progress,
        gpu_slot(recipe, place),
        collect.collecting(opened, recipe, progress) as job,
    ):
        make_parts("collect", job, progress, n_here=1)  # one forward pass at a time
    target = collect.artefact(opened, recipe)
    n_bytes = sum(part.n_bytes for part in target.published().parts)
    show_table("collect", {"n_tokens": target.published().total("n_tokens"), "bytes": n_bytes})
    return target.id
