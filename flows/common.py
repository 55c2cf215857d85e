"""What every flow shares: the store, progress into Prefect, the artefacts a page shows, errors without retry."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from prefect import Task, get_run_logger, task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from saeflow.artefact import Job
from saeflow.config import Recipe
from saeflow.progress import Progress
from saeflow.sections import UserError
from saeflow.store import Store, store_path

P = ParamSpec("P")
R = TypeVar("R")


class _OneLine(logging.Filter):
    """An error that the user has to mend is logged in one line; a traceback would hide what to do."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], UserError):
            record.exc_info = None
        return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_OneLine())

PICTURE_BYTES = 200_000
"""A picture up to this size is shown on the page itself."""

MOST_TASKS = 1_000
"""Task runs in one flow run: of more parts several go into one."""

PROGRESS_SECONDS = 5.0
"""Between two updates of a progress artifact."""


def open_store(recipe: Recipe, store: str | None) -> Store:
    """The store a flow works in: the parameter, SAEFLOW_STORE, the recipe, data/store."""
    return Store.create(store_path(store, recipe), recipe.overlap)


def worth_retrying(task: Any, run: Any, state: Any) -> bool:
    """An error that the user has to mend stays the same however often it is tried."""
    error = state.data if isinstance(state.data, BaseException) else getattr(state.data, "exception", None)
    return not isinstance(error, UserError)


def part_task(name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Decorates the work on one part. It gets an index and returns a small record: nothing large goes through Prefect."""
    return task(
        name="saeflow-part",
        task_run_name=name,
        retries=2,
        retry_delay_seconds=2,
        cache_policy=NO_CACHE,
        persist_result=False,
        retry_condition_fn=worth_retrying,
    )


def runs_of(indices: Sequence[int]) -> list[list[int]]:
    """Neighbouring parts for one task each, `MOST_TASKS` at most."""
    size = max(1, -(-len(indices) // MOST_TASKS))
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def make_parts(stage: str, job: Job, n_here: int) -> None:
    """Make what a job lacks, one task a run of parts: `n_here` tasks at once, or as many as a cluster works on."""

    @part_task("{name}")
    def make(name: str, indices: list[int]) -> list[str]:
        return [part.folder for part in job.make(indices)]

    runs = runs_of(job.missing)
    names = [f"{stage}-{run[0]}" if len(run) == 1 else f"{stage}-{run[0]}-to-{run[-1]}" for run in runs]
    wanted: ThreadPoolTaskRunner[list[str]] = ThreadPoolTaskRunner(job.n_at_once if job.by_workers else n_here)
    with wanted as runner:
        runner.map(make, {"name": names, "indices": runs}).result()


@contextmanager
def reporting(stage: str) -> Iterator[Progress]:
    """Progress on the terminal and, every few seconds, in one progress artifact of the flow run."""
    artifact = create_progress_artifact(progress=0.0, key=f"saeflow-{stage}", description=f"{stage}: starting")
    assert isinstance(artifact, UUID)  # not a coroutine outside of async code
    last = time.monotonic()

    def tell(name: str, done: int, total: int | None, rate: float) -> None:
        nonlocal last
        if time.monotonic() - last < PROGRESS_SECONDS:
            return
        last = time.monotonic()
        share = 100 * done / total if total else 0.0
        update_progress_artifact(artifact, progress=share, description=f"{name}: {done:,} done, {rate:,.0f}/s")

    yield Progress(listener=tell)
    update_progress_artifact(artifact, progress=100.0, description=f"{stage}: done")


def show_table(stage: str, facts: dict[str, Any]) -> None:
    """A table artifact with the numbers of a finished stage, and one log line."""
    rows = [{"what": name, "value": str(value)} for name, value in facts.items()]
    create_table_artifact(table=rows, key=f"saeflow-{stage}-numbers", description=f"What {stage} made")
    get_run_logger().info("%s: %s", stage, ", ".join(f"{row['what']} {row['value']}" for row in rows))


def show_rows(stage: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table artifact with a line for each of several things."""
    shown = [{name: str(value) for name, value in row.items()} for row in rows]
    create_table_artifact(table=shown, key=f"saeflow-{stage}", description=f"What the {stage} made")
    get_run_logger().info("%s: %d lines", stage, len(rows))


def show_picture(stage: str, path: Path) -> None:
    """A markdown artifact with the picture in it or, where it is large, with its path."""
    content = path.read_bytes()
    text = f"{path}"
    if len(content) <= PICTURE_BYTES:
        text = f"![{stage}](data:image/png;base64,{base64.b64encode(content).decode()})\n\n{path}"
    create_markdown_artifact(markdown=text, key=f"saeflow-{stage}-picture", description=f"Picture of the {stage}")
