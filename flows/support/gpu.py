"""One flow run a GPU at a time: Prefect's global concurrency limit `saeflow-gpu`, which `saeflow serve` sets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from prefect import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists

from saeflow.pipeline import run
from saeflow.recipe.recipe import Recipe

LIMIT = "saeflow-gpu"


def set_limit(n_gpus: int) -> None:
    """Let so many flow runs use a GPU at once, on all machines of this server together, unless a number is set
    already."""
    with get_client(sync_client=True) as client, contextlib.suppress(ObjectAlreadyExists):
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=n_gpus))


@contextlib.contextmanager
def gpu_slot(recipe: Recipe, *devices: str) -> Iterator[None]:
    """Wait until a GPU is free, if one of these settings of `device` means one of this machine, and hold it. Without a
    limit there is no wait; what a cluster's workers do is theirs."""
    if recipe.cluster is None and any(map(uses_gpu, devices)):
        with concurrency(LIMIT, occupy=1, raise_on_lease_renewal_failure=False):
            yield
    else:
        yield


def places(recipe: Recipe) -> run.Place:
    """Has each stage of a recipe wait until a GPU is free, if it uses one of this machine, and hold it while it
    works."""
    alone = recipe.model_copy(update={"cluster": None})
    return lambda stage: gpu_slot(alone, *run.devices_of(recipe, stage))


def uses_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
