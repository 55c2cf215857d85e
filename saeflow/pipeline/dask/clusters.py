"""Start a cluster, or find one, and join it: once a command, which also ends it. Have its workers make parts."""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from distributed import Client
from tenacity import Retrying, stop_after_delay, wait_fixed

from saeflow.pipeline.dask.work import TOPIC, Session, let_go, look, software
from saeflow.pipeline.dask.workers import Workers
from saeflow.pipeline.parts import PartWork, Through, directly
from saeflow.recipe.cluster import ClusterConfig
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.progress import Progress
from saeflow.store.files import make_folder
from saeflow.store.store import Store

_CLOSE_SECONDS = 10.0

_CLASSES = {
    "local": ("distributed", "LocalCluster", "distributed"),
    "local-cuda": ("dask_cuda", "LocalCUDACluster", "dask-cuda"),
    "slurm": ("dask_jobqueue", "SLURMCluster", "dask-jobqueue"),
    "pbs": ("dask_jobqueue", "PBSCluster", "dask-jobqueue"),
    "sge": ("dask_jobqueue", "SGECluster", "dask-jobqueue"),
    "lsf": ("dask_jobqueue", "LSFCluster", "dask-jobqueue"),
    "kubernetes": ("dask_kubernetes.operator", "KubeCluster", "dask-kubernetes"),
}
"""Module, class and package of each kind of cluster."""


def say_less() -> None:
    """Let Dask log only warnings, and not that a scheduler is lost or a worker ended, which saeflow says itself."""
    for name, level in (("", "WARNING"), (".client", "CRITICAL"), (".nanny", "ERROR"), (".nanny.memory", "WARNING")):
        logging.getLogger(f"distributed{name}").setLevel(level)


@contextlib.contextmanager
def started(config: ClusterConfig) -> Iterator[Any]:
    """Start a cluster of the recipe's kind, which ends with the block. None if the recipe names a running one."""
    if config.starts is None:
        yield None
        return
    module, name, package = _CLASSES[config.starts]
    said = f"cluster.kind is {config.starts!r}"
    try:
        kind = getattr(import_module(module), name)
    except ImportError as error:
        raise UserError(f"{said}, which needs the package {package}. Install it: pip install {package}") from error
    try:
        cluster = kind(**_arguments(config))
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"{said}, but {name} refuses: {error}\nCheck cluster.options, which are handed to it."
        ) from error
    with contextlib.closing(cluster):
        yield cluster


def _arguments(config: ClusterConfig) -> dict[str, Any]:
    """Keyword arguments for the class of a cluster; the recipe's options come last."""
    given: dict[str, Any] = {} if config.n_workers is None else {"n_workers": config.n_workers}
    match config.starts:
        case "local" | "local-cuda":  # listen on loopback only
            given |= {"threads_per_worker": config.threads_per_worker, "host": "127.0.0.1"}
            given["dashboard_address"] = "127.0.0.1:0"
        case "slurm" | "pbs" | "sge" | "lsf":
            given |= {"cores": config.threads_per_worker, "processes": 1}
    return given | config.options


@contextlib.contextmanager
def client_of(config: ClusterConfig, cluster: Any) -> Iterator[Client]:
    """Connect to the started cluster or the named scheduler. Raises UserError if nobody answers."""
    address = config.address or config.scheduler_file or f"the address of cluster.kind = {config.starts!r}"
    way_out = "Start one, `dask scheduler --host 127.0.0.1`, with workers, or set cluster.address to where it is."
    if config.starts:
        way_out = "Raise cluster.wait_seconds, or check cluster.options."
    try:
        where = cluster or config.address or _address_in(config)
        client = Client(where, timeout=config.wait_seconds, set_as_default=False, name="saeflow")
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        raise UserError(
            f"No Dask scheduler answers at {address} within {config.wait_seconds:g} s (cluster.wait_seconds): "
            f"{first_line(error)}.\n{way_out}"
        ) from error
    try:
        yield client
    finally:
        client.close(timeout=_CLOSE_SECONDS if client.status == "running" else 1)


def _address_in(config: ClusterConfig) -> str:
    """Return the address that a scheduler has written; wait for the file.

    Raises OSError if the file is not there in time, ValueError if it has no address.
    """
    assert config.scheduler_file is not None
    for attempt in Retrying(stop=stop_after_delay(config.wait_seconds), wait=wait_fixed(0.2), reraise=True):
        with attempt:
            found = json.loads(Path(config.scheduler_file).read_text("utf-8"))
            if not isinstance(found, dict) or "address" not in found:
                raise ValueError("it is not what `dask scheduler --scheduler-file` writes")
    return str(found["address"])


def require_fit(
    client: Client, session: Session, store: Store, progress: Progress,
    ask: Callable[[], dict[str, str]] = software,
) -> None:  # fmt: skip
    """Raise UserError unless every worker has this saeflow and sees this store; warn of other versions of packages.

    A scheduler reads tasks before it hands them on, so it must have saeflow as well (it is asked to call `ask`).
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
    mine = software()
    for name in mine:
        others = sorted(
            {f"{each['software'][name]} on {each['host']}" for each in seen if each["software"][name] != mine[name]}
        )
        if others:
            progress.say(
                f"cluster: {name} is {', '.join(others)}, but {mine[name]} here; values may differ in their last digits"
            )


@contextlib.contextmanager
def joined_cluster(
    store: Store, config: ClusterConfig, progress: Progress,
    start: Callable[[ClusterConfig], contextlib.AbstractContextManager[Any]] = started,
) -> Iterator[Workers]:  # fmt: skip
    """Join a cluster, started if the settings say so. Raises UserError if its workers cannot work in the store."""
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
                with contextlib.suppress(Exception):  # a scheduler may be lost at this moment
                    client.run(let_go, session.token, on_error="ignore")
        finally:
            workers.closed.set()


Join = Callable[[Store, ClusterConfig, Progress], contextlib.AbstractContextManager[Workers]]


@dataclass
class Clusters:
    """The open clusters of this command, by store and settings."""

    stack: contextlib.ExitStack
    join: Join
    opened: dict[tuple[str, str], Workers] = field(default_factory=dict)

    def workers(self, store: Store, config: ClusterConfig, progress: Progress) -> Workers:
        """Return the workers of a cluster; join it unless it is open and not lost."""
        key = store.name, config.model_dump_json()
        if key not in self.opened or self.opened[key].client.status != "running":
            self.opened[key] = self.stack.enter_context(self.join(store, config, progress))
        return self.opened[key]


_current: ContextVar[Clusters | None] = ContextVar("clusters", default=None)


@contextlib.contextmanager
def kept_open(join: Join = joined_cluster) -> Iterator[Clusters]:
    """Keep clusters open until the block ends. A block inside another one shares its clusters."""
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
    with kept_open() as clusters:
        yield clusters.workers(store, config, progress)


def make_parts(
    work: PartWork, store: Store, cluster: ClusterConfig, progress: Progress, through: Through = directly
) -> None:
    """Make the parts of a stage on the cluster, then publish them."""
    with work.open_bar(progress) as bar, workers_of(store, cluster, progress) as workers:
        work.make(through(workers), bar)
    work.publish()
