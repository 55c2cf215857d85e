"""What runs on a worker of a cluster: one part of a stage, by the name that its maker is registered under.

A scheduler and a worker import this module when they get a task; it loads nothing large by itself. Results are small
records; errors that the user can mend travel as text.
"""

from __future__ import annotations

import contextlib
import json
import platform
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from distributed import Reschedule, Worker, get_worker
from distributed.core import Status

from saeflow.pipeline.dask.fit import Session, other_saeflow, software, stop_profiler, store_at
from saeflow.pipeline.parts import Item, PartMaker, registered
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress
from saeflow.store.lease import acquire

TOPIC = "saeflow"
"""Where workers tell how far they are."""
_TELL_SECONDS = 1.0
_STAGES = "saeflow.pipeline.run"
"""The module that loads every stage, and so registers every maker. No name that a client sends is imported."""


class Abandoned(UserError):
    """The client is gone, or does not want this part any more, or this worker is to end."""


class Bench:
    """What a worker keeps from part to part: the maker that was used last, and whose turn it is."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self._opening = threading.Lock()
        self._kept: tuple[tuple[str, ...], PartMaker] | None = None

    @classmethod
    def of(cls, worker: Worker) -> Bench:
        """The worker's own."""
        bench: Bench = vars(worker).setdefault("saeflow_bench", cls())
        return bench

    def maker(self, session: Session, name: str, settings: str) -> PartMaker:
        """A maker with these settings, which is opened once if it stays. What another one holds is freed first."""
        kind, key = registered(name), (session.token, session.store, name, settings)
        if not kind.stays:
            self.let_go()
            return kind.open(store_at(session.store), json.loads(settings))
        with self._opening:
            if self._kept is None or self._kept[0] != key:
                self._kept = None
                self._kept = key, kind.open(store_at(session.store), json.loads(settings))
            return self._kept[1]

    def let_go(self, token: str | None = None) -> None:
        """Free the maker, or only one of this run, unless one is being opened."""
        if self._opening.acquire(blocking=False):
            if self._kept is not None and token in (None, self._kept[0][0]):
                self._kept = None
            self._opening.release()

    @contextlib.contextmanager
    def turn_of(self, maker: PartMaker) -> Iterator[None]:
        """Hold the turn of this worker, if the maker uses all of it."""
        with self.turn if maker.alone else contextlib.nullcontext():
            yield


def work(session: Session, name: str, settings: str, item: Item) -> dict[str, Any]:
    """Make a part: its records as `{"made": …}`, or why it was refused as `{"refused": …}`.

    If this worker is to end (its lifetime, a queue, fewer workers), Dask gives the part to another one.
    """
    worker = get_worker()
    stop_profiler(worker)  # this worker may have come after the look at all of them
    try:
        if software()["saeflow"] != session.saeflow:
            raise UserError(other_saeflow(session, software()["saeflow"]))
        import_module(_STAGES)
        telling, bench = _Telling(worker, session.token, item), Bench.of(worker)
        maker = bench.maker(session, name, settings)
        for target in maker.waits_for(item):
            acquire(target.slot, target.id, "wait", telling.sleep).release()
        with bench.turn_of(maker):
            return {"made": maker.make(item, Progress(verbosity=-1, listener=telling))}
    except Abandoned:
        raise Reschedule from None
    except UserError as error:
        text, host = str(error), platform.node()
        return {"refused": text if host in text else f"On the worker {host}: {text}"}
    except Exception as error:
        error.add_note(f"It happened on the worker {platform.node()}, in {name}, part {item}.")
        raise


def let_go(token: str, dask_worker: Any = None) -> None:
    """Free what this worker holds of a run that has ended."""
    Bench.of(dask_worker).let_go(token)


class _Telling:
    """Tells the client, once a second, how much of an item is done; ends work that nobody waits for."""

    def __init__(self, worker: Worker, token: str, item: Item) -> None:
        self.worker, self.key = worker, worker.get_current_task()
        self.about, self.last = {"token": token, "item": json.dumps(item)}, 0.0

    def __call__(self, bar: Bar) -> None:
        self.require_wanted()
        if time.monotonic() - self.last >= _TELL_SECONDS:
            self.last = time.monotonic()
            self.worker.log_event(TOPIC, self.about | {"done": bar.done})

    def require_wanted(self) -> None:
        """Dask frees the key of a task that was cancelled or whose client or scheduler is gone; its thread goes on."""
        task = self.worker.state.tasks.get(self.key)
        if self.worker.status not in (Status.running, Status.paused) or task is None or task.state == "cancelled":
            raise Abandoned

    def sleep(self, seconds: float) -> None:
        """Wait for others, unless nobody waits for this part."""
        self.require_wanted()
        time.sleep(seconds)
