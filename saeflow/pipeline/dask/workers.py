"""The workers of one Dask cluster as an executor of parts.

The store is all that client and workers share: what goes to a worker is a name and a few numbers, what comes back a
record. Whether a part is done is read from the store, never from Dask.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from distributed import Client, Future, KilledWorker

from saeflow.pipeline.dask.fit import Session
from saeflow.pipeline.dask.start import threads_of_worker
from saeflow.pipeline.dask.work import work as work_on
from saeflow.pipeline.parts import Item, Made, PartWork, Records, Tally
from saeflow.recipe.cluster import ClusterConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Stopped
from saeflow.runtime.threads import n_threads

_RETRIES = 2
"""Of a part that fails on a worker otherwise than by the worker's death, which Dask counts by itself."""
_AHEAD = 3
"""Parts given to the scheduler for each thread of the workers: 100,000 at once would be a burden to it."""
_CALLS = 64
"""Calls of `each` at once that leave something for workers that come later: what is too much waits in the scheduler."""


@dataclass
class Workers:
    """The workers of one cluster. Safe to use from several threads."""

    client: Client
    config: ClusterConfig
    session: Session
    look_seconds: float = 5.0
    """Between two looks at who is there, while nothing arrives."""
    closed: threading.Event = field(default_factory=threading.Event)
    _tallies: list[Tally] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _able: tuple[float, dict[str, int]] = (0.0, {})
    _gpu: bool = False

    @property
    def n_threads(self) -> int:
        """Parts that are worked on at once."""
        return max(1, sum(self.able().values()))

    @property
    def n_expected(self) -> int:
        """Workers that are there or, if more, that the recipe starts: those of a queue come one by one."""
        return max(len(self.able()), self.config.n_workers or 0)

    @property
    def n_calls(self) -> int:
        """Calls of `each` that keep all of them busy, with one part each."""
        return max(_CALLS, self.n_threads, self.n_expected * self.config.threads_per_worker)

    def _threads(self, asked: int) -> int:
        """Threads for a part that has a worker to itself: as asked, or all of the worker. 0: each worker decides."""
        return asked or threads_of_worker(self.config, self.n_expected, n_threads(0))

    def able(self) -> dict[str, int]:
        """Addresses of the workers that may run a model, and how many parts each works on at once.

        Where any worker was started with GPUs (`--resources GPU=1`), only such from then on, a part a GPU. Known for
        some seconds.
        """
        with self._lock:
            if time.monotonic() - self._able[0] > self.look_seconds or not self._able[1]:
                found = self.client.scheduler_info(n_workers=-1)["workers"]
                gpus = {name: int(each["resources"]["GPU"]) for name, each in found.items() if _has_gpu(each)}
                self._gpu = self._gpu or bool(gpus)
                every = {name: each["nthreads"] for name, each in found.items()}
                self._able = time.monotonic(), gpus if self._gpu else every
            return self._able[1]

    @property
    def _resources(self) -> dict[str, float] | None:
        self.able()
        return {"GPU": 1} if self._gpu else None

    def each(self, work: PartWork, items: Sequence[Item], tally: Tally) -> Made:
        """Have these parts made, `_AHEAD` for each thread given out at a time; yield each once it is made."""
        settings = json.dumps(work.settings | {"threads": self._threads(work.threads)})
        finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        running: dict[str, tuple[Future[Any], Item]] = {}
        waiting = iter(items)
        self._tallies.append(tally)
        try:
            while True:
                for item in islice(waiting, max(0, _AHEAD * self.n_threads - len(running))):
                    tally.begin(item)
                    future = self._start(work.maker.name, settings, item)
                    running[str(future.key)] = future, item
                    future.add_done_callback(finished.put)
                if not running:
                    return
                future, item = running.pop(str(self._next(finished, tally.bar).key))
                records = self._result(future, item)
                work.note(records)
                tally.finish(item)
                yield item, records
        finally:
            self._tallies.remove(tally)
            if running and self.client.status == "running":
                with contextlib.suppress(Exception):  # it may be lost at this very moment
                    self.client.cancel([future for future, _ in running.values()])

    def _start(self, name: str, settings: str, item: Item) -> Future[Any]:
        found: Future[Any] = self.client.submit(
            work_on, self.session, name, settings, item,
            key=f"{name}-{uuid.uuid4().hex}", pure=False, retries=_RETRIES, resources=self._resources,
        )  # fmt: skip
        return found

    def _next(self, finished: queue.SimpleQueue[Future[Any]], bar: Bar) -> Future[Any]:
        """The next future that is done. Raises UserError where none can be any more, Stopped once the work is to
        stop."""
        alone_since = None
        while True:
            with contextlib.suppress(queue.Empty):
                return finished.get(timeout=1)
            if bar.stopping.is_set():
                raise Stopped
            if self.closed.is_set() or self.client.status != "running":
                raise self.lost()
            if self.able():
                alone_since = None
            elif time.monotonic() - (alone_since := alone_since or time.monotonic()) > self.config.wait_seconds:
                raise self.alone("no worker left")

    def _result(self, future: Future[Any], item: Item) -> Records:
        if future.status in ("cancelled", "lost"):
            raise self.lost()
        error = future.exception() if future.status == "error" else None
        if isinstance(error, KilledWorker):
            raise UserError(
                f"Part {item} was given to {error.allowed_failures + 1} workers, and each died over it; the last was "
                f"{error.last_worker.address}.\n"
                "Look at that worker's log: most often its memory was full. Finished parts are "
                "safe; then run the same command again."
            ) from error
        if isinstance(error, OSError):  # of that machine, where this one's advice would mislead
            said = "\n".join([str(error), *getattr(error, "__notes__", [])])
            raise UserError(
                f"{said}\nFinished parts are safe; mend it there, then run the same command again."
            ) from error
        if error is not None:
            raise error
        found: dict[str, Any] = future.result()
        if "refused" in found:
            raise UserError(found["refused"])
        made: Records = found["made"]
        return made

    def lost(self) -> UserError:
        run = "Run" if self.config.starts else "Start scheduler and workers again, then run"
        return UserError(
            f"The Dask scheduler at {self.address} is lost. Finished parts are safe in the store.\n"
            f"{run} the same command again: it goes on where this one stood."
        )

    def alone(self, word: str) -> UserError:
        start = f"Start some: dask worker {self.address} --nthreads 1."
        if self.config.starts:
            kind = self.config.starts
            start = f"See why the workers of cluster.kind = {kind!r} do not run, or raise cluster.wait_seconds."
        return UserError(
            f"The Dask scheduler at {self.address} has {word} since {self.config.wait_seconds:g} s "
            f"(cluster.wait_seconds).\n{start} Then run the same command again."
        )

    @property
    def address(self) -> str:
        return str(self.client.scheduler.address) if self.client.scheduler else self.config.address or "its address"

    def told(self, event: tuple[float, Any]) -> None:
        """A worker says how far it is."""
        about = event[1]
        if about.get("token") == self.session.token:
            for tally in list(self._tallies):
                with contextlib.suppress(Stopped):  # who waits for the parts hears of it
                    tally.tell(about["item"], about["done"])


def _has_gpu(worker: dict[str, Any]) -> bool:
    return float(worker.get("resources", {}).get("GPU", 0)) >= 1
