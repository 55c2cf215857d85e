"""All that runs on a worker: a look whether it can work, then parts of stages, whose makers are registered by name.

A scheduler and a worker import this module when they get a task, so it loads nothing large by itself. Results are small
records. Errors that the user can mend travel as text.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from distributed import Reschedule, Worker, get_worker
from distributed.comm.addressing import parse_address, parse_host_port
from distributed.core import Status

from saeflow import __version__
from saeflow.pipeline.parts import Item, PartMaker, not_seen, registered
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress
from saeflow.store.lease import acquire
from saeflow.store.records import read_checked
from saeflow.store.store import Store, storage_of
from saeflow.store.user_cache import cache_folder

TOPIC = "saeflow"
"""Dask's topic on which workers report how far they are."""
_TELL_SECONDS = 1.0
_STAGES = "saeflow.pipeline.stages"
"""The module that loads every stage and so registers every maker. Workers import no name that a client sends."""


@dataclass(frozen=True)
class Session:
    """The store as the client calls it, and the client's saeflow: a worker must have both."""

    store: str
    token: str
    saeflow: str


def store_at(name: str) -> Store:
    """Return the store as this machine sees it, with its records as they are now."""
    store = Store.at(storage_of(name, own_cache))
    _require_seen(name, store.root / "store.json")
    return store


@cache
def own_cache(url: str) -> Path:
    """Return a cache folder of this process alone, so that no other process changes records in it."""
    home = cache_folder(url)
    begin = f"{home.name}-worker-{platform.node()}-"
    for left in home.parent.glob(f"{begin}*"):
        pid = left.name.removeprefix(begin)  # no number if the machine `a` sees a folder of the machine `a-1`
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    folder = home.with_name(f"{begin}{os.getpid()}")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def stop_profiler(worker: Any) -> None:
    """Stop Dask's profiler of tasks. In Python 3.11 it can block the process for ever when a thread begins or ends
    (github.com/dask/distributed/issues/8616)."""
    profiler = worker.periodic_callbacks.get("profile")
    if sys.version_info < (3, 12) and profiler is not None and profiler.is_running():
        worker.loop.add_callback(profiler.stop)


def look(session: Session, marker: str, dask_worker: Any = None) -> dict[str, Any]:
    """Describe this worker: its host, its software, and what keeps it from working, if anything."""
    stop_profiler(dask_worker)
    found: dict[str, Any] = {"host": platform.node(), "software": software(), "problem": None}
    if found["software"]["saeflow"] != session.saeflow:
        return found | {"problem": other_saeflow(session, found["software"]["saeflow"])}
    return found | {"problem": _why_unfit(session.store, marker)}


def _why_unfit(store: str, marker: str) -> str | None:
    try:
        storage = storage_of(store, own_cache)
        for file in ("store.json", marker):
            _require_seen(store, storage.fetch(storage.root / file, fresh=True))
    except FileNotFoundError:
        return not_seen(store)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"The worker on {platform.node()} cannot work there: {error}"
    return None


def _require_seen(store: str, path: Path) -> None:
    try:
        read_checked(path) if path.name == "store.json" else path.read_bytes()
    except OSError as error:
        raise UserError(not_seen(store, error.strerror)) from error


def other_saeflow(session: Session, mine: str) -> str:
    return (
        f"The worker on {platform.node()} has saeflow {mine}, this machine {session.saeflow}.\n"
        "Install the same version on both and start the workers again."
    )


@cache
def software() -> dict[str, str]:
    """Return versions that results depend on; for saeflow also a digest of its modules."""
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(Path(__file__).parents[2].rglob("*.py")):
        digest.update(path.read_bytes())
    found = {"saeflow": f"{__version__} ({digest.hexdigest()})", "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


class Abandoned(UserError):
    """The client is gone or no longer wants this part, or this worker should end."""


class Bench:
    """Kept by a worker from part to part: the maker that was used last, and a lock for work that needs all of it."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self._opening = threading.Lock()
        self._kept: tuple[tuple[str, ...], PartMaker] | None = None

    @classmethod
    def of(cls, worker: Worker) -> Bench:
        bench: Bench = vars(worker).setdefault("saeflow_bench", cls())
        return bench

    def maker(self, session: Session, name: str, settings: str) -> PartMaker:
        """Return the maker with these settings, opened once if it stays. Another maker is freed first."""
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
        """Free the maker, if it belongs to this run (None: to any), unless one is being opened."""
        if self._opening.acquire(blocking=False):
            if self._kept is not None and token in (None, self._kept[0][0]):
                self._kept = None
            self._opening.release()


def make_part(session: Session, name: str, settings: str, item: Item) -> dict[str, Any]:
    """Make a part. Return its records as `{"made": …}`, or an error of the user as `{"refused": …}`.

    If this worker should end (its lifetime, a queue, fewer workers), Dask gives the part to another one.
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
        with bench.turn if maker.alone else contextlib.nullcontext():
            return {"made": maker.make(item, Progress(verbosity=-1, listener=telling))}
    except Abandoned:
        raise Reschedule from None
    except UserError as error:
        text, host = str(error), platform.node()
        return {"refused": text if host in text else f"On the worker {host}: {text}"}
    except Exception as error:
        error.add_note(f"It happened on the worker {platform.node()}, in {name}, part {item}.")
        raise


def meet(dask_worker: Any = None) -> tuple[str, int]:
    """Open a place at this worker where ranks meet, instead of an earlier one; return its host and port."""
    from saeflow.runtime.ranks import meeting_point

    host = parse_host_port(parse_address(str(dask_worker.address))[1])[0]
    place = vars(dask_worker)["saeflow_meeting"] = meeting_point(host)
    return host, place.port


def let_go(token: str, dask_worker: Any = None) -> None:
    """Free the maker of a run that has ended."""
    Bench.of(dask_worker).let_go(token)


class _Telling:
    """Tells the client, once a second, how much of an item is done. Ends work that nobody waits for."""

    def __init__(self, worker: Worker, token: str, item: Item) -> None:
        self.worker, self.key = worker, worker.get_current_task()
        self.about, self.last = {"token": token, "item": json.dumps(item)}, 0.0

    def __call__(self, bar: Bar) -> None:
        self.require_wanted()
        if time.monotonic() - self.last >= _TELL_SECONDS:
            self.last = time.monotonic()
            self.worker.log_event(TOPIC, self.about | {"done": bar.done})

    def require_wanted(self) -> None:
        """Raise Abandoned if Dask has given up the task: its thread would go on."""
        task = self.worker.state.tasks.get(self.key)
        if self.worker.status not in (Status.running, Status.paused) or task is None or task.state == "cancelled":
            raise Abandoned

    def sleep(self, seconds: float) -> None:
        self.require_wanted()
        time.sleep(seconds)
