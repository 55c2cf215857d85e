"""A stage's parts: what they are, and how one is made, on whatever machine.

Each stage has a `PartMaker`, which makes one part, and describes its missing parts as a `PartWork`. An `Executor` makes
them: `Here` in this process, `dask.workers.Workers` on a cluster. Flows put a Prefect task around each part.
"""

from __future__ import annotations

import contextlib
import json
import platform
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord
from saeflow.store.store import Store

Item = Any
"""Names one part in JSON: an index, or a list of names and numbers."""

Records = dict[str, dict[str, Any]]
"""A part's record in each artefact that holds the part, as JSON, by the artefact's id."""

Made = Generator[tuple[Item, Records], None, None]
"""Parts with their records, as they are finished."""

_MAKERS: dict[str, type[PartMaker]] = {}


class PartMaker(ABC):
    """Makes parts of one stage. Workers run only makers that a stage has registered, by subclassing."""

    name: ClassVar[str]
    """Stage and verb, as Dask's page shows the task."""
    alone: ClassVar[bool]
    """True if a process makes one part at a time, because each uses the whole model or all threads."""
    stays: ClassVar[bool]
    """True if a worker keeps the maker from part to part, because it holds a model."""

    def __init_subclass__(cls, *, name: str, alone: bool = True, stays: bool = False) -> None:
        super().__init_subclass__()
        cls.name, cls.alone, cls.stays = name, alone, stays
        _MAKERS[name] = cls

    @classmethod
    @abstractmethod
    def open(cls, store: Store, settings: dict[str, Any]) -> Self:
        """On a worker: load what every part needs, from artefacts that the client has begun."""

    @abstractmethod
    def make(self, item: Item, progress: Progress) -> Records:
        """Make one part. Bars of `progress` count its units from 0."""

    def waits_for(self, item: Item) -> Sequence[Artefact]:
        """Artefacts whose leases `make` takes: a worker waits until they are free before its turn."""
        return ()


def registered(name: str) -> type[PartMaker]:
    """Return the maker of this name. Raises UserError if no stage has registered it."""
    if name not in _MAKERS:
        raise UserError(f"{name!r} is no work of a stage. Workers make: {', '.join(sorted(_MAKERS))}.")
    return _MAKERS[name]


@dataclass(frozen=True)
class PartWork:
    """The parts that a stage lacks."""

    maker: type[PartMaker]
    settings: dict[str, Any]
    """Settings in JSON with which a worker opens the maker."""
    sizes: Sequence[tuple[Item, int]]
    """Each part with its units, in the order in which parts are begun."""
    targets: Sequence[Artefact]
    """The artefacts that get the parts."""
    bar: tuple[str, str]
    """Name and unit of the bar that counts the units of all parts."""
    here: PartMaker | None = None
    """The maker of this process; None if workers make the parts."""
    threads: int = 0
    """Threads for a part that has its process to itself. 0: as many as there are cores."""
    n_at_once: int = 1
    """Parts that this process makes at the same time."""
    made: Callable[[Item, Records], None] = lambda item, records: None
    """Called with each part once it is made, in the order in which parts are finished."""
    publish: Callable[[], object] = lambda: None
    """Called once all parts are made."""

    @property
    def items(self) -> list[Item]:
        return [item for item, _ in self.sizes]

    def run(self, executor: Executor, progress: Progress) -> None:
        """Make every part on one bar, then publish."""
        with self.open_bar(progress) as bar:
            self.make(executor, bar)
        self.publish()

    def run_here(self, progress: Progress, through: Through) -> None:
        """Make every part in this process, then publish."""
        self.run(through(Here(self.n_at_once)), progress)

    def open_bar(self, progress: Progress) -> contextlib.AbstractContextManager[Bar]:
        stage, unit = self.bar
        return progress.bar(stage, sum(size for _, size in self.sizes), unit)

    def make(self, executor: Executor, bar: Bar) -> None:
        """Make every part, but publish none."""
        with contextlib.closing(executor.each(self, self.items, Tally(bar, self.sizes))) as made:
            for item, records in made:
                self.made(item, records)
        if self.here is None:  # see what other machines have finished
            for target in self.targets:
                target.look_again()

    def note(self, records: Records) -> None:
        """Count parts that another process has made as made by this run."""
        targets = {target.id: target for target in self.targets}
        for name, record in records.items():
            part = PartRecord.model_validate(record)
            targets[name].made[part.index] = part


def key_of_item(item: Item) -> str:
    return json.dumps(item)


class Tally:
    """Counts the units of parts on one bar: a part that is made twice counts once."""

    def __init__(self, bar: Bar, sizes: Sequence[tuple[Item, int]]) -> None:
        self.bar, self._sizes = bar, {key_of_item(item): size for item, size in sizes}
        self._done, self._lock = dict[str, int](), threading.Lock()

    def begin(self, item: Item) -> None:
        """Count this part's units from now on."""
        with self._lock:
            self._done.setdefault(key_of_item(item), 0)

    def tell(self, key: str, done: int) -> None:
        """Note that so many units of a part are done."""
        with self._lock:
            new = done - self._done.get(key, done)
            if new > 0:
                self._done[key] = done
                self.bar.advance(new)

    def finish(self, item: Item) -> None:
        """Count the units of a finished part that nobody has told of."""
        self.tell(key_of_item(item), self._sizes[key_of_item(item)])

    def progress(self, item: Item) -> Progress:
        """Return the progress that a part of this process reports to."""
        self.begin(item)
        key = key_of_item(item)
        return Progress(verbosity=-1, listener=lambda bar: self.tell(key, bar.done), stopping=self.bar.stopping)


class Executor(Protocol):
    """Makes parts."""

    @property
    def n_calls(self) -> int:
        """Calls of `each` at the same time, with one part each, that keep it busy."""

    def each(self, work: PartWork, items: Sequence[Item], tally: Tally) -> Made:
        """Make these parts; yield each with its records once it is made. Safe to call from several threads."""


Through = Callable[[Executor], Executor]
"""Puts something around an executor: a Prefect task around each part."""


def directly(executor: Executor) -> Executor:
    return executor


@dataclass(frozen=True)
class Here:
    """Makes parts in this process: in the calling thread, or several at once if the maker allows that."""

    n_calls: int = 1

    def each(self, work: PartWork, items: Sequence[Item], tally: Tally) -> Made:
        maker = work.here
        assert maker is not None

        def make(item: Item) -> tuple[Item, Records]:
            return item, maker.make(item, tally.progress(item))

        if work.maker.alone:
            yield from map(make, items)
            return
        with ThreadPoolExecutor(self.n_calls, "saeflow-parts") as pool:
            try:
                for future in as_completed([pool.submit(make, item) for item in items]):
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def shared(store: Store, id: str) -> Artefact:
    """Return an artefact that the client has begun, for parts that another worker may make at the same time."""
    target = replace(store.by_id(id), shared=True)
    if not target.exists():
        raise UserError(not_seen(store.name, f"{id} is not there"))
    return target


def dumped(records: Mapping[Artefact, PartRecord]) -> Records:
    return {target.id: record.as_json for target, record in records.items()}


def not_seen(store: str, why: str | None = None) -> str:
    """Return the message for a worker that does not find the store."""
    return (
        f"The worker on {platform.node()} does not see the store {store}{f' ({why})' if why else ''}.\n"
        "The store is all that workers share: put it where every machine sees it under this path (a network file "
        "system), or in an object store (--store s3://…)."
    )
