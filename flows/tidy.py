"""Flow: the nightly compaction of a store. Forgotten documents leave the disk, and the parts of every run over it
become few."""

from __future__ import annotations

from prefect import flow

from flows.support.gpu import places
from flows.support.reporting import reporting, show_table
from flows.support.tasks import open_store, part_task
from saeflow.pipeline import collect, encode, run
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-tidy", flow_run_name="tidy-{recipe.name}")
def tidy_flow(recipe: Recipe, store: str | None = None) -> dict[str, int]:
    """Write parts anew that still hold hidden documents, and merge the parts of runs that have `features.compact_parts`
    of them; returns how many each run has left."""
    opened = open_store(recipe, store, overlap="wait")
    with reporting("tidy") as progress:

        @part_task("tidy")
        def tidy() -> None:
            run.compact(opened, recipe, progress, recipe.features.compact_parts, places(recipe))

        tidy()
    stored = collect.artefact(opened, recipe)
    left = {each.id: len(each.published().parts) for each in encode.runs_over(opened, stored)}
    show_table("tidy", {f"parts of {name}": n for name, n in left.items()})
    return left
