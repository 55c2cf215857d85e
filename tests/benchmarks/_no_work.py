"""One flow run over parts of no work, in a process of its own: `python -m tests.benchmarks._no_work PARTS WORKERS`.

Its last line is JSON: seconds of the flow run, CPU of this process and of the server that it started, if it did.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import psutil
from prefect import flow

from flows.support.tasks import Tasks
from saeflow.pipeline.parts import Here, PartMaker, PartWork, Records
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store


def cpu_of(processes: list[psutil.Process]) -> float:
    """CPU seconds of processes that are there."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


class NoWork(PartMaker, name="no-work", alone=True):
    """Parts of no work."""

    def __init__(self) -> None:
        self.made: list[int] = []

    @classmethod
    def open(cls, store: Store, settings: dict[str, Any]) -> NoWork:
        return cls()

    def make(self, item: int, progress: Progress) -> Records:
        self.made.append(item)
        return {}


def run(n_parts: int, workers: int) -> dict[str, float]:
    """Make so many parts as the flows do."""
    maker = NoWork()
    sizes = [(index, 1) for index in range(n_parts)]
    work = PartWork(NoWork, {}, sizes, [], ("part", "parts"), here=maker)

    @flow(name="no-work")
    def no_work() -> None:
        work.run(Tasks("part", Here(workers)), Progress(verbosity=-1))

    me = psutil.Process()
    began, cpu = time.monotonic(), cpu_of([me])
    no_work()
    assert len(maker.made) == n_parts
    seconds, client = time.monotonic() - began, cpu_of([me]) - cpu
    return {"seconds": seconds, "client_cpu": client, "server_cpu": cpu_of(me.children(recursive=True))}


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
