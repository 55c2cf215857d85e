"""Flow: stored activations through trained SAEs to Parquet, one task a part."""

from __future__ import annotations

import os
from collections.abc import Sequence

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.common import counted, name_run, open_store, part_task, reporting, results, show_table, stopping
from saeflow import catalog, features
from saeflow.config import Recipe
from saeflow.progress import Progress
from saeflow.store import Store


@flow(
    name="saeflow-encode",
    flow_run_name="encode {recipe.name}",
    task_runner=ThreadPoolTaskRunner(max_workers=os.cpu_count()),  # type: ignore[arg-type]  # a part a core
)
def encode_flow(recipe: Recipe, store: str | None = None) -> list[str]:
    """Encode every activation part that is not encoded yet, then publish; the SAEs of a sweep together."""
    opened = open_store(recipe, store)
    with reporting("encode") as progress:
        for group in features.by_site(opened, recipe):
            _encode(opened, group, progress)
    catalog.write(opened)
    made = [features.artefact(opened, member) for member in recipe.members()]
    totals = [target.published() for target in made]
    show_table("encode", {count: sum(each.total(count) for each in totals) for count in ("n_tokens", "n_values")})
    return [target.id for target in made]


def _encode(store: Store, recipes: Sequence[Recipe], progress: Progress) -> None:
    with features.encoding_together(store, recipes, progress) as job, stopping(progress):
        name_run("encode", counted(len(job.missing), "part"))

        @part_task("encode-{index}")
        def encode_part(index: int) -> str:
            return job.work(index).folder

        results(encode_part.map(job.missing))
