"""Flow: remove what no reader can reach any more."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.support.reporting import reporting, show_table
from flows.support.tasks import in_task, open_lineage
from saeflow.query import catalog
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.text import human_bytes
from saeflow.store import garbage

Hours = Annotated[float, Field(ge=0)]


@flow(name="saeflow-gc", flow_run_name="gc-{recipe.name}")
def gc_flow(recipe: Recipe, store: str | None = None, grace_hours: Hours = 24) -> int:
    """Remove replaced generations, parts that no generation lists, and files of killed runs; returns bytes removed.

    Artefacts that are being written are left to the next time.

    Args:
        grace_hours: Hours to keep a replaced generation for readers that still use it.
    """
    opened = open_lineage(recipe, store).store
    with reporting("gc"):

        def collect_garbage() -> tuple[int, int, list[str]]:
            done = garbage.collect_garbage(opened, grace_hours * 3600, remove=True)
            if done.garbage:
                catalog.write_catalog(opened)
            return len(done.garbage), done.n_bytes, done.left_alone

        n, n_bytes, left_alone = in_task("gc", collect_garbage)
    left = {f"left alone {number}": why for number, why in enumerate(left_alone[:20], 1)}
    show_table("gc", {"removed": n, "bytes": human_bytes(n_bytes)} | left)
    return n_bytes
