"""Workers of a Dask cluster: joined or started, looked at, given parts, and let go again.

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
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from distributed import Client, Future, KilledWorker

from saeflow.pipeline.dask.start import client_of, say_less, started, threads_of_worker
from saeflow.pipeline.dask.work import TOPIC, Session, let_go, look, software, work
from saeflow.recipe.cluster import ClusterConfig
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress, Stopped
from saeflow.store.files import make_folder
from saeflow.store.store import Store

_RETRIES = 2
"""Of a part that fails on a worker otherwise than by the worker's death, which Dask counts by itself."""
_AHEAD = 3
"""Parts given to the scheduler for each thread of the workers: 100,000 at once would be a burden to it."""
_CALLS = 64
"""Calls of `each` at once that leave something for workers that come later: what is too much waits in the scheduler."""
_LOOK_SECONDS = 5.0
"""Between two looks at who is there, while nothing arrives."""


class _Tally:
    """Units done, by item: one that is made a second time on another worker counts once, one that was not begun here
    never."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.done, self.lock = bar, dict[str, int](), threading.Lock()

    def begin(self, item: str) -> None:
        with self.lock:
            self.done.setdefault(item, 0)

    def tell(self, item: str, done: int) -> None:
        with self.lock:
            new = done - self.done.get(item, done)
            if new > 0:
                self.done[item] = done
                self.bar.advance(new)


@dataclass
class Workers:
    """The workers of one cluster. Safe to use from several threads."""

    client: Client
    config: ClusterConfig
    session: Session
    closed: threading.Event = field(default_factory=threading.Event)
    tallies: list[_Tally] = field(default_factory=list)
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

    def threads(self, asked: int) -> int:
        """Threads for a part that has a worker to itself: as many as asked for, or what the workers have; 0: they
        see."""
        return asked or threads_of_worker(self.config, self.n_expected)

    def able(self) -> dict[str, int]:
        """Addresses of the workers that may run a model, and how many parts each works on at once.

        Where any worker was started with GPUs (`--resources GPU=1`), only such from then on, a part a GPU. Known for
        some seconds.
        """
        with self._lock:
            if time.monotonic() - self._able[0] > _LOOK_SECONDS or not self._able[1]:
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

    def each(
        self, function: str, settings: dict[str, Any], items: Iterable[Any], bar: Bar, sizes: Mapping[Any, int]
    ) -> Generator[tuple[Any, Any], None, None]:
        """Each item with what `function` found for it, as they are finished.

        `function` is named `module.function`, takes (store, settings as JSON, item, progress) and gives what JSON can
        say. `sizes`: units of each item for the bar, by the item or, if it is a list, by its JSON.
        """
        finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        running: dict[str, tuple[Future[Any], Any]] = {}
        waiting, text, tally = iter(items), json.dumps(settings), _Tally(bar)
        self.tallies.append(tally)
        try:
            while True:
                for item in islice(waiting, max(0, _AHEAD * self.n_threads - len(running))):
                    tally.begin(json.dumps(item))
                    future = self._start(function, text, item)
                    running[str(future.key)] = future, item
                    future.add_done_callback(finished.put)
                if not running:
                    return
                future, item = running.pop(str(self._next(finished, bar).key))
                found = self._result(future, item)
                tally.tell(json.dumps(item), sizes[item if isinstance(item, int) else json.dumps(item)])
                yield item, found
        finally:
            self.tallies.remove(tally)
            if running and self.client.status == "running":
                with contextlib.suppress(Exception):  # it may be lost at this very moment
                    self.client.cancel([future for future, _ in running.values()])

    def _start(self, function: str, settings: str, item: Any) -> Future[Any]:
        name = function.replace(".", "-").removesuffix("_at")
        found: Future[Any] = self.client.submit(
            work, self.session, function, settings, item,
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

    def _result(self, future: Future[Any], item: Any) -> Any:
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
        found = future.result()
        if "refused" in found:
            raise UserError(found["refused"])
        return found["found"]

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
            for tally in list(self.tallies):
                with contextlib.suppress(Stopped):  # who waits for the parts hears of it
                    tally.tell(about["item"], about["done"])


def _has_gpu(worker: dict[str, Any]) -> bool:
    return float(worker.get("resources", {}).get("GPU", 0)) >= 1


_kept: ContextVar[tuple[contextlib.ExitStack, dict[tuple[str, str], Workers]] | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def kept_open() -> Iterator[None]:
    """A cluster that a stage opens inside the block stays for the next stages; without it each opens its own."""
    if _kept.get() is not None:  # kept for what is around this block
        yield
        return
    with contextlib.ExitStack() as stack:
        token = _kept.set((stack, {}))
        try:
            yield
        finally:
            _kept.reset(token)


@contextlib.contextmanager
def workers_of(store: Store, recipe: Recipe, progress: Progress) -> Iterator[Workers | None]:
    """The workers that the recipe names; None where it names none. Raises UserError where they cannot work."""
    if recipe.cluster is None:
        yield None
        return
    kept, key = _kept.get(), (store.name, recipe.cluster.model_dump_json())
    if kept is None:
        with _opened(store, recipe.cluster, progress) as workers:
            yield workers
        return
    stack, opened = kept
    if key not in opened or opened[key].client.status != "running":
        opened[key] = stack.enter_context(_opened(store, recipe.cluster, progress))
    yield opened[key]


@contextlib.contextmanager
def _opened(store: Store, config: ClusterConfig, progress: Progress) -> Iterator[Workers]:
    say_less()
    session = Session(store.name, uuid.uuid4().hex, software()["saeflow"])
    with started(config) as cluster, client_of(config, cluster) as client:
        workers = Workers(client, config, session)
        try:
            client.wait_for_workers(1, timeout=config.wait_seconds)
        except TimeoutError:
            raise workers.alone("no worker") from None
        _look_at(workers, store, progress)
        client.subscribe_topic(TOPIC, workers.told)
        progress.say(f"cluster: {len(workers.able())} workers of {workers.address}, {workers.n_threads} parts at once")
        try:
            yield workers
            if client.status == "running":
                with contextlib.suppress(Exception):  # what a lost scheduler's workers hold is no matter of ours
                    client.run(let_go, session.token, on_error="ignore")
        finally:
            workers.closed.set()


def _look_at(workers: Workers, store: Store, progress: Progress) -> None:
    """Every worker must have this saeflow and see this store; other versions are worth a warning.

    A scheduler reads tasks before it hands them on, so it must have saeflow as well.
    """
    try:
        workers.client.run_on_scheduler(software)
    except (ImportError, AttributeError) as error:  # none, or an early one
        raise _cannot_load(f"Dask scheduler at {workers.address}", workers, error) from error
    marker = store.root / "tmp" / f"cluster-{workers.session.token}"
    make_folder(marker.parent)
    marker.write_text(workers.session.token)
    store.storage.send(marker)
    try:
        seen = workers.client.run(look, workers.session, marker.relative_to(store.root).as_posix(), on_error="return")
    finally:
        store.storage.remove(marker)
    for address, found in seen.items():
        if isinstance(found, ImportError | AttributeError):
            raise _cannot_load(f"worker at {address}", workers, found)
        if isinstance(found, OSError):  # it died meanwhile; others may be there
            continue
        if isinstance(found, BaseException):
            raise found
        if found["problem"]:
            raise UserError(found["problem"])
    _warn_of_versions([found for found in seen.values() if isinstance(found, dict)], progress)


def _cannot_load(who: str, workers: Workers, error: Exception) -> UserError:
    return UserError(
        f"The {who} cannot load saeflow ({error}).\n"
        f"Install saeflow {workers.session.saeflow} where scheduler and workers run, and start them again."
    )


def _warn_of_versions(seen: Sequence[dict[str, Any]], progress: Progress) -> None:
    """Same rows, same plan, but other bytes are to be expected where these differ."""
    mine = software()
    for name in mine:
        others = sorted(
            {f"{each['software'][name]} on {each['host']}" for each in seen if each["software"][name] != mine[name]}
        )
        if others:
            progress.say(
                f"cluster: {name} is {', '.join(others)}, but {mine[name]} here; values may differ in their last digits"
            )
