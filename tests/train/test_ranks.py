"""Several processes train one SAE: the curve of one process, checkpoints for any number, one message at the end."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from saeflow.pipeline import train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import parse_recipe
from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.ranks import Ranks
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.split import Split
from saeflow.sae.step import DENSE_SHARE
from saeflow.store.files import read_json
from saeflow.store.store import Store
from saeflow.train import training
from saeflow.train.group import checkpoints_of
from saeflow.train.shares import require_shareable
from tests.support.command import SAEFLOW
from tests.support.ranks import ROOT, exact_losses, exact_losses_of_ranks, train_together
from tests.support.small_pipeline import a_table, brought_data, quiet, tree, write_recipe, write_table

STEPS, BATCHES = 20, 3
"""Steps of a training, and batches in one epoch of the table's 700 rows."""

CASES: dict[str, dict[str, Any]] = {
    "topk": {"sae": {"architecture": "topk"}},
    "abstopk": {"sae": {"architecture": "abstopk"}},
    "batchtopk": {"sae": {"architecture": "batchtopk"}},
    "by_token": {"sae": {"architecture": "batchtopk"}, "train": {"token_topk_share": 0.5, "k_start": 8}},
    "matryoshka": {"sae": {"architecture": "matryoshka", "prefixes": [10, 40]}},
    "linear": {"sae": {"architecture": "matryoshka", "init": "linear", "unit_norm": False}},
    "whitened": {"sae": {"architecture": "topk", "whiten": True}},
    "jumprelu": {"sae": {"architecture": "jumprelu"}},
    "tanh": {"sae": {"architecture": "jumprelu", "penalty": "tanh", "unit_norm": False}},
    "relu": {"sae": {"architecture": "relu"}},
    "relu_lengths": {"sae": {"architecture": "relu", "l1_norm_weighted": True, "unit_norm": False}},
    "gated": {"sae": {"architecture": "gated", "first_share": 0.4}},
    "gated_sparse": {"sae": {"architecture": "gated", "first_share": 0.02}},
    "rounded": {"sae": {"architecture": "topk"}, "train": {"moments": "8bit", "weights": "bfloat16"}},
}
"""Trainings that ranks can share either way."""
ONLY_DATA: dict[str, dict[str, Any]] = {
    "mp": {"sae": {"architecture": "mp"}},
    "resampled": {"sae": {"architecture": "topk"}, "train": {"resample_at": [0.5]}},
    "clipped": {"sae": {"architecture": "topk"}, "train": {"clip_norm": 0.01}},
    "restarted": {"sae": {"architecture": "topk"}, "train": {"restarts": 2}},
}
SHARED = [(parallel, name) for parallel, cases in (("data", CASES | ONLY_DATA), ("features", CASES)) for name in cases]

Curve = dict[str, np.ndarray]


