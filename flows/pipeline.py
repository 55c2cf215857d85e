"""Flow: everything, from text to SQL answers.

python -m flows.pipeline flows/recipes/demo.toml
"""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import time
from typing import Any

if __name__ == "__main__":  # the terminal shows saeflow's own lines; a served flow keeps Prefect's
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")

import httpx
from prefect import Flow, flow
from prefect.events.worker import EventsWorker

from flows.collect import collect_flow
from flows.compact import compact_flow
from flows.encode import encode_flow
from flows.evaluate import evaluate_flow
from flows.import_table import import_table_flow
from flows.support import page
from flows.support.reporting import counted, name_run, show_markdown, show_table
from flows.support.tasks import open_lineage
from flows.tokens import tokens_flow
from flows.train import train_flow
from saeflow.pipeline import stages
from saeflow.pipeline.dask.clusters import kept_open
from saeflow.pipeline.judge import report, sweep
from saeflow.pipeline.lineage import Lineage
from saeflow.query import first_answers
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress

FLOWS: dict[str, Flow[..., Any]] = {
    "tokens": tokens_flow, "collect": collect_flow, "bring": import_table_flow, "train": train_flow,
    "encode": encode_flow, "compact": compact_flow, "evaluate": evaluate_flow,
}  # fmt: skip
"""The flow of each stage that has its own."""

FIGURES = (
    "variance_unexplained", "variance_unexplained_without_longest", "longest_share", "l0", "shrinkage", "dead_share",
    "loss_recovered_zero", "loss_recovered_mean", "kl_recovered_mean", "judged_on",
)  # fmt: skip
"""Figures of quality on the page of a pipeline."""


@flow(name="saeflow-pipeline", flow_run_name="pipeline {recipe.name}")
def pipeline_flow(recipe: Recipe, store: str | None = None) -> dict[str, Any]:
    """Run what is missing of every stage, in order, and return the summary."""
    own = [name for name, stage in stages.stages_of_run(recipe).items() if stage.flow_of is None]
    about = counted(len(recipe.members()), "SAE") if recipe.is_sweep else ", ".join(own)
    name_run("pipeline", about)
    seconds = {}
    with kept_open():
        for stage in own:
            began = time.monotonic()
            FLOWS[stage](recipe, store)
            seconds[stage] = time.monotonic() - began
    lineage = open_lineage(recipe, store)
    summary = stages.summary(lineage) | {"seconds": seconds}
    show_table("pipeline", summary)
    show_markdown("result", result_page(lineage, summary), f"What came of {recipe.name}, and what to type next")
    return summary


def result_page(lineage: Lineage, summary: dict[str, Any]) -> str:
    """Return markdown with the picture, the numbers and the next commands."""
    store, recipe = lineage.store, lineage.recipe
    where = f" --store {shlex.quote(store.name)}"
    if recipe.is_sweep:
        path, rows = sweep.picture_of(lineage), summary["sweep"]["saes"]
        numbers = {row["member"]: f"{row['variance_unexplained']:.4f} unexplained, L0 {row['l0']:.1f}" for row in rows}
        lines = [f"saeflow run RECIPE --member {sweep.recommended(rows)}{where}"]
    else:
        path = report.run(lineage, Progress(verbosity=-1))
        took = {f"{stage} took": f"{seconds:.1f} s" for stage, seconds in summary["seconds"].items()}
        numbers = summary | {name: summary["quality"][name] for name in FIGURES if name in summary["quality"]} | took
        lines = first_answers.next_commands(store, lineage.features.id, where)
    numbers = {name: value for name, value in numbers.items() if not isinstance(value, dict | list)}
    picture, next_lines = page.picture(recipe.name, path), page.commands(lines)
    parts = [f"# {page.plain(recipe.name)}", picture, "Next:", next_lines, page.table(numbers)]
    return "\n\n".join(parts)


def told(recipe: Recipe, store: str | None = None) -> dict[str, Any]:
    """Run the flow. Raises UserError if the server is lost."""
    try:
        return pipeline_flow(recipe, store)
    except httpx.TransportError as error:
        _drop_events()
        raise UserError(
            f"Prefect's server does not answer any more ({error}). What is finished is kept in the store.\n"
            "Start the server again (prefect server start), then the same command; or go on without it: saeflow run "
            "RECIPE"
        ) from error


def _drop_events() -> None:
    """Drop events that wait for the server: Prefect would try each for seven seconds before the process ends."""
    waiting = EventsWorker.instance()._queue
    with contextlib.suppress(queue.Empty):
        while True:
            waiting.get_nowait()


if __name__ == "__main__":
    from saeflow.cli.run import run_flow

    run_flow(told)
