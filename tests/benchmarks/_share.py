"""The pipeline flow with a stopwatch on what saeflow itself does: `python -m tests.benchmarks._share RECIPE STORE`.

Its last line is JSON: seconds of the flow, and of the time in which at least one of saeflow's functions was at work.
The rest is Prefect's: its server, its runs and tasks, what is sent to its pages.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.pipeline import pipeline_flow
from saeflow.pipeline import collect, compact, encode, stages, tokens, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.judge import evaluate, report, sweep
from saeflow.pipeline.parts import Executor, Item, Made, PartWork, Tally, Through
from saeflow.query import catalog
from saeflow.recipe.recipe import load_recipe

FUNCTIONS = (
    (tokens, "run"), (import_table, "run"), (train, "run_all"), (compact, "run"), (evaluate, "run"), (report, "run"),
    (sweep, "run"), (catalog, "write_catalog"), (stages, "summary"),
)  # fmt: skip
"""What flows call whole."""


@dataclass
class Stopwatch:
    """Intervals in which something was at work, in any thread."""

    spans: list[tuple[float, float]] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.spans.append((began, time.monotonic()))

    def function(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return work(*args, **kwargs)

        return timed

    def stage(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A stage whose parts go to tasks: its beginning, its parts and its end are work, what is between is not."""

        def timed(lineage: Any, progress: Any, through: Through) -> Any:
            began, waited = time.monotonic(), list[float]()

            def around(executor: Executor) -> Executor:
                self.spans.append((began, time.monotonic()))
                return _Tasks(through(_Parts(executor, self)), waited)

            made = run(lineage, progress, around)
            self.spans.append((waited[-1] if waited else began, time.monotonic()))
            return made

        return timed

    @property
    def seconds(self) -> float:
        """Of the union of all intervals."""
        total, until = 0.0, float("-inf")
        for began, ended in sorted(self.spans):
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
        return total


@dataclass
class _Parts:
    """An executor whose parts are work."""

    inner: Executor
    watch: Stopwatch

    @property
    def n_calls(self) -> int:
        return self.inner.n_calls

    def each(self, work: PartWork, items: Sequence[Item], tally: Tally) -> Made:
        with self.watch.running():
            made = list(self.inner.each(work, items, tally))
        yield from made


@dataclass
class _Tasks:
    """Notes when the last part came back through the tasks."""

    inner: Executor
    until: list[float]

    @property
    def n_calls(self) -> int:
        return self.inner.n_calls

    def each(self, work: PartWork, items: Sequence[Item], tally: Tally) -> Made:
        yield from self.inner.each(work, items, tally)
        self.until.append(time.monotonic())


def main(recipe: Path, store: Path) -> None:
    watch = Stopwatch()
    for module, name in FUNCTIONS:
        setattr(module, name, watch.function(getattr(module, name)))
    collect.run = watch.stage(collect.run)
    encode.run_together = watch.stage(encode.run_together)
    settings = load_recipe(recipe)
    began = time.monotonic()
    pipeline_flow(settings, str(store))
    print(json.dumps({"seconds": time.monotonic() - began, "work": watch.seconds}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
