"""Flow: token parts through the model to stored activations, one task a part."""

from __future__ import annotations

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.common import counted, name_run, open_store, part_task, reporting, results, show_table, stopping
from saeflow import activations
from saeflow.config import Recipe


@flow(
    name="saeflow-collect",
    flow_run_name="collect {recipe.name}",
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]  # one forward pass at a time
)
def collect_flow(recipe: Recipe, store: str | None = None) -> str:
    """Store the activations of every token part that has none yet, then publish."""
    opened = open_store(recipe, store)
    with reporting("collect") as progress, activations.collecting(opened, recipe, progress) as job, stopping(progress):
        name_run("collect", counted(len(job.missing), "part"))

        @part_task("collect-{index}")
        def collect_part(index: int) -> str:
            return job.work(index).folder

        results(collect_part.map(job.missing))
    target = activations.artefact(opened, recipe)
    n_bytes = sum(part.n_bytes for part in target.published().parts)
    show_table("collect", {"n_tokens": target.published().total("n_tokens"), "bytes": n_bytes})
    return target.id
