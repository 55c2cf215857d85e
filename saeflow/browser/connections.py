"""DuckDB connections for pages: one for each open run, made anew when the store has changed.

A page that is asked for after a generation was published shows that generation. It waits while the run is opened again.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import duckdb
from dask.system import cpu_count

from saeflow.query.ask import READ_TO_RESOLVE
from saeflow.query.catalog import OF_EVERY_RUN
from saeflow.query.connection import connect_to_run
from saeflow.query.files.chosen import list_all
from saeflow.query.files.quoting import identifier
from saeflow.query.kept_catalog import expect_many_connections
from saeflow.query.runs import Run
from saeflow.runtime.errors import UserError
from saeflow.runtime.memory import total_memory
from saeflow.runtime.sql_errors import QUERY_ERRORS
from saeflow.store.records import BESIDE
from saeflow.store.store import Store

Made = TypeVar("Made")

MOST_OPEN = 4
"""Connections that are open at the same time. The one that was asked longest ago is closed."""

LIST_OF_RUNS = frozenset({"runs"})
SIDE_BY_SIDE = LIST_OF_RUNS | OF_EVERY_RUN | READ_TO_RESOLVE
"""What pages of several runs read. All other pages read one run: views of all runs would take long."""

QUERY_SECONDS = 20.0
"""A question that takes longer is stopped."""


class TooSlow(UserError):
    """A question took longer than a page waits."""


@dataclass(frozen=True)
class OpenedRun:
    """A run with a cursor of its own, for one request. The files are those of one generation."""

    store: Store
    run: Run
    cursor: duckdb.DuckDBPyConnection

    @contextlib.contextmanager
    def with_own_cursor(self) -> Iterator[OpenedRun]:
        """Give the run with a cursor that another thread may use at the same time."""
        with contextlib.closing(self.cursor.cursor()) as cursor:
            cursor.execute("set search_path = ?", [identifier(self.run.schema)])
            list_all(cursor)
            yield replace(self, cursor=cursor)


@dataclass
class _Place:
    """Where a connection is kept, with what the store had published when it was made."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    state: object = None
    found: tuple[Run, duckdb.DuckDBPyConnection] | None = None


class Connections:
    """The open runs of a store, for many threads. Each request sees one generation of its run from start to end."""

    def __init__(self, store: Store, seconds: float = QUERY_SECONDS) -> None:
        expect_many_connections()
        self.store, self.seconds = store, seconds
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str | None, frozenset[str] | None], _Place] = OrderedDict()
        self._places = threading.BoundedSemaphore(cpu_count())

    @contextlib.contextmanager
    def opened(self, name: str | None = None, names: frozenset[str] | None = None) -> Iterator[OpenedRun]:
        """Open a run by name, or the newest, for a request that reads these views and macros, or any of one run.

        Raises UserError if there is none, TooSlow after `seconds`. At most as many requests ask at the same time as
        there are cores; those that wait for a run to be opened take no place of theirs.
        """
        run, connection = self._current(name, names)
        if not self._places.acquire(timeout=self.seconds):
            raise TooSlow("Too many questions are asked at the same time. Ask again in a moment.")
        try:
            with OpenedRun(self.store, run, connection).with_own_cursor() as found, self._limited(found.cursor):
                yield found
        finally:
            self._places.release()

    def ask(
        self, make: Callable[[OpenedRun], Made], name: str | None = None, names: frozenset[str] | None = None
    ) -> Made:
        """Return what `make` gives for a run that is `opened`.

        If that fails and the store has changed meanwhile, it is tried again: `saeflow gc` may have removed files that
        were being read.
        """
        before = generations(self.store)
        try:
            with self.opened(name, names) as opened:
                return make(opened)
        except TooSlow:
            raise
        except (UserError, *QUERY_ERRORS):
            if generations(self.store) == before:
                raise
        return self.ask(make, name, names)

    @contextlib.contextmanager
    def _limited(self, cursor: duckdb.DuckDBPyConnection) -> Iterator[None]:
        """Stop what the cursor does after `seconds`, and what it begins later."""
        late, done = threading.Event(), threading.Event()

        def stop() -> None:
            late.set()
            while not done.wait(0.1):
                cursor.interrupt()

        timer = threading.Timer(self.seconds, stop)
        timer.start()
        try:
            yield
        except Exception as error:
            if late.is_set():
                raise TooSlow(
                    f"The question took longer than {self.seconds:.0f} seconds and was stopped.\n"
                    "Ask it in a terminal: saeflow ask"
                ) from error
            raise
        finally:
            done.set()
            timer.cancel()

    def _current(self, name: str | None, names: frozenset[str] | None) -> tuple[Run, duckdb.DuckDBPyConnection]:
        """Return the run as it is now published. Connections that others still use end with their last cursor."""
        key = name, names
        with self._lock:
            self.store.storage.pull()
            place = self._open.setdefault(key, _Place())
        with place.lock:
            state = generations(self.store)
            if place.found is None or place.state != state:
                place.found = None
                try:
                    place.found = connect_to_run(
                        self.store, name, f"{total_memory() // 8}B", for_pages=True, names=names
                    )
                except Exception:
                    self._open.pop(key, None)
                    raise
                place.state = state
            found = place.found
        with self._lock:
            self._open[key] = place
            self._open.move_to_end(key)
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        return found

    def close(self) -> None:
        with self._lock:
            self._open.clear()


@contextlib.contextmanager
def opened_alone(store: Store, name: str | None) -> Iterator[OpenedRun]:
    """Open a run by name, or the newest, for one caller who may take any time. Raises UserError if there is none."""
    run, connection = connect_to_run(store, name, for_pages=True)
    with contextlib.closing(connection):
        yield OpenedRun(store, run, connection)


def generations(store: Store) -> object:
    """Return what changes whenever a run, its tokens, a file of labels, or what is known beside them is published."""
    found = []
    for artefact in store.artefacts("features", "tokens"):
        with contextlib.suppress(OSError):
            found.append((artefact.id, (artefact.path / "manifest.json").stat().st_mtime_ns))
            found.append((artefact.id, (artefact.path / "quality.json").stat().st_mtime_ns))
    for artefact in store.artefacts(*BESIDE):
        with contextlib.suppress(OSError):
            found.append((artefact.id, (artefact.path / "artefact.json").stat().st_mtime_ns))
    return found, store.storage.versions(store.root / "labels")
