"""Workers of a Dask cluster train one SAE together, each as a rank: the SAE that `torchrun` gives."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saeflow.pipeline import train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.support.small_pipeline import a_table, brought_data, quiet, tree, write_recipe, write_table
from tests.system.test_cluster import Cluster, Running, checkpoint_written
from tests.train.test_ranks import finished, started

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]  # Dask's own, when its processes are killed


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    here = Cluster(tmp_path_factory.mktemp("dask"))
    here.start_scheduler()
    here.start_workers(0, 1)
    try:
        yield here
    finally:
        here.kill(*here.processes)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "t.npy", a_table(width=16))


@pytest.fixture(scope="module")
def stored(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store.create(tmp_path_factory.mktemp("stored") / "store")
    import_table.run(Lineage(store, parse_recipe(recipe_of(table))), quiet())
    return store.root


def recipe_of(table: Path, **train: Any) -> dict[str, Any]:
    return brought_data(
        table,
        name="together",
        data="brought",
        activations={"dtype": "float32"},
        feed={"batch_rows": 250},
        sae={"architecture": "batchtopk", "n_features": 61, "k": 2},
        train={"n_tokens": 5000, "log_every": 1, "lr": 5e-3, "dead_after_tokens": 200} | train,
    )


def on(dask: Cluster, recipe: dict[str, Any], ranks: int = 2) -> dict[str, Any]:
    return recipe | {"cluster": {"scheduler_file": str(dask.file), "wait_seconds": 30, "ranks": ranks}}


def copied(stored: Path, to: Path) -> Store:
    shutil.copytree(stored, to)
    return Store(to)


@pytest.mark.parametrize("parallel", ["data", "features"])
def test_two_workers_publish_the_sae_that_two_ranks_of_torchrun_publish(dask, table, stored, tmp_path, parallel):
    here, there = copied(stored, tmp_path / "here"), copied(stored, tmp_path / "there")
    recipe = recipe_of(table, parallel=parallel)
    code, said = finished(started(there.root, write_recipe(tmp_path / "together.toml", recipe)))
    assert not code, said
    train.run_all(Lineage(here, parse_recipe(on(dask, recipe))), quiet())
    assert tree(here.root / "saes") == tree(there.root / "saes")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_worker_ends_all_with_one_message_and_the_same_command_goes_on(dask, table, stored, tmp_path, lost):
    dask.restore(2)
    here, undisturbed = copied(stored, tmp_path / "here"), copied(stored, tmp_path / "undisturbed")
    recipe = recipe_of(table, n_tokens=50_000, checkpoint_seconds=0.01)
    running = Running("train", here, parse_recipe(on(dask, recipe)))
    running.start()
    running.wait_for(checkpoint_written)
    dask.kill(sorted(name for name in dask.processes if name != "scheduler")[lost])
    error = running.end()
    assert isinstance(error, UserError)
    assert "was lost, of 2 that train together" in str(error)
    assert "run the same command again" in str(error)
    dask.restore(2)
    for store in (here, undisturbed):
        train.run_all(Lineage(store, parse_recipe(on(dask, recipe))), quiet())
    assert tree(here.root / "saes") == tree(undisturbed.root / "saes")


def test_too_few_workers_and_trainings_that_ranks_cannot_share_are_refused(dask, table, stored, tmp_path):
    store = copied(stored, tmp_path / "store")
    with pytest.raises(UserError, match=r"cluster\.ranks is 3, but the scheduler at tcp://.* has 2 workers since 2 s"):
        train.run_all(Lineage(store, parse_recipe(on(dask, recipe_of(table), 3) | short(dask))), quiet())
    shared = on(dask, recipe_of(table, parallel="features", clip_norm=1.0))
    with pytest.raises(UserError, match=r"train\.clip_norm is 1\.0, but train\.parallel is features"):
        train.run_all(Lineage(store, parse_recipe(shared)), quiet())


def short(dask: Cluster) -> dict[str, Any]:
    return {"cluster": {"scheduler_file": str(dask.file), "wait_seconds": 2, "ranks": 3}}
