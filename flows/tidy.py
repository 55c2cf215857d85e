"""Flow: the nightly compaction of a store. Forgotten documents leave the disk, and the parts of every run over it
become few."""

from __future__ import annotations

from prefect import flow

from flows.support.gpu import places
from flows.support.reporting import reporting, show_table
from flows.support.tasks import open_store, part_task
from saeflow.pipeline import encode, run
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-tidy", flow_run_name="tidy-{recipe.name}")
def tidy_flow(recipe: Recipe, store: str | None = None) -> dict[str, int]:
    """Rewrite parts that still hold hidden documents, and merge the parts of runs that have `features.compact_parts`.

    Returns how many parts each run has left.
    """
    lineage = Lineage(open_store(recipe, store, overlap="wait"), recipe)
    with reporting("tidy") as progress:

        @part_task("tidy")
        def tidy() -> None:
            run.compact(lineage, progress, recipe.features.compact_parts, places(recipe))

        tidy()
    runs = encode.runs_over(lineage.store, lineage.activations)
    left = {each.id: len(each.published().parts) for each in runs}
    show_table("tidy", {f"parts of {name}": n for name, n in left.items()})
    return left
