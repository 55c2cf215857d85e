"""A training that a GPU's memory cannot hold is refused before it starts, with all numbers and ways out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saeflow.model.sites import Site
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.sae.gpu.memory import TrainingSize
from saeflow.train import fused, memory

WIDTH = 2304
GPU = torch.device("cuda:1")


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "choose_device", lambda setting, name: GPU)
    monkeypatch.setattr(memory, "fast_dtype", lambda place: torch.bfloat16)
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: object())


def a_recipe(**train: Any) -> Recipe:
    given = {
        "activations": {"source": "rows.npy"},
        "sae": {"architecture": "batchtopk", "n_features": 65_536, "k": 64},
        "feed": {"batch_rows": 8192},
        "train": train,
    }
    return parse_recipe({"name": "large", **given})


def require(monkeypatch: pytest.MonkeyPatch, free: float, **train: Any) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda place: int(free * 2**30))
    site = Site("mlp", WIDTH)
    memory.require_memory([(a_recipe(**train), [site])])


def test_a_training_by_kernels_needs_its_state_and_a_step_and_no_gradients(monkeypatch):
    recipe = a_recipe()
    size = TrainingSize.of(recipe.sae, recipe.train, (WIDTH, WIDTH), 8192)
    assert size.state_bytes == pytest.approx(65_536 * WIDTH * (24 + 2), rel=0.001)  # weights, two moments, a low copy
    needed = (size.state_bytes + size.step_bytes + (4 + 3 * 2) * 8192 * WIDTH) / 2**30  # three batches in float16
    require(monkeypatch, needed + 0.001)
    with pytest.raises(UserError):
        require(monkeypatch, needed - 0.001)
    require(monkeypatch, 5.0)
    with pytest.raises(UserError, match="gradients"):
        require(monkeypatch, 4.4, kernels=False)


def test_the_refusal_says_what_is_needed_what_is_free_and_what_to_do(monkeypatch):
    with pytest.raises(UserError) as caught:
        require(monkeypatch, 2.0)
    said = str(caught.value)
    assert said.startswith("An SAE in training takes 4.")
    assert "GiB for weights and moments" in said
    assert "But on cuda:1 are free 2.0 GiB of memory.\n" in said
    for way in ("lower feed.batch_rows", "sae.n_features", 'train.parallel = "features"'):
        assert way in said
    with pytest.raises(UserError, match=r"^3 SAEs in training take .*\n.*lower train\.restarts"):
        require(monkeypatch, 2.0, restarts=3)


def test_the_largest_step_of_a_training_counts_the_most_active_features_and_any_number_of_dead_ones():
    plain, wide, without = (
        TrainingSize.of(recipe.sae, recipe.train, (WIDTH, WIDTH), 8192)
        for recipe in (a_recipe(), a_recipe(k_start=256), a_recipe(aux_weight=0))
    )
    assert without.step_bytes < plain.step_bytes < wide.step_bytes
    assert (plain.k, wide.k, without.n_dead) == (64, 256, 0)
