"""`saeflow steer` and models with features set in Python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import saeflow as package
from saeflow.meaning.effects.steer import parse_assignments
from saeflow.pipeline import encode, stages, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.query.api import OpenRun
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.support.command import Command
from tests.support.small_pipeline import Ingredients, a_table, brought_data, quiet, recipe_data, write_table

RESID = "transformer.h.0"
TEXT = "the old sailor sees"


@pytest.fixture(scope="module")
def store(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = Store.create(tmp_path_factory.mktemp("steer") / "store")
    changes = {
        "activations": {"sites": [RESID], "skip_special": True, "dtype": "float32"},
        "tokens": {"prepend_bos": True},
    }
    stages.run(Lineage(made, parse_recipe(recipe_data(ingredients, name="resid", **changes))), quiet())
    return made


@pytest.fixture(scope="module")
def run(store: Store) -> Iterator[OpenRun]:
    with package.open(store.root, "resid") as opened:
        yield opened


@pytest.fixture(scope="module")
def feature(run: OpenRun) -> int:
    return int(
        run.sql("from feature_summary where n_tokens > 50 order by max_value desc limit 1").to_pylist()[0]["feature_id"]
    )


def site_values(run: OpenRun, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(T, D): what the model gives behind the site, hooks of a splice included."""
    kept: list[torch.Tensor] = []
    hook = model.transformer.h[1].register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return kept[0][0]


def dense(run: OpenRun, x: torch.Tensor) -> torch.Tensor:
    sparse = run.sae.encode_sparse(x)
    found = torch.zeros(len(x), 64)
    rows = torch.repeat_interleave(torch.arange(len(x)), torch.from_numpy(sparse.row_starts).diff())
    found[rows, torch.from_numpy(sparse.feature_ids).long()] = torch.from_numpy(sparse.values)
    return found


def test_setting_a_feature_moves_the_vector_by_the_difference_along_its_direction(run: OpenRun, feature: int) -> None:
    model, tokenizer = run.model(), run.tokenizer()
    ids = torch.tensor([[0, *tokenizer(TEXT)["input_ids"]]])
    plain = site_values(run, model, ids)
    with run.spliced({feature: "2x", 3: 0}, model):
        changed = site_values(run, model, ids)
    torch.testing.assert_close(site_values(run, model, ids), plain, rtol=0, atol=0)
    values = dense(run, plain)
    top = run.sql("select max_value from feature_summary where feature_id = ?", [feature]).to_pylist()[0]["max_value"]
    wanted = plain + (2 * top - values[:, [feature]]) * run.sae.W_dec[feature] - values[:, [3]] * run.sae.W_dec[3]
    torch.testing.assert_close(changed[1:], wanted[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changed[0], plain[0], rtol=0, atol=0)  # BOS, which the run skips


def test_a_model_generates_with_a_cache_as_it_does_without(run: OpenRun, feature: int) -> None:
    model, tokenizer = run.model(), run.tokenizer()
    ids = torch.tensor([[0, *tokenizer(TEXT)["input_ids"]]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 399}
    with run.spliced({feature: "3x"}, model):
        with_cache, without = (model.generate(ids, use_cache=cached, **options) for cached in (True, False))
    assert with_cache.tolist() == without.tolist()


def test_the_same_change_leaves_every_logit(run: OpenRun, feature: int) -> None:
    model = run.model()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        plain = model(ids).logits
        with run.spliced({feature: "same"}, model) as same:
            torch.testing.assert_close(same(ids).logits, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({64: 1.0}, "has no feature 64"), ({-1: 1.0}, "has no feature -1"), ({3: "lots"}, "of feature 3 is 'lots'")],
)  # fmt: skip
def test_a_feature_or_change_that_there_is_not_is_refused(run: OpenRun, changes: Any, message: str) -> None:
    model = run.model()
    with pytest.raises(UserError, match=message), run.spliced(changes, model):
        pass
    assert not model._forward_pre_hooks


def test_a_text_goes_on_with_and_without_the_feature(store: Store, saeflow: Command, feature: int) -> None:
    words = ("resid", f"{feature}=5x", TEXT, "--tokens", 12, "--store", store.root)
    said = saeflow("steer", *words)
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert lines[0] == "unchanged"
    assert lines[1].startswith(TEXT)
    steered = lines[lines.index("steered") + 1]
    assert steered.startswith(TEXT)
    assert steered != lines[1]
    assert f"feature {feature} is set to" in said.err
    assert saeflow("steer", *words).out == said.out


def test_draws_follow_the_seed(store: Store, saeflow: Command, feature: int) -> None:
    said = [
        saeflow(
            "steer", "resid", f"{feature}=same", TEXT, "--temperature", 1, "--seed", seed, "--store", store.root
        ).out
        for seed in (1, 1, 2)
    ]
    assert said[0] == said[1] != said[2]
    lines = said[0].splitlines()
    assert lines[1] == lines[lines.index("steered") + 1]  # the identity change draws the same text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["3=1"], "Name a feature and a text"),
        (["text", TEXT], "'text' sets no feature"),
        (["3=", TEXT], "Feature 3 is ''"),
        (["3=1", "3=2", TEXT], "Feature 3 is set twice"),
        (["64=1", TEXT], "no feature 64"),
        (["3=1", "  "], "The prompt is empty"),
        (["3=1", "a b c " * 50], "but the model reads at most 64"),
        (["3=1", TEXT, "--tokens", "0"], "--tokens is 0"),
        (["3=1", TEXT, "--temperature", "-1"], "--temperature is -1"),
        (["3=1", TEXT, "--temperature", "1", "--seed", str(10**30)], "--seed is 1"),
        (["3=1", TEXT, "--device", "gpu"], "--device is 'gpu'"),
        (["3=1", TEXT, "--model", "/nowhere"], "model is '/nowhere'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_steered_is_refused(store: Store, saeflow: Command, words: list[str], message: str) -> None:
    said = saeflow("steer", "resid", *words, "--store", store.root)
    assert said.code == 2
    assert message in said.err


def test_escape_sequences_of_a_prompt_reach_no_terminal(store: Store, saeflow: Command, feature: int) -> None:
    said = saeflow("steer", "resid", f"{feature}=0", "a \x1b[31mcat", "--tokens", 3, "--store", store.root)
    assert said.code == 0
    assert "\x1b" not in said.out


def test_a_run_of_a_table_has_no_model(tmp_path: Path) -> None:
    made = Store.create(tmp_path / "store")
    recipe = parse_recipe(brought_data(write_table(tmp_path / "t.npy", a_table())))
    for stage in (import_table, train, encode):
        stage.run(Lineage(made, recipe), quiet())
    with package.open(made.root) as opened, pytest.raises(UserError, match="this run is of a table"):
        opened.model()


def test_assignments_are_read() -> None:
    found = parse_assignments(["12=3x", "40=0", "7=mean"])
    assert {feature: str(change) for feature, change in found.items()} == {12: "max*3", 40: "zero", 7: "mean"}
