"""Where workers are: the scheduler that a recipe names, or a cluster that is started for a run and ended with it."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from distributed import Client

from saeflow.recipe.cluster import ClusterConfig
from saeflow.runtime.errors import UserError, first_line

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
"""Module, class and package of each kind."""


def say_less() -> None:
    """Of Dask's own lines in this process only warnings; a lost scheduler, and a worker that is ended, are ours to
    tell."""
    levels = {
        "": logging.WARNING,
        ".client": logging.CRITICAL,
        ".nanny": logging.ERROR,
        ".nanny.memory": logging.WARNING,
    }
    for name, level in levels.items():
        logging.getLogger(f"distributed{name}").setLevel(level)


@contextlib.contextmanager
def started(config: ClusterConfig) -> Iterator[Any]:
    """A cluster of the kind that is asked for, ended with the block; None where one is there already."""
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
        case "local" | "local-cuda":  # nothing of it listens but on loopback
            given |= {"threads_per_worker": config.threads_per_worker, "host": "127.0.0.1"}
            given["dashboard_address"] = "127.0.0.1:0"
        case "slurm" | "pbs" | "sge" | "lsf":
            given |= {"cores": config.threads_per_worker, "processes": 1}
    return given | config.options


def threads_of_worker(config: ClusterConfig, n_workers: int, n_cores: int) -> int:
    """Threads for one part on one of so many workers that the run has started; 0: as many as the worker sees cores.

    Workers that are started on this machine share its cores.
    """
    match config.starts:
        case "local" | "local-cuda":
            return max(config.threads_per_worker, n_cores // n_workers)
        case "slurm" | "pbs" | "sge" | "lsf":
            return int(config.options.get("cores", config.threads_per_worker))
    return 0


@contextlib.contextmanager
def client_of(config: ClusterConfig, cluster: Any) -> Iterator[Client]:
    """Of a cluster that was started, or of the scheduler that is named. Raises UserError where nobody answers."""
    client = _connected(config, cluster)
    try:
        yield client
    finally:
        client.close(timeout=_CLOSE_SECONDS if client.status == "running" else 1)


def _connected(config: ClusterConfig, cluster: Any) -> Client:
    address = config.address or config.scheduler_file or f"the address of cluster.kind = {config.starts!r}"
    way_out = "Start one, `dask scheduler --host 127.0.0.1`, with workers, or set cluster.address to where it is."
    if config.starts:
        way_out = "Raise cluster.wait_seconds, or check cluster.options."
    try:
        where = cluster or config.address or _address_in(config)
        return Client(where, timeout=config.wait_seconds, set_as_default=False, name="saeflow")
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        raise UserError(
            f"No Dask scheduler answers at {address} within {config.wait_seconds:g} s (cluster.wait_seconds): "
            f"{first_line(error)}.\n{way_out}"
        ) from error


def _address_in(config: ClusterConfig) -> str:
    """The address that a scheduler has written; waits for the file. Raises OSError where it is not there in time,
    ValueError where it says no address."""
    assert config.scheduler_file is not None
    until = time.monotonic() + config.wait_seconds
    while True:
        try:
            return str(json.loads(Path(config.scheduler_file).read_text("utf-8"))["address"])
        except (KeyError, TypeError):
            found: Exception = ValueError("it is not what `dask scheduler --scheduler-file` writes")
        except (OSError, ValueError) as error:
            found = error
        if time.monotonic() > until:
            raise found
        time.sleep(0.2)