def recipe_of(table: Path, name: str, case: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A feature that misses one batch is dead, so the auxiliary loss has work. Shares of 61 features differ in size."""
    given = {
        "activations": {"dtype": "float32"},
        "feed": {"batch_rows": 250},
        "sae": {"n_features": 61, "k": 2, "l1_weight": 0.05, "seed": 3},
        "train": {"n_tokens": STEPS * 700 // BATCHES, "log_every": 1, "lr": 5e-3, "dead_after_tokens": 200},
    }
    merged = {key: value | case.get(key, {}) | changes.get(key, {}) for key, value in given.items()}
    return brought_data(table, name=name, data="brought", **merged)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "t.npy", a_table(width=16))


@pytest.fixture(scope="module")
def stored(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store.create(tmp_path_factory.mktemp("stored") / "store")
    import_table.run(Lineage(store, parse_recipe(recipe_of(table, "brought", {}))), quiet())
    return store.root


def trained_alone(store: Path, recipes: list[dict[str, Any]]) -> list[Curve]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fast_dtype", lambda place: torch.float32)
        for recipe in recipes:
            train.run(Lineage(Store(store), parse_recipe(recipe)), quiet())
    return [curve(store, recipe) for recipe in recipes]


def curve(store: Path, recipe: dict[str, Any]) -> Curve:
    log = pq.read_table(Lineage(Store(store), parse_recipe(recipe)).sae.path / "log.parquet")
    return {name: log[name].to_numpy() for name in log.column_names}


@pytest.fixture(scope="module")
def alone(table: Path, stored: Path) -> dict[str, Curve]:
    """The curves of one process."""
    every = CASES | ONLY_DATA
    curves = trained_alone(stored, [recipe_of(table, name, case) for name, case in every.items()])
    return dict(zip(every, curves, strict=True))


def curves_of_ranks(table: Path, stored: Path, n: int) -> dict[tuple[str, str], Curve]:
    every = CASES | ONLY_DATA
    recipes = {
        (how, name): recipe_of(table, f"{name}_{how}_{n}", every[name], train={"parallel": how}) for how, name in SHARED
    }
    train_together(n, stored, list(recipes.values()))
    return {key: curve(stored, recipe) for key, recipe in recipes.items()}


@pytest.fixture(scope="module")
def of_two(table: Path, stored: Path) -> dict[tuple[str, str], Curve]:
    return curves_of_ranks(table, stored, 2)


@pytest.fixture(scope="module")
def of_four(table: Path, stored: Path) -> dict[tuple[str, str], Curve]:
    return curves_of_ranks(table, stored, 4)


def require_equal(found: Curve, wanted: Curve, tolerance: float = 1e-6) -> None:
    assert list(found) == list(wanted)
    assert len(found["loss"]) == STEPS
    for figure, values in wanted.items():
        np.testing.assert_allclose(found[figure], values, rtol=tolerance, atol=tolerance, err_msg=figure)


def tolerance_of(parallel: str, name: str) -> float:
    """Where a number lies in the middle between two numbers of few bits, another order of sums rounds otherwise."""
    return 1e-3 if (parallel, name) == ("features", "rounded") else 1e-6


@pytest.mark.long
@pytest.mark.parametrize(("parallel", "name"), SHARED)
def test_two_ranks_give_the_curve_of_one_process(alone, of_two, parallel, name):
    require_equal(of_two[parallel, name], alone[name], tolerance_of(parallel, name))


@pytest.mark.long
@pytest.mark.parametrize(("parallel", "name"), SHARED)
def test_four_ranks_give_the_curve_of_one_process(alone, of_four, parallel, name):
    require_equal(of_four[parallel, name], alone[name], tolerance_of(parallel, name))


@pytest.mark.long
def test_in_float64_the_losses_of_ranks_are_those_of_one_process_to_twelve_digits(tmp_path):
    small = {"n_features": 61, "k": 2, "l1_weight": 0.05, "seed": 3}
    settings = [{"parallel": how, "sae": small | (CASES | ONLY_DATA)[name]["sae"]} for how, name in SHARED]
    found = exact_losses_of_ranks(2, settings, tmp_path)
    np.testing.assert_allclose(found, [exact_losses(each) for each in settings], rtol=1e-12)


def test_the_cases_use_the_auxiliary_loss_and_both_kinds_of_step(alone):
    assert all(alone[name]["auxiliary_loss"].max() > 0.1 for name in ("topk", "batchtopk", "matryoshka", "jumprelu"))
    n_active = {name: alone[name]["l0"].mean() for name in ("relu", "gated", "gated_sparse")}
    assert n_active["gated_sparse"] < DENSE_SHARE * 61 < min(n_active["relu"], n_active["gated"])
    assert alone["resampled"]["dead"].max() > 0


@pytest.mark.long
def test_a_checkpoint_of_four_ranks_goes_on_with_two_and_with_one(table, tmp_path, stored):
    store = tmp_path / "store"
    shutil.copytree(stored, store)
    names = [("data", "topk"), ("features", "rounded"), ("features", "batchtopk"), ("features", "jumprelu")]
    recipes = [recipe_of(table, f"{name}_4", CASES[name], train={"parallel": how}) for how, name in names]
    train_together(4, store, recipes, stop_after=2000)
    kept = [checkpoints_of(Lineage(Store(store), parse_recipe(each)).sae) / "restart-0/state.json" for each in recipes]
    assert [read_json(each)["step"] for each in kept] == [9] * 4
    train_together(2, store, recipes[:3])
    resumed = [*(curve(store, each) for each in recipes[:3]), *trained_alone(store, recipes[3:])]
    whole = trained_alone(store, [recipe_of(table, f"{name}_1", CASES[name]) for _, name in names])
    for name, found, wanted in zip(names, resumed, whole, strict=True):
        require_equal(found, wanted, tolerance_of(*name))


@pytest.mark.parametrize("changes", [{}, {"init": "linear"}, {"target_site": "other"}, {"init": "linear", "k": 1}])
@pytest.mark.parametrize(("n_features", "n"), [(61, 2), (9001, 3), (8210, 4)])
def test_ranks_start_with_their_share_of_the_weights_of_one_process(changes, n_features, n):
    config = SAEConfig(architecture="topk", n_features=n_features, k=4, seed=3).model_copy(update=changes)
    whole = SparseAutoencoder(config, 3, 5).state_dict()
    shares = [
        SparseAutoencoder(config, 3, 5, split=Split(features=Ranks(number, n))).state_dict() for number in range(n)
    ]
    for name in ("W_enc", "b_enc", "W_dec", "tokens_since_fired"):
        assert torch.equal(torch.cat([share[name] for share in shares]), whole[name]), name


def test_the_number_of_ranks_and_what_they_share_is_no_part_of_an_saes_identity(table, stored):
    one, other = (
        Lineage(Store(stored), parse_recipe(recipe_of(table, "same", {}, train={"parallel": how}))).sae.path
        for how in ("data", "features")
    )
    assert one == other


REFUSED = [
    ({"sae": {"architecture": "mp"}}, "sae.architecture is mp"),
    ({"train": {"resample_at": [0.5]}}, "train.resample_at is [0.5]"),
    ({"train": {"clip_norm": 1.0}}, "train.clip_norm is 1.0"),
    ({"train": {"restarts": 2}}, "train.restarts is 2"),
    ({"sae": {"n_features": 4}}, "sae.n_features is 4"),
]


@pytest.mark.parametrize(("case", "what"), REFUSED)
def test_a_training_that_ranks_cannot_share_by_features_is_refused_with_a_way_out(table, case, what):
    recipe = parse_recipe(recipe_of(table, "refused", case, train={"parallel": "features"}))
    with pytest.raises(UserError, match=re.escape(what) + r".*\n(Set train.parallel to data|Start at most 4)"):
        require_shareable([recipe], Ranks(0, 5))
    require_shareable([recipe], Ranks())


def test_ranks_and_a_cluster_are_refused_together(table):
    recipe = parse_recipe(recipe_of(table, "refused", {}) | {"cluster": {"kind": "local"}})
    with pytest.raises(UserError, match="cluster is set, but torchrun has started 2 processes"):
        require_shareable([recipe], Ranks(0, 2))


def test_other_commands_refuse_to_run_in_several_processes(saeflow, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    said = saeflow("ls")
    assert said.code == 2
    assert "torchrun has started 2 processes" in said.err


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]


def started(store: Path, recipe: Path) -> subprocess.Popen[str]:
    command = [*TORCHRUN, *SAEFLOW, "train", str(recipe), "--store", str(store)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def kill_rank(number: int, launcher: subprocess.Popen[str]) -> None:
    workers = psutil.Process(launcher.pid).children(recursive=True)
    (lost,) = [each for each in workers if each.environ().get("RANK") == str(number)]
    lost.kill()


def finished(running: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, said = running.communicate(timeout=250)
    finally:
        running.kill()
    return running.returncode, said


@pytest.mark.long
@pytest.mark.parametrize(("parallel", "lost"), [("data", 1), ("features", 0)])
def test_a_killed_rank_ends_all_with_one_message_and_the_same_command_goes_on(table, stored, tmp_path, parallel, lost):
    store, undisturbed = tmp_path / "store", tmp_path / "undisturbed"
    for each in (store, undisturbed):
        shutil.copytree(stored, each)
    train_long = {"parallel": parallel, "n_tokens": 50_000, "checkpoint_seconds": 0.01}
    data = recipe_of(table, "killed", CASES["batchtopk"], train=train_long)
    recipe, target = write_recipe(tmp_path / "killed.toml", data), Lineage(Store(store), parse_recipe(data)).sae
    running = started(store, recipe)
    while running.poll() is None and not (checkpoints_of(target) / "restart-0" / "state.json").exists():
        time.sleep(0.05)
    kill_rank(lost, running)
    code, said = finished(running)
    assert code
    assert said.count("of 2 that train together") == 1
    assert f"Rank {lost} was lost" in said
    assert "run the same command again" in said
    assert not target.complete()
    code, said = finished(started(store, recipe))
    assert not code
    assert "train: continuing at step" in said
    assert not finished(started(undisturbed, recipe))[0]
    assert tree(store / "saes") == tree(undisturbed / "saes")
