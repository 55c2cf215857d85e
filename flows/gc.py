"""Flow: what no reader can reach any more is removed."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.common import open_store, part_task, reporting, show_table
from saeflow import catalog, integrity
from saeflow.config import Recipe
from saeflow.disk import human_bytes

Hours = Annotated[float, Field(ge=0)]


@flow(name="saeflow-gc", flow_run_name="gc-{recipe.name}")
def gc_flow(recipe: Recipe, store: str | None = None, grace_hours: Hours = 24) -> int:
    """Remove replaced generations, parts that none lists, and what killed runs left; returns how many bytes that were.

    Args:
        grace_hours: For so long a replaced generation is kept for its readers.
    """
    opened = open_store(recipe, store)
    with reporting("gc"):

        @part_task("gc")
        def collect_garbage() -> tuple[int, int]:
            found = list(integrity.garbage(opened, grace_hours * 3600))
            for each in found:
                integrity.remove(each)
            if found:
                catalog.write(opened)
            return len(found), sum(each.n_bytes for each in found)

        n, n_bytes = collect_garbage()
    show_table("gc", {"removed": n, "bytes": human_bytes(n_bytes)})
    return n_bytes
