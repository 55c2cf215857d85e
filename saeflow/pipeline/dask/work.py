"""What runs on a worker of a cluster: one part of the work, by the name of a function of saeflow.

A scheduler and a worker import this module when they get a task; it loads nothing large by itself. Results are small
records, errors of the user travel as their text.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import psutil
from distributed import Reschedule, get_worker
from distributed.core import Status

from saeflow import __version__
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress
from saeflow.store.artefact import Artefact
from saeflow.store.lease import acquire
from saeflow.store.records import read_checked
from saeflow.store.storage.bucket import cache_folder
from saeflow.store.store import Store, storage_of

T = TypeVar("T")

TOPIC = "saeflow"
"""Where workers tell how far they are."""
_TELL_SECONDS = 1.0


@dataclass(frozen=True)
class Session:
    """What a worker has to agree with before it may work: the store as the client calls it, and the client's
    saeflow."""

    store: str
    token: str
    saeflow: str


class Abandoned(UserError):
    """The client is gone, or does not want this part any more, or this worker is to end."""


def work(session: Session, function: str, settings: str, item: Any) -> dict[str, Any]:
    """`module.function(store name, settings, item, progress)`: what it found, or why it refused.

    Of a worker that is to end (its lifetime, a queue, fewer workers) Dask gives the part to another.
    """
    stop_profiler(get_worker())  # it may have come after `look`
    _token.set(session.token)
    try:
        if software()["saeflow"] != session.saeflow:
            raise UserError(_other_saeflow(session, software()["saeflow"]))
        module, _, name = function.rpartition(".")
        progress = Progress(verbosity=-1, listener=_Telling(session.token, item))
        return {"found": getattr(import_module(f"saeflow.{module}"), name)(session.store, settings, item, progress)}
    except Abandoned:
        raise Reschedule from None
    except UserError as error:
        text, host = str(error), platform.node()
        return {"refused": text if host in text else f"On the worker {host}: {text}"}
    except Exception as error:
        error.add_note(f"It happened on the worker {platform.node()}, in {function}, part {item}.")
        raise


class _Telling:
    """Tells the client, once a second, how much of an item is done; ends work that nobody waits for."""

    def __init__(self, token: str, item: Any) -> None:
        self.worker, self.key = get_worker(), get_worker().get_current_task()
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
        """For what waits for others: it ends as soon as nobody waits for it."""
        self.require_wanted()
        time.sleep(seconds)


def wait_for_turn(targets: Iterable[Artefact], progress: Progress) -> None:
    """Wait until nobody writes these artefacts; Abandoned where nobody waits for this task any more."""
    telling = progress.listener
    assert isinstance(telling, _Telling)
    for target in targets:
        acquire(target.slot, target.id, "wait", telling.sleep).release()


one_at_a_time = threading.Lock()
"""For work that uses one model, or all the threads that the recipe gives it."""
_opening = threading.Lock()
_held: dict[tuple[Any, ...], Any] = {}
_token: ContextVar[str] = ContextVar("token", default="")
"""Of the run that the task at hand belongs to."""


def held(make: Callable[..., T], *key: Any) -> T:
    """What `make(*key)` gives; it is kept until something else is asked for, so that a worker loads a model once."""
    with _opening:
        name = (_token.get(), make.__module__, make.__qualname__, *key)
        if name not in _held:
            _held.clear()
            _held[name] = make(*key)
        found: T = _held[name]
        return found


def let_go(token: str | None = None) -> None:
    """Free what is held, or what is held of one run, where nothing is being opened."""
    if _opening.acquire(blocking=False):
        for name in [name for name in _held if token in (None, name[0])]:
            del _held[name]
        _opening.release()


def store_at(name: str) -> Store:
    """Return the store as this machine sees it, with its records as they are now."""
    store = Store.at(storage_of(name, _own_cache))
    _require_seen(name, store.root / "store.json")
    return store


def shared(store: Store, id: str) -> Artefact:
    """An artefact that the client has begun, for parts which another worker may make at the same time."""
    target = replace(store.by_id(id), shared=True)
    if not target.exists():
        raise UserError(_not_seen(store.name, f"{id} is not there"))
    return target


@cache
def _own_cache(url: str) -> Path:
    """A folder of this process alone: the records that another process keeps there are not to change under it."""
    home = cache_folder(url)
    begin = f"{home.name}-worker-{platform.node()}-"
    for left in home.parent.glob(f"{begin}*"):
        pid = left.name.removeprefix(begin)  # of the machine a-1 it is more than a number, seen from the machine a
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    folder = home.with_name(f"{begin}{os.getpid()}")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def stop_profiler(worker: Any) -> None:
    """Dask's profiler of tasks asks for all threads' frames a hundred times a second; in Python 3.11 that can block the
    process for ever when a thread begins or ends (github.com/dask/distributed/issues/8616)."""
    profiler = worker.periodic_callbacks.get("profile")
    if sys.version_info < (3, 12) and profiler is not None and profiler.is_running():
        worker.loop.add_callback(profiler.stop)


def look(session: Session, marker: str, dask_worker: Any = None) -> dict[str, Any]:
    """Of this worker: its host, its software, and what keeps it from working, if anything."""
    stop_profiler(dask_worker)
    found: dict[str, Any] = {"host": platform.node(), "software": software(), "problem": None}
    if found["software"]["saeflow"] != session.saeflow:
        return found | {"problem": _other_saeflow(session, found["software"]["saeflow"])}
    try:
        storage = storage_of(session.store, _own_cache)
        for file in ("store.json", marker):
            _require_seen(session.store, storage.fetch(storage.root / file, fresh=True))
    except FileNotFoundError:
        found["problem"] = _not_seen(session.store)
    except UserError as error:
        found["problem"] = str(error)
    except OSError as error:
        found["problem"] = f"The worker on {platform.node()} cannot work there: {error}"
    return found


def _require_seen(store: str, path: Path) -> None:
    try:
        if path.name == "store.json":
            read_checked(path)
        else:
            path.read_bytes()
    except OSError as error:
        raise UserError(_not_seen(store, error.strerror)) from error


def _not_seen(store: str, why: str | None = None) -> str:
    return (
        f"The worker on {platform.node()} does not see the store {store}{f' ({why})' if why else ''}.\n"
        "The store is all that workers share: put it where every machine sees it under this path (a network file "
        "system), or in an object store (--store s3://…)."
    )


def _other_saeflow(session: Session, mine: str) -> str:
    return (
        f"The worker on {platform.node()} has saeflow {mine}, this machine {session.saeflow}.\n"
        "Install the same version on both and start the workers again."
    )


@cache
def software() -> dict[str, str]:
    """Versions that results depend on; of saeflow also a digest of its modules."""
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


def settings_of(text: str) -> dict[str, Any]:
    """The settings of a task, which travel as JSON."""
    return dict(json.loads(text))
