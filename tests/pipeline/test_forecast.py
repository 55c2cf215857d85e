"""`saeflow plan`: what it says before the work is what the work takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saeflow.pipeline import forecast, stages, trial
from saeflow.pipeline.forecast import Survey, survey_corpus
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.trial import trial_recipe
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.memory import measure_usage
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.small_pipeline import Ingredients, brought_data, documents, quiet, recipe_data


@pytest.fixture
def recipe(ingredients: Ingredients) -> Recipe:
    return parse_recipe(recipe_data(ingredients))


STORING = {"forward": 4.0, "collect": 5.0, "read": 1.0}


def tried(**changes: Any) -> dict[str, Any]:
    stages = {
        "tokens": {"seconds": 3.0, "peak_bytes": 100, "rates": {"tokens": 50.0}, "counts": {"tokens": 100}},
        "collect": {"seconds": 6.0, "peak_bytes": 200, "rates": {"activations": 20.0}, "counts": {"activations": 100}},
    }
    found = {
        "stages": stages,
        "n_tokens": 100,
        "n_sequences": 7,
        "n_values": 400,
        "token_bytes": 900,
        "activation_bytes": 6400,
    }
    return (
        found | {"feature_bytes": 1, "sae_bytes": 77, "widths": [32], "n_characters": 500, "storing": STORING} | changes
    )


def test_seconds_are_start_up_and_then_units_at_the_steady_rate() -> None:
    stage = {"seconds": 6.0, "rates": {"activations": 20.0, "unheard": 0.0}, "counts": {"activations": 100}}
    assert forecast.stage_seconds(stage, {"activations": 1000}) == 1.0 + 50.0


def test_bytes_and_seconds_follow_from_the_tokens_of_the_corpus(recipe: Recipe) -> None:
    found = forecast.extrapolate(recipe, Survey(7, 5000, 1000, ("x" * 500,)), tried(), 1000)
    assert (found.n_documents, found.n_tokens) == (7, 1000)
    assert [stage.n_bytes for stage in found.stages] == [9000, forecast.activation_bytes(recipe, tried(), 1000, 1)]
    assert [round(stage.seconds) for stage in found.stages] == [21, 51]
    assert found.seconds == pytest.approx(72)
    assert found.peak_bytes == 200


@pytest.mark.parametrize(("corpus", "training", "n"), [(100, 1000, 1), (1000, 1000, 1), (2500, 1000, 3)])
def test_storing_beats_streaming_once_the_trainings_have_read_more_than_the_corpus(
    corpus: int, training: int, n: int
) -> None:
    assert forecast.break_even(corpus, training) == n


@pytest.mark.parametrize(("read", "n"), [(1.0, 2), (2.0, 3), (3.875, 40), (4.0, None)])
def test_keeping_pays_once_reading_has_saved_what_writing_took(read: float, n: int | None) -> None:
    assert forecast.keep_from(**STORING | {"read": read}) == n


def test_without_keeping_only_the_sample_to_train_on_takes_disk(ingredients: Ingredients) -> None:
    about: dict[str, Any] = {"activations": {"keep": False}, "train": {"share": 0.1}}
    one_pass = parse_recipe(recipe_data(ingredients, **about))
    found, usual = (
        forecast.extrapolate(each, Survey(7, 5000, 1000, ("x" * 500,)), tried(), 100_000)
        for each in (one_pass, parse_recipe(recipe_data(ingredients)))
    )
    assert found.kept_bytes == usual.stages[1].n_bytes
    assert found.stages[1].n_bytes == round(usual.stages[1].n_bytes / 10)
    assert found.keep_from == 2


def test_the_pool_holds_the_store_or_two_halves(recipe: Recipe) -> None:
    pool = int(recipe.feed.pool_bytes)
    assert forecast.pool_memory(recipe, pool // 2) == pool // 2
    assert forecast.pool_memory(recipe, pool // 2 + 1) == pool
    assert forecast.pool_memory(recipe, 20 * pool) == pool


def test_the_survey_counts_every_character_and_samples_pieces_of_it(recipe: Recipe) -> None:
    surveyed = survey_corpus(recipe, quiet())
    texts = [row["text"] for row in documents()]
    assert (surveyed.n_documents, surveyed.n_characters) == (len(texts), sum(map(len, texts)))
    assert 0 < surveyed.n_held_out < surveyed.n_characters
    assert 16 < len(surveyed.pieces) <= 256
    assert all(piece in text for piece in surveyed.pieces for text in texts if text.startswith(piece[:60]) and piece)
    assert surveyed == survey_corpus(recipe, quiet())


@pytest.mark.parametrize("bos", [False, True])
def test_tokens_are_counted_over_all_the_pieces_with_a_bos_a_document(
    recipe: Recipe, finished: Finished, bos: bool
) -> None:
    changed = recipe.model_copy(update={"tokens": recipe.tokens.model_copy(update={"prepend_bos": bos})})
    surveyed = survey_corpus(recipe, quiet())
    exact = Lineage(finished.store, finished.recipe).tokens.published().total("n_tokens")
    assert forecast.count_tokens(changed, surveyed) == exact + bos * surveyed.n_documents
    halved = Survey(66, 2 * surveyed.n_characters, 0, surveyed.pieces)
    assert forecast.count_tokens(recipe, halved) == 2 * exact


def test_isolated_documents_are_stored_with_their_padding(recipe: Recipe) -> None:
    isolated = recipe.model_copy(update={"tokens": recipe.tokens.model_copy(update={"packing": "isolated"})})
    length = recipe.tokens.context_length
    alone = tried(n_sequences=2 * 100 // length)
    assert forecast.activation_bytes(isolated, alone, 1600, 1) >= 1.9 * forecast.activation_bytes(
        recipe, alone, 1600, 1
    )


@pytest.mark.long
def test_the_forecast_of_a_small_run_is_near_what_it_takes(recipe: Recipe, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    found = forecast.plan(store, recipe, quiet())
    assert not store.artefacts()
    summary = stages.run(Lineage(store, recipe), quiet())
    assert found.n_tokens == pytest.approx(summary["n_tokens"], rel=0.15)
    stored = Lineage(store, recipe).activations.published()
    [collect] = [stage for stage in found.stages if stage.name == "collect"]
    assert collect.n_bytes == pytest.approx(sum(part.n_bytes for part in stored.parts), rel=0.35)  # tiny files
    assert found.peak_bytes > 100 << 20
    assert forecast.known_forecast(store, recipe) == found
    other = recipe.model_copy(update={"threads": 2})
    assert forecast.known_forecast(store, other) is None


@pytest.mark.long
def test_what_a_stage_refuses_in_the_trial_is_said_in_its_own_words(recipe: Recipe, tmp_path: Path) -> None:
    wrong = recipe.model_copy(update={"activations": recipe.activations.model_copy(update={"sites": ["no.such.site"]})})
    with pytest.raises(UserError) as direct:
        stages.run(Lineage(Store.create(tmp_path / "direct"), wrong), quiet())
    (tmp_path / "recipe.json").write_text(wrong.model_dump_json())
    command = [
        sys.executable,
        "-m",
        "saeflow.pipeline.trial",
        str(tmp_path / "recipe.json"),
        str(tmp_path / "store"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == trial.REFUSED
    assert json.loads(done.stdout.splitlines()[-1]) == {"refused": str(direct.value)}
    with pytest.raises(UserError) as planned:
        forecast.plan(Store.create(tmp_path / "planned"), wrong, quiet())
    assert str(planned.value) == str(direct.value)


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreseen = forecast.extrapolate(recipe, Survey(7, 5000, 1000, ("x" * 500,)), tried(), 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"(?s)The recipe small needs about .* has 1000 B free"):
        forecast.keep(Store.create(tmp_path / "store"), recipe, foreseen)


def test_a_table_needs_no_forecast_and_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows × columns"):
        survey_corpus(parse_recipe(brought_data(tmp_path / "table.npy")), quiet())


def test_the_peak_of_a_piece_of_work_is_its_own() -> None:
    with measure_usage() as before:
        pass
    with measure_usage() as taken:
        held = bytearray(200 << 20)
    del held
    with measure_usage() as after:
        pass
    assert taken.peak_bytes - before.peak_bytes > 190 << 20
    assert after.peak_bytes < taken.peak_bytes


def test_a_forecast_is_plain_json(recipe: Recipe) -> None:
    import dataclasses

    found = forecast.extrapolate(recipe, Survey(7, 5000, 1000, ("x" * 500,)), tried(), 1000)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["n_tokens"] == 1000


def test_a_sweep_is_forecast_as_so_many_trainings_and_no_features(recipe: Recipe, tmp_path: Path) -> None:
    swept = Recipe.model_validate(recipe.model_dump() | {"sweep": {"grid": {"sae.k": [2, 4, 8]}}})
    assert not trial_recipe(swept, ["a text"], tmp_path).is_sweep
    found = tried()
    for name, bar in (("train", "train"), ("encode", "features"), ("evaluate", "evaluate"), ("report", "report")):
        found["stages"][name] = {"seconds": 2.0, "peak_bytes": 1, "rates": {bar: 100.0}, "counts": {bar: 100}}
    one, three = (
        forecast.extrapolate(each, Survey(7, 5000, 1000, ("x" * 500,)), found, 1000) for each in (recipe, swept)
    )
    assert [stage.name for stage in one.stages] == ["tokens", "collect", "train", "encode", "evaluate", "report"]
    assert [stage.name for stage in three.stages] == ["tokens", "collect", "train", "evaluate"]
    trains = [stage for each in (one, three) for stage in each.stages if stage.name == "train"]
    assert [stage and stage.n_bytes for stage in trains] == [77, 3 * 77]
    assert [stage and round(stage.seconds) for stage in trains] == [1 + 100, 1 + 300]  # 10,000 tokens at 100/s
