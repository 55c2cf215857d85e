"""The section [cluster]: Dask workers that share the work."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from saeflow.recipe.section import PathFromRecipe, Section

OPTIONS = frozenset(
    {
        *("account", "cores", "cuda_visible_devices", "dashboard_address", "death_timeout", "device_memory_limit"),
        *("host", "image", "interface", "job_cpu", "job_mem", "lifetime", "lifetime_restart", "lifetime_stagger"),
        *("local_directory", "log_directory", "memory", "memory_limit", "n_workers", "name", "namespace", "nanny"),
        *("port", "processes", "project", "protocol", "queue", "resource_spec", "resources", "rmm_pool_size"),
        *("scheduler_port", "silence_logs", "threads_per_worker", "walltime"),
    }
)
"""What a recipe may say of a cluster. Options that name code or a line of a shell are not among these."""

_PLAIN = re.compile(r"(?!-)(?:[\w.:,/@%+=-]| (?!-))*")
"""Text that ends no line of a job's script, that no shell expands, and that adds no option: `/tmp --preload x`."""

_LOOPBACK = re.compile(r"(?:127\.0\.0\.1|localhost|lo)(?::\d+)?")


def _texts(value: Any) -> list[str]:
    """Return all texts in a value, keys too."""
    if isinstance(value, dict | list | tuple):
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        return [text for each in inside for text in _texts(each)]
    return [value] if isinstance(value, str) else []


class ClusterConfig(Section):
    """Dask workers that collect, encode, compact and train. They share only the store with this machine."""

    address: str | None = Field(
        None,
        pattern=r"^(tcp|tls)://\S+:\d+$",
        examples=["tcp://127.0.0.1:8786"],
        description="Scheduler of a running cluster. For tls://, set the certificates in Dask's own configuration.",
    )
    scheduler_file: PathFromRecipe | None = Field(
        None,
        examples=["scheduler.json"],
        description="File written by `dask scheduler --scheduler-file`, instead of an address.",
    )
    kind: Literal["local", "local-cuda", "slurm", "pbs", "sge", "lsf", "kubernetes"] | None = Field(
        None,
        examples=["local"],
        description="Kind of cluster that saeflow starts and stops itself. Default: `local`, if the two above are not "
        "set.",
    )
    n_workers: PositiveInt | None = Field(
        None,
        examples=[2],
        description="Workers to start. Default: one per core (`local`) or per GPU (`local-cuda`).",
    )
    threads_per_worker: PositiveInt = Field(
        1,
        description="Parts a worker encodes at the same time. (It collects, trains and merges one at a time.) On "
        "Kubernetes, set the cores in `options` instead.",
    )
    ranks: PositiveInt = Field(
        1,
        description="Workers that train one SAE together and share what `train.parallel` says. They must reach one "
        "another. 1: each worker trains SAEs of its own.",
    )
    options: dict[str, Any] = Field(
        {},
        description="More arguments for the cluster class of dask, dask_cuda, dask_jobqueue or dask_kubernetes: sizes, "
        "times, queues, names. What runs code, such as `preload`, stands in Dask's own configuration.",
    )
    wait_seconds: PositiveFloat = Field(60, description="Seconds to wait for the scheduler and the first worker.")

    @property
    def starts(self) -> str | None:
        """The kind of cluster to start; None if the recipe names a running one."""
        return None if self.address or self.scheduler_file else self.kind or "local"

    @field_validator("options")
    @classmethod
    def _name_no_code(cls, options: dict[str, Any]) -> dict[str, Any]:
        """A recipe may come from somebody else, or from Prefect's API."""
        for name, value in options.items():
            if name.lower() not in OPTIONS:
                raise ValueError(
                    f"{name[:80]!r} is no option that a recipe may set: it could name code. It may set "
                    f"{', '.join(sorted(OPTIONS))}. Set others in Dask's own configuration (~/.config/dask)."
                )
            if wrong := [text for text in _texts(value) if not _PLAIN.fullmatch(text)]:
                raise ValueError(
                    f"{name} is {wrong[0][:80]!r}, but it may hold only letters, digits, spaces, . : , / @ % + = - _ "
                    "and no word that begins with -"
                )
        return options

    @model_validator(mode="after")
    def _listens_on_this_machine_alone(self) -> ClusterConfig:
        """Whoever reaches a scheduler can run code on it."""
        for name in ("host", "interface", "dashboard_address") if (self.starts or "").startswith("local") else ():
            value = self.options.get(name)
            if value is not None and not _LOOPBACK.fullmatch(str(value)):
                raise ValueError(
                    f"cluster.options.{name} is {value!r}, but a cluster of kind {self.starts} listens on this machine "
                    "alone: 127.0.0.1, 127.0.0.1:8787 or lo. For workers on other machines start a scheduler, and set "
                    "cluster.address."
                )
        return self

    @model_validator(mode="after")
    def _is_one_cluster(self) -> ClusterConfig:
        named = {"address": self.address, "scheduler_file": self.scheduler_file, "kind": self.kind}
        if len(given := [f"cluster.{name}" for name, value in named.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} each name a cluster. Keep one of them.")
        if self.starts not in (None, "local", "local-cuda") and self.n_workers is None:
            raise ValueError(f"cluster.kind is {self.kind!r}, which needs cluster.n_workers: how many to start.")
        return self

    @model_validator(mode="after")
    def _only_settings_of_this_cluster(self) -> ClusterConfig:
        fields = type(self).model_fields
        of_starting = ("n_workers", "threads_per_worker", "options")
        given = [name for name in of_starting if getattr(self, name) != fields[name].default]
        if self.starts is None and given:
            raise ValueError(
                f"cluster.{given[0]} is for clusters that saeflow starts (cluster.kind), but the cluster of "
                f"cluster.{'address' if self.address else 'scheduler_file'} is already running. Leave it out."
            )
        if self.n_workers is not None and self.n_workers < self.ranks:
            raise ValueError(
                f"cluster.ranks is {self.ranks}, but cluster.n_workers is {self.n_workers}. "
                "Start a worker for each rank."
            )
        if self.starts == "kubernetes" and "threads_per_worker" in given:
            raise ValueError(
                f"cluster.threads_per_worker is {self.threads_per_worker}, but on Kubernetes the image and "
                "cluster.options set the threads per worker. Leave it out."
            )
        return self


def by_address(value: object) -> object:
    """Return `cluster = "tcp://host:8786"` as its section, and an empty section as None."""
    return {"address": value} if isinstance(value, str) else value or None
