"""Several processes train one SAE: the curve of one process, checkpoints for any number, one message at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from saeflow.pipeline import train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import parse_recipe
from saeflow.store.store import Store
from saeflow.train import training
from tests.support.ranks import train_together
from tests.support.small_pipeline import a_table, brought_data, quiet, write_table

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
    "gated": {"sae": {"architecture": "gated"}},
    "gated_sparse": {"sae": {"architecture": "gated", "first_share": 0.02}},
}
"""Trainings that any ranks can share. Features die early, so that the auxiliary loss has work."""
ONLY_DATA: dict[str, dict[str, Any]] = {
    "mp": {"sae": {"architecture": "mp"}},
    "resampled": {"sae": {"architecture": "relu"}, "train": {"resample_at": [0.5]}},
    "clipped": {"sae": {"architecture": "topk"}, "train": {"clip_norm": 0.01}},
    "restarted": {"sae": {"architecture": "topk"}, "train": {"restarts": 2}},
}
SHARED = [(parallel, name) for parallel, cases in (("data", CASES | ONLY_DATA), ("features", CASES)) for name in cases]


def recipe_of(table: Path, name: str, case: dict[str, Any], **changes: Any) -> dict[str, Any]:
    given = {
        "activations": {"dtype": "float32"},
        "feed": {"batch_rows": 250},
        "sae": {"n_features": 61, "k": 4, "l1_weight": 0.05, "seed": 3},
        "train": {"n_tokens": STEPS * 700 // BATCHES, "log_every": 1, "lr": 5e-3, "dead_after_tokens": 300},
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


def curve(store: Path, recipe: dict[str, Any]) -> dict[str, np.ndarray]:
    log = pq.read_table(Lineage(Store(store), parse_recipe(recipe)).sae.path / "log.parquet")
    return {name: log[name].to_numpy() for name in log.column_names}


@pytest.fixture(scope="module")
def curves(table: Path, stored: Path) -> dict[tuple[int, str, str], dict[str, np.ndarray]]:
    """The log of every case, by number of ranks, what they share, and its name."""
    every = CASES | ONLY_DATA
    alone = {name: recipe_of(table, f"{name}_1", case) for name, case in every.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fast_dtype", lambda place: torch.float32)
        for recipe in alone.values():
            train.run(Lineage(Store(stored), parse_recipe(recipe)), quiet())
    found = {(1, "", name): curve(stored, recipe) for name, recipe in alone.items()}
    for n in (2, 4):
        shared = {
            (n, how, name): recipe_of(table, f"{name}_{how}_{n}", every[name], train={"parallel": how})
            for how, name in SHARED
        }
        train_together(n, stored, list(shared.values()))
        found |= {key: curve(stored, recipe) for key, recipe in shared.items()}
    return found


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(("parallel", "name"), SHARED)
def test_several_ranks_give_the_curves_of_one_process(curves, parallel, name, n):
    alone, shared = curves[1, "", name], curves[n, parallel, name]
    assert list(alone) == list(shared)
    assert len(alone["loss"]) == STEPS
    for figure in alone:
        np.testing.assert_allclose(shared[figure], alone[figure], rtol=1e-6, atol=1e-6, err_msg=figure)
