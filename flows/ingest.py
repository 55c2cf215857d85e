"""Flow: what is new in the corpus through every stage, until it can be asked about. An event says when the store has
grown."""

from __future__ import annotations

import math
from typing import Any

from prefect import flow
from prefect.events import emit_event

from flows.support.gpu import places
from flows.support.reporting import reporting, show_table
from flows.support.tasks import open_store, part_task
from saeflow.pipeline.lifecycle import ingest
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.fingerprint import fingerprint
from saeflow.recipe.recipe import Recipe

GROWN = "saeflow.store.grown"
"""The event after each ingest by which the store has grown by `schedule.train_growth` or more since the newest SAE,
until one is trained: whichever attempt has published what is new, and whatever became of the training that the last one
began."""


def has_grown(recipe: Recipe, found: dict[str, Any]) -> bool:
    """Has an ingest found enough for a new SAE? The first one is no event's: it is made by the ingest or at work
    already."""
    return bool(0 < recipe.schedule.train_growth <= found["grown"] < math.inf)


def resource(recipe: Recipe, store: str) -> dict[str, str]:
    """What the event is about: one recipe in one store."""
    return {"prefect.resource.id": f"saeflow.store.{recipe.name}.{fingerprint(store)}", "prefect.resource.name": store}


@flow(name="saeflow-ingest", flow_run_name="ingest-{recipe.name}")
def ingest_flow(recipe: Recipe, store: str | None = None) -> dict[str, Any]:
    """Read new and changed documents, encode them by every published run, and forget removed ones if the recipe says
    so."""
    opened = open_store(recipe, store, overlap="wait")
    with reporting("ingest") as progress:

        @part_task("ingest")
        def take_in() -> dict[str, Any]:
            return ingest.run(Lineage(opened, recipe), progress, places(recipe))

        found = dict(take_in())
    numbers = {name: found[name] for name in ("n_documents", "n_tokens", "n_removed")}
    show_table("ingest", numbers | {name: f"{len(parts)} new parts" for name, parts in found["parts"].items() if parts})
    if has_grown(recipe, found):
        emit_event(GROWN, resource(recipe, opened.name), payload={"grown": found["grown"]})
    return found
