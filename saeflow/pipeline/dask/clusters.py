"""The clusters that a command joins or starts: each once, and ended with the command."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from saeflow.pipeline.dask.fit import Session, require_fit, software
from saeflow.pipeline.dask.start import client_of, say_less, started
from saeflow.pipeline.dask.work import TOPIC, let_go
from saeflow.pipeline.dask.workers import Workers
from saeflow.pipeline.parts import Here, PartWork, Through, directly
from saeflow.recipe.cluster import ClusterConfig
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store


@contextlib.contextmanager
def joined(
    store: Store, config: ClusterConfig, progress: Progress,
    start: Callable[[ClusterConfig], contextlib.AbstractContextManager[Any]] = started,
) -> Iterator[Workers]:  # fmt: skip
    """Join a cluster, which is started if the settings say so, and require that its workers can work in the store."""
    say_less()
    session = Session(store.name, uuid.uuid4().hex, software()["saeflow"])
    with start(config) as cluster, client_of(config, cluster) as client:
        workers = Workers(client, config, session)
        try:
            client.wait_for_workers(1, timeout=config.wait_seconds)
        except TimeoutError:
            raise workers.alone("no worker") from None
        require_fit(client, session, store, progress)
        client.subscribe_topic(TOPIC, workers.told)
        progress.say(f"cluster: {len(workers.able())} workers of {workers.address}, {workers.n_threads} parts at once")
        try:
            yield workers
            if client.status == "running":
                with contextlib.suppress(Exception):  # what a lost scheduler's workers hold is no matter of ours
                    client.run(let_go, session.token, on_error="ignore")
        finally:
            workers.closed.set()


Join = Callable[[Store, ClusterConfig, Progress], contextlib.AbstractContextManager[Workers]]


class Clusters:
    """The clusters that are open, by store and settings."""

    def __init__(self, stack: contextlib.ExitStack, join: Join) -> None:
        self._stack, self._join, self._open = stack, join, dict[tuple[str, str], Workers]()

    def workers(self, store: Store, config: ClusterConfig, progress: Progress) -> Workers:
        """The workers of a cluster, which is joined unless it is open already and not lost."""
        key = store.name, config.model_dump_json()
        if key not in self._open or self._open[key].client.status != "running":
            self._open[key] = self._stack.enter_context(self._join(store, config, progress))
        return self._open[key]


_current: ContextVar[Clusters | None] = ContextVar("clusters", default=None)


@contextlib.contextmanager
def kept_open(join: Join = joined) -> Iterator[Clusters]:
    """Keep every cluster that is opened inside the block for later stages. A block inside another uses its clusters."""
    if (outer := _current.get()) is not None:
        yield outer
        return
    with contextlib.ExitStack() as stack:
        clusters = Clusters(stack, join)
        token = _current.set(clusters)
        try:
            yield clusters
        finally:
            _current.reset(token)


@contextlib.contextmanager
def workers_of(store: Store, config: ClusterConfig, progress: Progress) -> Iterator[Workers]:
    """The workers of a cluster. Raises UserError if they cannot work."""
    with kept_open() as clusters:
        yield clusters.workers(store, config, progress)


def make_parts(
    work: PartWork, store: Store, cluster: ClusterConfig | None, progress: Progress, through: Through = directly
) -> None:
    """Make the parts of a stage on the cluster, or without one in this process; then publish them."""
    if cluster is None or not work.sizes:
        work.run(through(Here(work.n_at_once)), progress)
        return
    with workers_of(store, cluster, progress) as workers:
        work.run(through(workers), progress)
