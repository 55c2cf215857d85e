"""Tasks of a flow: one for each part or run of parts. They are retried if that helps, and end well when cancelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from flows.support.reporting import counted, name_run
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import Overlap
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Job
from saeflow.store.store import Store, store_path

P = ParamSpec("P")
R = TypeVar("R")

MOST_TASKS = 1_000
"""Task runs in one flow run: of more parts several go into one."""


def open_store(recipe: Recipe, store: str | None, overlap: Overlap | None = None) -> Store:
    """The store a flow works in: the parameter, SAEFLOW_STORE, the recipe, data/store. `overlap`: not the recipe's."""
    return Store.create(store_path(store, recipe), overlap or recipe.overlap)


def worth_retrying(task: Any, run: Any, state: Any) -> bool:
    """An error that the user has to mend stays the same however often it is tried."""
    error = state.data if isinstance(state.data, BaseException) else getattr(state.data, "exception", None)
    return not isinstance(error, UserError)


def part_task(name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Decorates the work on one part. It gets an index and returns a small record: nothing large goes through
    Prefect."""
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


def make_parts(stage: str, job: Job, progress: Progress, n_here: int) -> None:
    """Make what a job lacks, one task a run of parts: `n_here` tasks at once, or as many as keep a cluster busy.

    A task that is tried again makes those of its parts that are not finished.
    """
    name_run(stage, counted(len(job.missing), "part"))

    done: dict[int, str] = {}

    @part_task("{name}")
    def make(name: str, indices: list[int]) -> list[str]:
        for part in job.make([index for index in indices if index not in done]):
            done[part.index] = part.folder
        return [done[index] for index in indices]

    runs = runs_of(job.missing)
    names = [f"{stage}-{run[0]}" if len(run) == 1 else f"{stage}-{run[0]}-to-{run[-1]}" for run in runs]
    wanted: ThreadPoolTaskRunner[list[str]] = ThreadPoolTaskRunner(job.n_calls or n_here)
    with wanted as runner, stopping(progress, runner):
        runner.map(make, {"name": names, "indices": runs}).result()


@contextmanager
def stopping(progress: Progress, runner: ThreadPoolTaskRunner[Any]) -> Iterator[None]:
    """Around mapped tasks: when the run is cancelled or interrupted, which only the main thread hears of, tasks at work
    end at their next batch, the others are not begun, and then the exception goes on."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            progress.stopping.set()
            runner.cancel_all()  # waits for those at work
        raise
