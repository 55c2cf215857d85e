"""Flow: train the recipe's SAE. One task, which continues from its checkpoint when retried."""

from __future__ import annotations

from prefect import flow

from flows.common import open_store, part_task, reporting, show_table
from saeflow import train
from saeflow.config import Recipe


@flow(name="saeflow-train", flow_run_name="train-{recipe.name}")
def train_flow(recipe: Recipe, store: str | None = None) -> str:
    """Train the SAE on the stored activations, or continue where a killed training stood."""
    opened = open_store(recipe, store)
    with reporting("train") as progress:

        @part_task("train")
        def train_sae() -> str:
            return train.run(opened, recipe, progress).id

        made = str(train_sae())
    show_table("train", train.last_row(opened.by_id(made)))
    return made
