"""Tasks of a flow: one for each part or run of parts. They are retried if that helps, and end well when cancelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from flows.support.reporting import counted, name_run
from saeflow.pipeline.parts import Executor, Item, Made, PartWork, Records, Tally, key_of
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import Overlap
from saeflow.runtime.errors import UserError
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
        first, last = (_index_of(items[number]) for number in (run[0], run[-1]))
        return f"{self.stage}-{first}" if len(run) == 1 else f"{self.stage}-{first}-to-{last}"


def _index_of(item: Item) -> int:
    """The index of the part that an item means."""
    return int(item if isinstance(item, int) else item[0])


@dataclass
class Attempts:
    """Parts by their place in a list. A task that is tried again makes those of its parts that are not finished."""

    executor: Executor
    work: PartWork
    items: Sequence[Item]
    tally: Tally
    made: dict[int, Records] = field(default_factory=dict)

    def make(self, numbers: Sequence[int]) -> list[int]:
        left = [number for number in numbers if number not in self.made]
        number_of = {key_of(self.items[number]): number for number in left}
        with closing(self.executor.each(self.work, [self.items[number] for number in left], self.tally)) as made:
            for item, records in made:
                self.made[number_of[key_of(item)]] = records
        return list(numbers)


@contextmanager
def stopping(event: Event, runner: ThreadPoolTaskRunner[Any]) -> Iterator[None]:
    """Around mapped tasks: when the run is cancelled or interrupted, which only the main thread hears of, tasks at work
    end at their next batch, the others are not begun, and then the exception goes on."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            event.set()
            runner.cancel_all()  # waits for those at work
        raise
