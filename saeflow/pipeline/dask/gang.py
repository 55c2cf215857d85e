"""Ranks of one training on workers: all at once, each on a worker of its own, which meet at the first one's address.

Dask has no word for tasks that must run at the same time, so each is bound to a worker. `torch.distributed` finds its
way by the address alone (its own TCPStore). The package dask-pytorch-ddp does likewise, but pickles a function and
keeps its process group to the end of the worker.
"""

from __future__ import annotations

import contextlib
import json
import queue
import time
from collections.abc import Sequence
from typing import Any

from distributed import Future

from saeflow.pipeline.dask.work import meet
from saeflow.pipeline.dask.workers import Workers
from saeflow.pipeline.parts import Item, PartWork, Tally
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress, Stopped

_GRACE_SECONDS = 20.0
"""Time in which the other ranks should say that one is lost; more than they take to call one another."""


def make_together(workers: Workers, work: PartWork, item: Item, size: int, n: int, progress: Progress) -> None:
    """Have n workers make one item of `size` units together. Each gets it as [rank, n, host, port, item].

    Raises UserError if one refuses, or is lost. Nobody makes the item again by himself.
    """
    stage, unit = work.bar
    with progress.bar(stage, size, unit) as bar:
        chosen = _chosen(workers, n, bar)
        host, port = workers.client.run(meet, workers=chosen[:1])[chosen[0]]
        items = [[number, n, host, port, item] for number in range(n)]
        tally = Tally(bar, [(items[0], size)])
        tally.begin(items[0])
        settings = json.dumps(work.settings)
        with workers.hearing(tally):
            running = {
                workers.submit(work.maker.name, settings, each, workers=[address], retries=0): each
                for each, address in zip(items, chosen, strict=True)
            }
            try:
                _wait_for_all(workers, running, chosen, bar)
            finally:
                workers.give_up(list(running))
        tally.finish(items[0])
    for target in work.targets:
        target.look_again()


def _chosen(workers: Workers, n: int, bar: Bar) -> list[str]:
    """Return the addresses of n workers, as soon as there are so many."""
    until = time.monotonic() + workers.config.wait_seconds
    while len(able := sorted(workers.able())) < n:
        if time.monotonic() > until:
            raise UserError(
                f"cluster.ranks is {n}, but the scheduler at {workers.address} has {len(able)} workers since "
                f"{workers.config.wait_seconds:g} s (cluster.wait_seconds).\n"
                "Start more workers, or lower cluster.ranks."
            )
        _require_open(workers, bar)
        time.sleep(0.2)
    return able[:n]


def _wait_for_all(workers: Workers, running: dict[Future[Any], Item], chosen: Sequence[str], bar: Bar) -> None:
    finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    for future in running:
        future.add_done_callback(finished.put)
    left, alone_since = len(running), None
    while left:
        with contextlib.suppress(queue.Empty):
            future = finished.get(timeout=1)
            workers.result(future, running[future])
            left -= 1
        _require_open(workers, bar)
        gone = set(chosen) - set(workers.able())
        alone_since = (alone_since or time.monotonic()) if gone else None
        if alone_since is not None and time.monotonic() - alone_since > _GRACE_SECONDS:
            raise UserError(
                f"The worker at {sorted(gone)[0]} was lost, of {len(chosen)} that train together.\n"
                "Nothing up to the last checkpoint is lost: run the same command again."
            )


def _require_open(workers: Workers, bar: Bar) -> None:
    if bar.stopping.is_set():
        raise Stopped
    if workers.closed.is_set() or workers.client.status != "running":
        raise workers.lost()
