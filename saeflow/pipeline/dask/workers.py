"""The workers of one Dask cluster as an executor of parts.

Client and workers share nothing but the store. A worker gets a name and a few numbers, and returns a record. Whether a
part is done is read from the store, never from Dask.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from distributed import Client, Future, KilledWorker

from saeflow.pipeline.dask.work import Session, make_part
from saeflow.pipeline.parts import Item, Made, PartWork, Records, Tally
from saeflow.recipe.cluster import ClusterConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Stopped
from saeflow.runtime.threads import n_threads

_RETRIES = 2
"""Retries of a part that fails on a worker. Dask counts deaths of workers by itself."""
_PARTS_AHEAD = 3
"""Parts given to the scheduler for each thread of the workers: 100,000 at once would be too many."""
_CALLS = 64
"""Least calls of `each` at once, so that workers that come later find parts waiting in the scheduler."""


@dataclass
class Workers:
    """The workers of one cluster. Safe to use from several threads."""

    client: Client
    config: ClusterConfig
    session: Session
    look_seconds: float = 5.0
    """Seconds between two looks at the list of workers."""
    closed: threading.Event = field(default_factory=threading.Event)
    _tallies: list[Tally] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _able: tuple[float, dict[str, int]] = (0.0, {})
    _gpu: bool = False

    @property
    def n_threads(self) -> int:
        """Parts that workers make at once."""
        return max(1, sum(self.able().values()))

    @property
    def n_expected(self) -> int:
        """Workers that have come or, if more, that the recipe starts: a queue sends them one by one."""
        return max(len(self.able()), self.config.n_workers or 0)

    @property
    def n_calls(self) -> int:
        return max(_CALLS, self.n_threads, self.n_expected * self.config.threads_per_worker)

    def able(self) -> dict[str, int]:
        """Return the addresses of workers that may run a model, with the number of parts that each makes at once.

        Once a worker was started with GPUs (`--resources GPU=1`), only such workers count, with one part a GPU. The
        answer is kept for `look_seconds`.
        """
        with self._lock:
            if time.monotonic() - self._able[0] > self.look_seconds or not self._able[1]:
                found = self.client.scheduler_info(n_workers=-1)["workers"]
                n_gpus = {name: int(each.get("resources", {}).get("GPU", 0)) for name, each in found.items()}
                gpus = {name: n for name, n in n_gpus.items() if n}
                self._gpu = self._gpu or bool(gpus)
                every = {name: each["nthreads"] for name, each in found.items()}
                self._able = time.monotonic(), gpus if self._gpu else every
            return self._able[1]

    def each(self, work: PartWork, items: Sequence[Item], tally: Tally) -> Made:
        """Have these parts made, at most `_PARTS_AHEAD` at once for each thread; yield each once it is made."""
        name, threads = work.maker.name, work.threads or threads_of_worker(self.config, self.n_expected, n_threads(0))
        settings = json.dumps(work.settings | {"threads": threads})
        finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        running: dict[str, tuple[Future[Any], Item]] = {}
        waiting = iter(items)
        try:
            with self.hearing(tally):
                while True:
                    for item in islice(waiting, max(0, _PARTS_AHEAD * self.n_threads - len(running))):
                        tally.begin(item)
                        future = self.submit(name, settings, item, retries=_RETRIES)
                        running[str(future.key)] = future, item
                        future.add_done_callback(finished.put)
                    if not running:
                        return
                    future, item = running.pop(str(self._next(finished, tally.bar).key))
                    records = self.result(future, item)
                    work.note(records)
                    tally.finish(item)
                    yield item, records
        finally:
            if running:
                self.give_up([future for future, _ in running.values()])

    @contextlib.contextmanager
    def hearing(self, tally: Tally) -> Iterator[None]:
        """Inside the block, workers that tell of their parts tell this tally."""
        self._tallies.append(tally)
        try:
            yield
        finally:
            self._tallies.remove(tally)

    def give_up(self, futures: Sequence[Future[Any]]) -> None:
        if self.client.status == "running":
            with contextlib.suppress(Exception):  # it may be lost at this very moment
                self.client.cancel(futures)

    def submit(self, name: str, settings: str, item: Item, **how: Any) -> Future[Any]:
        """Give a part to the scheduler."""
        gpu = {"GPU": 1} if self._gpu else None
        about = {"key": f"{name}-{uuid.uuid4().hex}", "pure": False, "resources": gpu} | how
        future: Future[Any] = self.client.submit(make_part, self.session, name, settings, item, **about)
        return future

    def _next(self, finished: queue.SimpleQueue[Future[Any]], bar: Bar) -> Future[Any]:
        """Wait for the next future. Raises UserError if the cluster is lost, Stopped if the work should stop."""
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

    def result(self, future: Future[Any], item: Item) -> Records:
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
        if isinstance(error, OSError):  # on that machine: advice for this machine would mislead
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
        """Count the units of a part that a worker reports."""
        about = event[1]
        if about.get("token") == self.session.token:
            for tally in list(self._tallies):
                with contextlib.suppress(Stopped):  # raised again where the parts are waited for
                    tally.tell(about["item"], about["done"])


def threads_of_worker(config: ClusterConfig, n_workers: int, n_cores: int) -> int:
    """Return the threads for one part on a worker. Local workers share this machine's cores. 0: the worker's cores."""
    match config.starts:
        case "local" | "local-cuda":
            return max(config.threads_per_worker, n_cores // n_workers)
        case "slurm" | "pbs" | "sge" | "lsf":
            return int(config.options.get("cores", config.threads_per_worker))
    return 0
