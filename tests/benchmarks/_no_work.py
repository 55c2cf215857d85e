"""One flow run over parts of no work, in a process of its own: `python -m tests.benchmarks._no_work PARTS WORKERS`.

Its last line is JSON: seconds of the flow run, CPU of this process and of the server that it started, if it did.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial

import psutil
from prefect import flow

from flows.support.tasks import make_parts
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Job
from saeflow.store.records import PartRecord


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


def run(n_parts: int, workers: int) -> dict[str, float]:
    """Make so many parts as the flows do."""
    made: list[int] = []

    def work(index: int) -> PartRecord:
        made.append(index)
        return PartRecord(index=index, counts={}, files=[])

    @flow(name="no-work")
    def no_work() -> None:
        make_parts("part", Job(list(range(n_parts)), partial(map, work)), Progress(verbosity=-1), n_here=workers)

    me = psutil.Process()
    began, cpu = time.monotonic(), cpu_of([me])
    no_work()
    assert len(made) == n_parts
    seconds, client = time.monotonic() - began, cpu_of([me]) - cpu
    return {"seconds": seconds, "client_cpu": client, "server_cpu": cpu_of(me.children(recursive=True))}


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
