"""`saeflow synth`: one command from a recipe to scores against known features."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saeflow.cli import synth
from saeflow.cli.app import app
from saeflow.cli.synth import print_scores, train_and_score
from saeflow.recipe.recipe import load_recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.terminal import Terminal
from saeflow.sae.recovery import RecoveryScores
from saeflow.store.store import Store
from tests.support.small_pipeline import brought_data, write_recipe

RECIPES = Path(__file__).resolve().parents[2] / "flows" / "recipes"

DATA = {
    "name": "made",
    "threads": 1,
    "activations": {"synthetic": {"kind": "superposed", "n_samples": 8000, "n_neurons": 16, "n_true": 24, "l0": 1.5}},
    "feed": {"batch_rows": 512},
    "sae": {"architecture": "topk", "n_features": 32, "k": 2},
    "train": {"n_tokens": 40_000, "lr": 0.01},
}


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_one_command_makes_trains_scores_and_says_what_the_numbers_mean(tmp_path):
    path = write_recipe(tmp_path / "made.toml", DATA)
    found = run("synth", path, "--store", tmp_path / "store", "-q")
    assert found.exit_code == 0, found.output
    for name in ("live", "missed", "L0", "cos", "found", "freq.", "prec.", "MCC", "F1", "F1 w."):
        assert f"\n{name} " in f"\n{found.stdout}", name
    assert "in truth 1.5" in found.stdout
    assert "24 true features" in " ".join(found.stdout.split())
    kinds = {item.kind for item in Store(tmp_path / "store").artefacts()}
    assert kinds == {"tokens", "activations", "saes"}


def test_scores_come_as_json_and_what_is_there_is_not_made_again(tmp_path):
    path = write_recipe(tmp_path / "made.toml", DATA)
    first, second = (run("synth", path, "--store", tmp_path / "store", "--json", "-q") for _ in range(2))
    [found] = json.loads(first.stdout)
    assert json.loads(second.stdout) == [found]
    assert {"name", "sae", "architecture", "found_share", "precision", "mcc", "f1", "noise_floor"} <= found.keys()
    assert found["mean_max_cosine"] > 0.5
    assert 0 < found["noise_floor"] < found["variance_unexplained"] < 0.7
    other = run("synth", path, "--store", tmp_path / "store", "--json", "-q", "--set", "sae.k=1")
    assert json.loads(other.stdout)[0]["l0"] <= 1


def test_a_recipe_without_known_features_is_refused_with_the_way_out(tmp_path):
    path = write_recipe(tmp_path / "own.toml", brought_data(tmp_path / "table.npy"))
    found = run("synth", path, "--store", tmp_path / "store")
    assert isinstance(found.exception, UserError)
    assert "brought has no [activations.synthetic]" in str(found.exception)
    assert "saeflow run RECIPE" in str(found.exception)
    assert not (tmp_path / "store").exists()


def test_several_recipes_give_a_row_each_on_the_same_activations(tmp_path, progress):
    recipes = [parse_recipe(DATA), parse_recipe(DATA | {"sae": DATA["sae"] | {"architecture": "batchtopk"}})]
    store = Store.create(tmp_path / "store")
    found = train_and_score(store, recipes, progress)
    assert len(store.artefacts("activations")) == 1
    assert len({each.sae for each in found}) == 2
    narrow = Terminal(width=80)
    with narrow.capture() as printed:
        print_scores(found, narrow)
    lines = printed.get().splitlines()
    assert lines[0].split()[:4] == ["SAE", "live", "missed", "L0"]
    assert [line.split()[0] for line in lines[1:3]] == ["topk", "batchtopk"]
    assert lines[3].strip() == ""


@pytest.mark.long
def test_all_of_a_sweep_are_scored_under_their_own_names_and_one_can_be_named(tmp_path):
    path = write_recipe(tmp_path / "made.toml", DATA | {"sweep": {"grid": {"sae.k": [1, 2]}}})
    found = run("synth", path, "--store", tmp_path / "store", "--json", "-q")
    scores = json.loads(found.stdout)
    assert [each["name"] for each in scores] == ["made_k1", "made_k2"]
    assert scores[0]["l0"] < scores[1]["l0"]
    one = run("synth", path, "--store", tmp_path / "store", "--json", "-q", "--member", "made_k2")
    assert json.loads(one.stdout) == scores[1:]
    names = synth.short_names(load_recipe(path).members())
    assert names == ["k1", "k2"]


def test_every_score_is_shown():
    shown = {field for field, _, _ in synth._SCORES.values()}
    assert {field.name for field in dataclasses.fields(RecoveryScores)} - shown == {
        "n_true", "n_frequent", "noise_floor", "true_l0"
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["sparse", pytest.param("superposition", marks=pytest.mark.long)])
def test_the_toys_are_scored_too(tmp_path, progress, kind):
    made = {"kind": kind, "n_samples": 500, "n_neurons": 3, "n_true": 6}
    recipe = parse_recipe(DATA | {"activations": {"synthetic": made}})
    [found] = train_and_score(Store.create(tmp_path / "store"), [recipe], progress)
    assert found.scores.n_true <= 6
    assert found.scores.noise_floor == 0
    assert found.scores.mean_max_cosine > 0.5


def test_the_shipped_recipe_is_what_the_issue_asks_for():
    recipe = load_recipe(RECIPES / "synth.toml")
    made = recipe.activations.synthetic
    assert made is not None
    assert (made.n_neurons, made.n_true, made.l0, made.group_share) == (256, 2048, 16, 0.2)
    assert (recipe.sae.n_features, recipe.sae.architecture, recipe.sae.k) == (4096, "batchtopk", 16)
    synth.require_known(recipe)
