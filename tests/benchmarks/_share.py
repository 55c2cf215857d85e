"""The pipeline flow with a stopwatch on what saeflow itself does: `python -m tests.benchmarks._share RECIPE STORE`.

Its last line is JSON: seconds of the flow, and of the time in which at least one of saeflow's functions was at work.
The rest is Prefect's: its server, its runs and tasks, what is sent to its pages.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flows.pipeline import pipeline_flow
from saeflow.pipeline import collect, encode, evaluate, import_table, report, run, sweep, tokens, train
from saeflow.query import catalog
from saeflow.recipe.load import load_recipe
from saeflow.store.artefact import Job

FUNCTIONS = (
    (tokens, "run"), (import_table, "run"), (train, "run_all"), (encode, "compact"), (evaluate, "run"), (report, "run"),
    (sweep, "run"), (catalog, "write"), (run, "summary"),
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

    def parts(self, opened: Callable[..., Any]) -> Callable[..., Any]:
        """A context that gives a Job: its beginning, its parts and its end are work, what is between is not."""

        @contextlib.contextmanager
        def timed(*args: Any, **kwargs: Any) -> Iterator[Job]:
            context = opened(*args, **kwargs)
            with self.running():
                job = context.__enter__()
            try:
                yield replace(job, make=self.function(lambda indices: list(job.make(indices))))
            except BaseException:
                context.__exit__(*sys.exc_info())
                raise
            with self.running():
                context.__exit__(None, None, None)

        return timed

    @property
    def seconds(self) -> float:
        """Of the union of all intervals."""
        total, until = 0.0, float("-inf")
        for began, ended in sorted(self.spans):
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
        return total


def main(recipe: Path, store: Path) -> None:
    watch = Stopwatch()
    for module, name in FUNCTIONS:
        setattr(module, name, watch.function(getattr(module, name)))
    collect.collecting = watch.parts(collect.collecting)
    encode.encoding_together = watch.parts(encode.encoding_together)
    settings = load_recipe(recipe)
    began = time.monotonic()
    pipeline_flow(settings, str(store))
    print(json.dumps({"seconds": time.monotonic() - began, "work": watch.seconds}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
