"""Flow: stored activations through the trained SAE to Parquet, one task a part."""

from __future__ import annotations

import os

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.common import open_store, part_task, reporting, show_table
from saeflow import catalog, features
from saeflow.config import Recipe, require_one


@flow(
    name="saeflow-encode",
    flow_run_name="encode-{recipe.name}",
    task_runner=ThreadPoolTaskRunner(max_workers=os.cpu_count()),  # type: ignore[arg-type]  # a part a core
)
def encode_flow(recipe: Recipe, store: str | None = None) -> str:
    """Encode every activation part that is not encoded yet, then publish."""
    require_one(recipe, "encode")
    opened = open_store(recipe, store)
    with reporting("encode") as progress, features.encoding(opened, recipe, progress) as job:

        @part_task("encode-{index}")
        def encode_part(index: int) -> str:
            return job.work(index).folder

        encode_part.map(job.missing).result()
    target = features.artefact(opened, recipe)
    catalog.write(opened)
    show_table("encode", {count: target.published().total(count) for count in ("n_tokens", "n_values")})
    return target.id
