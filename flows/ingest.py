"""Flow: new documents through every stage, until they can be asked about. An event says when the store has grown."""

from __future__ import annotations

import math
from typing import Any

from prefect import flow
from prefect.events import emit_event

from flows.support.reporting import reporting, show_table
from flows.support.tasks import in_task, open_lineage, places
from saeflow.pipeline.lifecycle import ingest
from saeflow.recipe.fingerprint import fingerprint
from saeflow.recipe.recipe import Recipe

GROWN = "saeflow.store.grown"
"""The event after each ingest that leaves the store `schedule.train_growth` or more larger than at the newest SAE.

It comes again with every ingest until an SAE is trained, even if a training is at work or has failed."""


def has_grown(recipe: Recipe, found: dict[str, Any]) -> bool:
    """True if the store has grown enough for a new SAE. The first SAE is trained by the ingest itself."""
    return bool(0 < recipe.schedule.train_growth <= found["grown"] < math.inf)


def resource(recipe: Recipe, store: str) -> dict[str, str]:
    """Return the resource of the event: one recipe in one store."""
    return {"prefect.resource.id": f"saeflow.store.{recipe.name}.{fingerprint(store)}", "prefect.resource.name": store}


@flow(name="saeflow-ingest", flow_run_name="ingest-{recipe.name}")
def ingest_flow(recipe: Recipe, store: str | None = None) -> dict[str, Any]:
    """Read new and changed documents, encode them by every published run, and forget removed ones if the recipe says
    so."""
    lineage = open_lineage(recipe, store, overlap="wait")
    with reporting("ingest") as progress:
        found = in_task("ingest", lambda: ingest.run(lineage.anew(), progress, places(recipe)))
    numbers = {name: found[name] for name in ("n_documents", "n_tokens", "n_removed")}
    show_table("ingest", numbers | {name: f"{len(parts)} new parts" for name, parts in found["parts"].items() if parts})
    if has_grown(recipe, found):
        emit_event(GROWN, resource(recipe, lineage.store.name), payload={"grown": found["grown"]})
    return found
