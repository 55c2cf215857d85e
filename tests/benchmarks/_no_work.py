"""One flow run over parts of no work, in a process of its own: `python -m tests.benchmarks._no_work PARTS WORKERS`.

Its last line is JSON: seconds of the flow run, CPU of this process and of the server that it started, if it did.
"""

from __future__ import annotations

import json
import sys
import time

import psutil
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.common import part_task, results


def record(index: int) -> str:
    """What a part returns: the name of its folder."""
    return f"{index:06d}-00000000"


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
    """Map the flows' own task over so many parts."""

    @flow(name="no-work", task_runner=ThreadPoolTaskRunner(max_workers=workers))  # type: ignore[arg-type]
    def no_work() -> int:
        part = part_task("part-{index}")(record)
        return len(results(part.map(list(range(n_parts)))))

    me = psutil.Process()
    began, cpu = time.monotonic(), cpu_of([me])
    assert no_work() == n_parts
    seconds, client = time.monotonic() - began, cpu_of([me]) - cpu
    return {"seconds": seconds, "client_cpu": client, "server_cpu": cpu_of(me.children(recursive=True))}


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
