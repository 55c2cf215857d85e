"""Tasks of a flow: retried if that helps, ended well when cancelled, and one at a time on each GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event
from typing import Any, ParamSpec, TypeVar

import torch
from prefect import Task, get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists
from prefect.task_runners import ThreadPoolTaskRunner

from flows.support.reporting import counted, name_run
from saeflow.pipeline import stages
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.parts import Executor, Item, Made, PartWork, Records, Tally, Through, directly, key_of_item
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import Overlap
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store, store_path

P = ParamSpec("P")
R = TypeVar("R")

LIMIT = "saeflow-gpu"
"""Prefect's global concurrency limit of flow runs that use a GPU, which `saeflow serve` sets."""
MOST_TASKS = 1_000
"""Most task runs in one flow run. If there are more parts, a task makes several."""


def open_lineage(recipe: Recipe, store: str | None, overlap: Overlap | None = None) -> Lineage:
    """Return the recipe's lineage in the store of a flow: the parameter, SAEFLOW_STORE, the recipe's, or data/store.

    `overlap`: instead of the recipe's.
    """
    return Lineage(Store.create(store_path(store, recipe), overlap or recipe.overlap), recipe)


def worth_retrying(task: Any, run: Any, state: Any) -> bool:
    """False for an error that the user has to mend."""
    error = state.data if isinstance(state.data, BaseException) else getattr(state.data, "exception", None)
    return not isinstance(error, UserError)


def part_task(name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Decorate work that gets and returns small things only: nothing large should go through Prefect."""
    return task(
        name="saeflow-part",
        task_run_name=name,
        retries=2,
        retry_delay_seconds=2,
        cache_policy=NO_CACHE,
        persist_result=False,
        retry_condition_fn=worth_retrying,
    )


def in_task(name: str, work: Callable[[], R]) -> R:
    """Do the work in one task of this name."""
    return part_task(name)(work)()


def runs_of(indices: Sequence[int]) -> list[list[int]]:
    """Return groups of neighbouring parts, at most `MOST_TASKS`: one task each."""
    size = max(1, -(-len(indices) // MOST_TASKS))
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


@dataclass(frozen=True)
class Tasks:
    """An executor that gives each part, or run of parts, to a Prefect task; another executor makes them."""

    stage: str
    inner: Executor

    @property
    def n_calls(self) -> int:
        return self.inner.n_calls

    def each(self, work: PartWork, items: Sequence[Item], tally: Tally) -> Made:
        """Make these parts, as many tasks at once as the inner executor can use; yield them once all are made."""
        name_run(self.stage, counted(len(items), "part"))
        attempts = Attempts(self.inner, work, items, tally)

        @part_task("{name}")
        def make(name: str, numbers: list[int]) -> list[int]:
            return attempts.make(numbers)

        runs = runs_of(range(len(items)))
        wanted: ThreadPoolTaskRunner[list[int]] = ThreadPoolTaskRunner(self.n_calls)
        with wanted as runner, stopping(tally.bar.stopping, runner):
            runner.map(make, {"name": [self._name(items, run) for run in runs], "numbers": runs}).result()
        yield from ((items[number], records) for number, records in attempts.made.items())

    def _name(self, items: Sequence[Item], run: list[int]) -> str:
        ends = (items[number] for number in (run[0], run[-1]))
        first, last = (int(item if isinstance(item, int) else item[0]) for item in ends)
        return f"{self.stage}-{first}" if len(run) == 1 else f"{self.stage}-{first}-to-{last}"


@contextmanager
def as_tasks(stage: str, around: Through = directly) -> Iterator[Through]:
    """Put tasks around the executor of a stage. If the stage asks for none, the flow run's name says `0 parts`."""
    executors = list[Executor]()

    def through(executor: Executor) -> Executor:
        executors.append(Tasks(stage, around(executor)))
        return executors[-1]

    yield through
    if not executors:
        name_run(stage, counted(0, "part"))


@dataclass
class Attempts:
    """Makes parts by their place in a list. A task that is tried again makes only its unfinished parts."""

    executor: Executor
    work: PartWork
    items: Sequence[Item]
    tally: Tally
    made: dict[int, Records] = field(default_factory=dict)

    def make(self, numbers: Sequence[int]) -> list[int]:
        left = [number for number in numbers if number not in self.made]
        number_of = {key_of_item(self.items[number]): number for number in left}
        with closing(self.executor.each(self.work, [self.items[number] for number in left], self.tally)) as made:
            for item, records in made:
                self.made[number_of[key_of_item(item)]] = records
        return list(numbers)


@contextmanager
def stopping(event: Event, runner: ThreadPoolTaskRunner[Any]) -> Iterator[None]:
    """Around mapped tasks: if the run is cancelled, tasks at work end at their next batch, and no others begin.

    Only the main thread hears of a cancellation.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            event.set()
            runner.cancel_all()  # waits for those at work
        raise


def set_limit(n_gpus: int) -> None:
    """Let so many flow runs of this server use a GPU at once, unless a number is set already."""
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=n_gpus))


@contextmanager
def gpu_slot(recipe: Recipe, *devices: str) -> Iterator[None]:
    """Wait for a GPU of this machine and hold it, if one of these settings `device` uses one. Without a limit there is
    no wait."""
    if recipe.cluster is None and any(map(uses_gpu, devices)):
        with concurrency(LIMIT, occupy=1, raise_on_lease_renewal_failure=False):
            yield
    else:
        yield


def places(recipe: Recipe) -> stages.Place:
    """Have each stage of a recipe that uses a GPU of this machine wait for one, and hold it while the stage works."""
    alone = recipe.model_copy(update={"cluster": None})
    return lambda stage: gpu_slot(alone, *stages.devices_of(recipe, stage))


def uses_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
