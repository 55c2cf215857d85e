"""Flow: the nightly compaction of a store. Forgotten documents leave the disk, and parts of runs are merged."""

from __future__ import annotations

from prefect import flow

from flows.support.reporting import reporting, show_table
from flows.support.tasks import in_task, open_lineage, places
from saeflow.pipeline import encode
from saeflow.pipeline.lifecycle.tidy import compact_store
from saeflow.recipe.recipe import Recipe


@flow(name="saeflow-tidy", flow_run_name="tidy-{recipe.name}")
def tidy_flow(recipe: Recipe, store: str | None = None) -> dict[str, int]:
    """Rewrite parts that still hold hidden documents, and merge runs' parts where a level has `features.compact_parts`.

    Returns how many parts each run has left.
    """
    lineage = open_lineage(recipe, store, overlap="wait")
    with reporting("tidy") as progress:
        in_task("tidy", lambda: compact_store(lineage, progress, None, places(recipe)))
    runs = encode.runs_over(lineage.store, lineage.activations)
    left = {each.id: len(each.published().parts) for each in runs}
    show_table("tidy", {f"parts of {name}": n for name, n in left.items()})
    return left
