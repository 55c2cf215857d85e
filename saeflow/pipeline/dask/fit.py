"""Whether a cluster fits this run: scheduler and workers have the client's saeflow and see its store.

The first half runs on workers, the second in the client.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from distributed import Client

from saeflow import __version__
from saeflow.pipeline.parts import not_seen
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.files import make_folder
from saeflow.store.records import read_checked
from saeflow.store.storage.bucket import cache_folder
from saeflow.store.store import Store, storage_of


@dataclass(frozen=True)
class Session:
    """What a worker must agree with before it may work: the store as the client calls it, and the client's saeflow."""

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
    """Describe this worker: its host, its software, and what keeps it from working, if anything."""
    stop_profiler(dask_worker)
    found: dict[str, Any] = {"host": platform.node(), "software": software(), "problem": None}
    if found["software"]["saeflow"] != session.saeflow:
        return found | {"problem": other_saeflow(session, found["software"]["saeflow"])}
    return found | {"problem": _why_unfit(session.store, marker)}


def _why_unfit(store: str, marker: str) -> str | None:
    """Why this worker cannot work in the store."""
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
        if path.name == "store.json":
            read_checked(path)
        else:
            path.read_bytes()
    except OSError as error:
        raise UserError(not_seen(store, error.strerror)) from error


def other_saeflow(session: Session, mine: str) -> str:
    return (
        f"The worker on {platform.node()} has saeflow {mine}, this machine {session.saeflow}.\n"
        "Install the same version on both and start the workers again."
    )


@cache
def software() -> dict[str, str]:
    """Versions that results depend on; for saeflow also a digest of its modules."""
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


def require_fit(
    client: Client, session: Session, store: Store, progress: Progress,
    ask: Callable[[], dict[str, str]] = software,
) -> None:  # fmt: skip
    """Require that every worker has this saeflow and sees this store; warn of other versions of what it uses.

    A scheduler reads tasks before it hands them on, so it must have saeflow as well (`ask` is what it is asked).
    """
    address = client.scheduler.address if client.scheduler else ""
    try:
        client.run_on_scheduler(ask)
    except (ImportError, AttributeError) as error:  # none, or an early one
        raise _cannot_load(f"Dask scheduler at {address}", session, error) from error
    marker = store.root / "tmp" / f"cluster-{session.token}"
    make_folder(marker.parent)
    marker.write_text(session.token)
    store.storage.send(marker)
    try:
        seen = client.run(look, session, marker.relative_to(store.root).as_posix(), on_error="return")
    finally:
        store.storage.remove(marker)
    for worker, found in seen.items():
        if isinstance(found, ImportError | AttributeError):
            raise _cannot_load(f"worker at {worker}", session, found)
        if isinstance(found, OSError):  # it died meanwhile; others may be there
            continue
        if isinstance(found, BaseException):
            raise found
        if found["problem"]:
            raise UserError(found["problem"])
    _warn_of_versions([found for found in seen.values() if isinstance(found, dict)], progress)


def _cannot_load(who: str, session: Session, error: Exception) -> UserError:
    return UserError(
        f"The {who} cannot load saeflow ({error}).\n"
        f"Install saeflow {session.saeflow} where scheduler and workers run, and start them again."
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
