"""Executors for tests: a cluster whose only worker is this process, and one that calls a test around each part."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from saeflow.pipeline.parts import Executor, Item, Made, PartWork, Tally
from saeflow.recipe.cluster import ClusterConfig
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
from tests.support.small_pipeline import quiet


@dataclass
class FakeCluster:
    """Makes parts as a worker does: from the name, JSON and numbers that would go to one."""

    n_expected: int = 2
    backwards: bool = False
    """The last part is finished first."""
    before: Callable[[PartWork, Item], object] = lambda work, item: None
    works: list[PartWork] = field(default_factory=list)
    n_joined: int = 0
    n_calls: int = 2
    client: Any = field(default_factory=lambda: SimpleNamespace(status="running"))

    @contextlib.contextmanager
    def join(self, store: Store, config: ClusterConfig, progress: Progress) -> Iterator[Any]:
        self.store, self.n_joined = store, self.n_joined + 1
        yield self

    def each(self, work: PartWork, items: Sequence[Item], tally: Tally) -> Made:
        self.works.append(work)
        made = ((item, self._made(work, item)) for item in items)
        for item, records in list(made)[::-1] if self.backwards else made:
            work.note(records)
            yield item, records

    def _made(self, work: PartWork, item: Item) -> Any:
        self.before(work, item)
        settings = json.loads(json.dumps(work.settings | {"threads": 1}))
        return work.maker.open(self.store, settings).make(json.loads(json.dumps(item)), quiet())


@dataclass
class IdleCluster(FakeCluster):
    """Says that it has made every part, and makes none."""

    def each(self, work: PartWork, items: Sequence[Item], tally: Tally) -> Made:
        self.works.append(work)
        for item in items:
            yield item, {}


@dataclass
class Watched:
    """An executor that calls a test around each part."""

    inner: Executor
    before: Callable[[Item], object] = lambda item: None
    after: Callable[[Item], object] = lambda item: None

    @property
    def n_calls(self) -> int:
        return self.inner.n_calls

    def each(self, work: PartWork, items: Sequence[Item], tally: Tally) -> Made:
        for item in items:
            self.before(item)
            yield from self.inner.each(work, [item], tally)
            self.after(item)
