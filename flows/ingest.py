"""Flow: what is new in the corpus through every stage, until it can be asked about. An event says when the store has grown."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.events import emit_event

from flows.common import open_store, part_task, reporting, show_table
from flows.gpu import gpu_slot
from saeflow import ingest
from saeflow.config import Recipe
from saeflow.fingerprints import fingerprint

GROWN = "saeflow.store.grown"
"""The event after an ingest that made the store grow by `schedule.train_growth` or more since the newest SAE."""


def resource(recipe: Recipe, store: str) -> dict[str, str]:
    """What the event is about: one recipe in one store."""
    return {"prefect.resource.id": f"saeflow.store.{recipe.name}.{fingerprint(store)}", "prefect.resource.name": store}


@flow(name="saeflow-ingest", flow_run_name="ingest-{recipe.name}")
def ingest_flow(recipe: Recipe, store: str | None = None) -> dict[str, Any]:
    """Read new and changed documents, encode them by every published run, and forget removed ones if the recipe says so."""
    opened = open_store(recipe, store)
    devices = [recipe.features.device, *([recipe.model.device] if recipe.model else [])]
    with reporting("ingest") as progress, gpu_slot(recipe, *devices):

        @part_task("ingest")
        def take_in() -> dict[str, Any]:
            return ingest.run(opened, recipe, progress)

        found = dict(take_in())
    numbers = {name: found[name] for name in ("n_documents", "n_tokens", "n_removed")}
    show_table("ingest", numbers | {name: f"{len(parts)} new parts" for name, parts in found["parts"].items() if parts})
    if found["n_documents"] and 0 < recipe.schedule.train_growth <= found["grown"]:
        emit_event(GROWN, resource(recipe, opened.name), payload={"grown": found["grown"]})
    return found
