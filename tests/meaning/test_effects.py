"""`saeflow effects`: what is measured, which firings, and that nothing is lost."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import time
import tracemalloc
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import saeflow as package
from saeflow.features.changes import FeatureChange, FeatureLevels
from saeflow.meaning.effects import firings
from saeflow.meaning.effects.firings import choose_firings
from saeflow.meaning.effects.measure import EffectSettings, MeasuredEffects, measure_effects
from saeflow.meaning.effects.part import SequenceTokens
from saeflow.pipeline import collect, encode, stages, tokens, train
from saeflow.pipeline.lifecycle import forget
from saeflow.pipeline.lineage import Lineage
from saeflow.query.api import OpenRun
from saeflow.recipe.recipe import parse_recipe
from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.save import save_sae
from saeflow.store.store import Store
from tests.support.command import SAEFLOW, Command
from tests.support.small_pipeline import Ingredients, quiet, recipe_data, tree

RESID = "transformer.h.0"


@pytest.fixture(scope="module")
def store(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The run `resid` of the residual stream between two layers; effects may be added."""
    made = Store.create(tmp_path_factory.mktemp("effects") / "store")
    stages.run(
        Lineage(made, parse_recipe(recipe_data(ingredients, name="resid", activations={"sites": [RESID]}))), quiet()
    )
    return made


@pytest.fixture(scope="module")
def zeroed(store: Store) -> MeasuredEffects:
    return measure_effects(store, "resid", EffectSettings(n=6, ahead=2, bands=3, name="kept"), quiet())


def rows_of(made: MeasuredEffects) -> list[dict[str, Any]]:
    return list(pq.read_table(made.artefact.path / "effects.parquet").to_pylist())


def one_at_a_time(run: OpenRun, model: Any, row: dict[str, Any]) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Loss, KL, and probabilities before and after, by a pass over the whole sequence with a hook of the test's own."""
    length = run.sql("select context_length from stg_shape").to_pylist()[0]["context_length"]
    first = row["token_id"] // length * length
    sql = "select vocab_id from stg_tokens where token_id between ? and ? and mask order by token_id"
    ids = torch.tensor([[each["vocab_id"] for each in run.sql(sql, [first, first + length - 1]).to_pylist()]])
    place, read = row["token_id"] - first, row["token_id"] - first + row["ahead"]
    move = (row["set_to"] - row["value"]) * run.sae.W_dec[row["feature_id"]].detach().double()

    def change(module: Any, inputs: Any, output: Any) -> Any:
        moved = (output[0] if isinstance(output, tuple) else output).clone()
        moved[0, place] += move
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with torch.no_grad():
        before = torch.log_softmax(model(ids).logits[0, read], 0)
        hook = model.get_submodule(RESID).register_forward_hook(change)
        after = torch.log_softmax(model(ids).logits[0, read], 0)
        hook.remove()
    loss = float(before[ids[0, read + 1]] - after[ids[0, read + 1]]) if read + 1 < ids.shape[1] else math.nan
    return loss, float((before.exp() * (before - after)).sum()), before.exp().numpy(), after.exp().numpy()


@pytest.mark.long
def test_each_row_is_what_one_change_at_a_time_gives(store: Store, zeroed: MeasuredEffects) -> None:
    with package.open(store.root, "resid") as run:
        model = run.model().double()
        rows = rows_of(zeroed)
        assert {row["ahead"] for row in rows} == {0, 1, 2}
        for row in rows[:: max(1, len(rows) // 120)]:
            loss, kl, before, after = one_at_a_time(run, model, row)
            assert abs(row["kl"] - kl) < 1e-5
            if row["loss_change"] is not None:
                assert abs(row["loss_change"] - loss) < 1e-5
            gained = after - before
            best = np.argsort(-gained, kind="stable")[: len(row["up_ids"])]
            assert row["up_ids"] == best.tolist()
            assert np.allclose(row["up_after"], after[best], atol=1e-5)
            assert np.allclose(row["up_before"], before[best], atol=1e-5)


def test_the_identity_change_has_no_effect(store: Store) -> None:
    rows = rows_of(measure_effects(store, "resid", EffectSettings(change="same", n=4, ahead=1), quiet()))
    assert len(rows) > 100
    assert max(row["kl"] for row in rows) < 1e-12
    assert max(abs(row["loss_change"] or 0) for row in rows) < 1e-10
    assert not any(row["up_ids"] or row["down_ids"] for row in rows)


@pytest.mark.parametrize(("change", "times"), [("max*2", 2.0), ("mean", None), ("1.5", None)])
def test_a_feature_is_set_to_what_was_asked(store: Store, change: str, times: float | None) -> None:
    made = measure_effects(store, "resid", EffectSettings("0-9", change, n=2, ahead=0), quiet())
    with package.open(store.root, "resid") as run:
        stats = {row["feature_id"]: row for row in run.ask("feature_summary").to_pylist()}
        n_tokens = run.sql("select n_encoded_tokens as n from stg_size").to_pylist()[0]["n"]
    for row in rows_of(made):
        about = stats[row["feature_id"]]
        mean = about["mean_value"] * about["n_tokens"] / n_tokens
        wanted = about["max_value"] * times if times else mean if change == "mean" else 1.5
        assert math.isclose(row["set_to"], wanted, rel_tol=1e-5)


def test_every_firing_is_measured_if_all_are_asked_for(store: Store) -> None:
    made = measure_effects(store, "resid", EffectSettings("0-19", n=0, ahead=0), quiet())
    with package.open(store.root, "resid") as run:
        sql = "select feature_id, token_id, value from stg_feature_major where feature_id < 20 order by all"
        stored = [tuple(row.values()) for row in run.sql(sql).to_pylist()]
    rows = rows_of(made)
    assert [(row["feature_id"], row["token_id"], row["value"]) for row in rows] == stored
    assert len(stored) > 200


def test_contexts_entries_and_averages_are_asked_in_sql(store: Store, zeroed: MeasuredEffects) -> None:
    rows = rows_of(zeroed)
    feature = max(Counter(row["feature_id"] for row in rows).items(), key=lambda each: each[1])[0]
    mine = [row for row in rows if row["feature_id"] == feature and row["ahead"] == 0]
    with package.open(store.root, "resid") as run:
        about = run.sql(
            "from feature_effects where effect = 'kept' and feature_id = ? and ahead = 0", [feature]
        ).to_pylist()[0]
        contexts = run.ask("effect_contexts", feature, "kept", n=100).to_pylist()
        entries = run.ask("effects_on_entries", feature, "kept", n=1000).to_pylist()
        vocab = {row["vocab_id"]: row["piece"] for row in run.sql("from stg_vocab").to_pylist()}
        logits = {row["vocab_id"]: row["logit"] for row in run.ask("feature_logits", feature).to_pylist()}
    assert math.isclose(about["mean_kl"], np.mean([row["kl"] for row in mine]), rel_tol=1e-6)
    by_document = defaultdict(list)
    for row in mine:
        by_document[row["document_id"]].append(row["kl"])
    n, n_documents = len(mine), len(by_document)
    spread = sum(sum(kl - about["mean_kl"] for kl in each) ** 2 for each in by_document.values())
    error = 1.96 * math.sqrt(n_documents / (n_documents - 1) * spread) / n
    assert math.isclose(about["kl_high"] - about["mean_kl"], error, rel_tol=1e-4)
    assert (about["n_firings"], about["n_documents"]) == (n, n_documents)
    assert [row["token_id"] for row in contexts] == [
        row["token_id"] for row in sorted(mine, key=lambda row: (-row["kl"], row["token_id"]))
    ]
    by_token = {row["token_id"]: row for row in mine}
    for row in contexts:
        assert row["up"] == [vocab[each] for each in by_token[row["token_id"]]["up_ids"]]
        assert "«" in row["context"]
    changes: dict[int, float] = defaultdict(float)
    for row in mine:
        for way in ("up", "down"):
            for entry, old, new in zip(row[f"{way}_ids"], row[f"{way}_before"], row[f"{way}_after"], strict=True):
                changes[entry] += (new - old) / n
    assert {row["vocab_id"]: pytest.approx(row["mean_change"], abs=1e-7) for row in entries} == changes
    listed = defaultdict(list)
    for row in mine:
        for entry in row["up_ids"] + row["down_ids"]:
            listed[entry].append(row["set_to"] - row["value"])
    compared = 0
    for row in entries:
        if row["vocab_id"] in logits:
            wanted = logits[row["vocab_id"]] * np.mean(listed[row["vocab_id"]])
            assert math.isclose(row["direct_change"], wanted, rel_tol=2e-3, abs_tol=1e-6)
            compared += 1
    assert compared > 3


def test_a_feature_that_decides_a_token_is_found(ingredients: Ingredients, tmp_path: Path) -> None:
    """The model is edited: one direction behind its last block decides whether it says entry 300. The SAE has 16
    orthogonal features, and this direction is one of them."""
    entry, feature = 300, 5
    directions = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    shutil.copytree(ingredients.model, tmp_path / "edited")
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "edited")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.lm_head.weight[entry] += 10 * directions[feature]
    model.save_pretrained(tmp_path / "edited")
    sae = SparseAutoencoder(SAEConfig(architecture="relu", n_features=16), 16)
    with torch.no_grad():
        for name, value in (("W_enc", directions), ("W_dec", directions), ("b_enc", 0), ("b_dec", 0)):
            getattr(sae, name).copy_(torch.as_tensor(value))
    save_sae(sae, tmp_path / "sae", {})
    store, about = Store.create(tmp_path / "store"), {"source": str(tmp_path / "sae"), "n_features": 16}
    made = Ingredients(tmp_path / "edited", ingredients.corpus)
    recipe = parse_recipe(recipe_data(made, activations={"sites": ["transformer.h.1"]}, sae=about))
    for stage in (tokens, collect, train, encode):
        stage.run(Lineage(store, recipe), quiet())
    rows = rows_of(measure_effects(store, None, EffectSettings(n=40, ahead=0), quiet()))
    with package.open(store.root) as run:
        [first] = run.ask("effects_on_entries", feature, n=1).to_pylist()
    assert first["vocab_id"] == entry
    assert first["n_down"] > first["n_firings"] / 2
    assert first["n_up"] == 0
    assert first["log_change"] < 0
    assert first["direct_change"] < 0
    lost: dict[int, float] = defaultdict(float)
    for row in rows:
        for each, old, new in zip(row["down_ids"], row["down_before"], row["down_after"], strict=True):
            lost[row["feature_id"]] += (old - new) * (each == entry)
    ranked = sorted(lost, key=lambda each: -lost[each])
    assert ranked[0] == feature
    assert lost[feature] > 3 * lost[ranked[1]]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([-2.0, -1.0, 0.5, 1.0, 2.0, 3.5]), min_size=1, max_size=60),
    n=st.integers(0, 70), bands=st.integers(1, 12), seed=st.integers(0, 1 << 62),
)  # fmt: skip
def test_bands_are_equal_and_give_equal_shares(values: list[float], n: int, bands: int, seed: int) -> None:
    tokens, value = np.arange(len(values)) * 7, np.array(values, np.float32)
    chosen, band = choose_firings(tokens, value, n, bands, seed)
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    used = min(bands, len(values))
    slow = {i: 1 + rank * used // len(values) for rank, i in enumerate(order)}
    assert len(set(chosen.tolist())) == len(chosen)
    assert [slow[i] for i in chosen.tolist()] == band.tolist()
    if 0 < n < len(values):
        counts, sizes = Counter(band.tolist()), Counter(slow.values())
        for number in range(1, used + 1):
            assert counts[number] == min(sizes[number], n // used + (number <= n % used))
        assert len(chosen) <= n
    else:
        assert len(chosen) == len(values)
    again, _ = choose_firings(tokens, value, n, bands, seed)
    assert again.tolist() == chosen.tolist()


def test_another_seed_draws_other_firings() -> None:
    tokens, values = np.arange(10_000), np.ones(10_000, np.float32)
    draws = [set(choose_firings(tokens, values, 100, 1, seed)[0].tolist()) for seed in range(5)]
    assert all(len(one & other) < 20 for i, one in enumerate(draws) for other in draws[:i])
    assert abs(np.mean([sum(draw) / 100 for draw in draws]) - 5_000) < 700


def test_a_token_behind_a_hole_in_its_sequence_has_lost_its_context() -> None:
    tokens = np.array([0, 15, 16, 20, 21, 40])
    kept = firings._has_context(tokens, np.array([1, 2]), np.array([20, 47]), 16)
    assert kept.tolist() == [True, True, True, False, False, True]


def test_far_sequences_are_read_in_little_memory_and_each_as_it_is() -> None:
    length, wanted = 64, np.arange(3, 60_000, 50)
    with duckdb.connect() as connection:
        connection.execute(
            "create view src_tokens as select range as token_id, (range % 97)::integer as vocab_id, "
            f"range // 640 as document_id, range % 640 < 600 as mask from range({60_000 * length})"
        )
        tracemalloc.start()
        found = SequenceTokens.read(connection, wanted, length)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    token_ids = wanted[:, None] * length + np.arange(length)
    assert (found.vocab_ids == token_ids % 97).all()
    assert (found.owners == np.where(token_ids % 640 < 600, token_ids // 640, -1)).all()
    assert peak < 60_000 * length * 8  # less than one number for each token in between


@pytest.mark.long
def test_forgotten_documents_do_not_count(ingredients: Ingredients, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    lineage = Lineage(store, parse_recipe(recipe_data(ingredients, activations={"sites": [RESID]})))
    stages.run(lineage, quiet())
    measure_effects(store, None, EffectSettings(n=3, ahead=0), quiet())
    with package.open(store.root) as run:
        [victim] = run.sql(
            "select key, document_id from stg_documents join stg_effects using (document_id) group by all "
            "order by count(*) desc, key limit 1"
        ).to_pylist()
    forget.forget(store, [victim["key"]], quiet())
    with package.open(store.root) as run:
        assert not run.sql("from stg_effects where document_id = ?", [victim["document_id"]]).num_rows
    stages.run(Lineage(store, lineage.recipe), quiet())
    made = measure_effects(store, None, EffectSettings(n=0, ahead=0), quiet())
    with package.open(store.root) as run:
        holes = run.sql(
            "select token_id // 16 as sequence, min(token_id) as hole from src_tokens where not mask group by all"
        ).to_pylist()
    first = {row["sequence"]: row["hole"] for row in holes}
    assert not made.was_there
    for row in rows_of(made):
        assert row["document_id"] != victim["document_id"]
        assert row["token_id"] < first.get(row["token_id"] // 16, 1 << 62)


def test_firings_that_have_all_lost_their_context_are_an_error_in_words(store: Store, tmp_path: Path) -> None:
    """One document stays that lies in a single sequence and does not begin it."""
    left = Store.open(shutil.copytree(store.root, tmp_path / "store"))
    with package.open(left.root, "resid") as run:
        documents = run.sql(
            "select key, first_token_id // 16 = (first_token_id + n_tokens - 1) // 16 and first_token_id % 16 > 0 "
            "and n_tokens > 0 as fits from stg_documents order by fits desc, key"
        ).to_pylist()
    assert documents[0]["fits"]
    forget.forget(left, [row["key"] for row in documents[1:]], quiet())
    with pytest.raises(UserError, match="behind a forgotten document"):
        measure_effects(left, "resid", EffectSettings(ahead=0), quiet())
    assert not list(left.root.glob("tmp/*.checkpoint"))


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_and_ends_with_equal_files(store: Store, tmp_path: Path) -> None:
    undisturbed, killed = (shutil.copytree(store.root, tmp_path / name) for name in ("undisturbed", "killed"))
    words = ["effects", "resid", "--features", "all", "--n", "0", "--ahead", "1", "--name", "k"]
    slow = (
        "import saeflow.meaning.effects.tables as tables, time; tables.EFFECT_ROW_GROUP = 2048\n"
        "import saeflow.meaning.effects.part as part\n"
        "measure = part.PartMeasurer.measure\n"
        "def slowly(*given):\n    time.sleep({seconds}); return measure(*given)\n"
        "part.PartMeasurer.measure = slowly\n"
        "from saeflow.cli.app import main; main()"
    )
    folders = list(Path(killed, "tmp").glob("effects-k-*"))
    assert not folders
    process = subprocess.Popen([*SAEFLOW[:-1], slow.format(seconds=0.2), *words, "--store", str(killed)])
    deadline = time.monotonic() + 250
    try:
        while len(list(Path(killed).glob("tmp/effects-k-*.checkpoint/00000*.parquet"))) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not list(Path(killed, "effects").glob("k-*"))
    done = {path.name: path.stat().st_mtime_ns for path in Path(killed).glob("tmp/effects-k-*.checkpoint/0*.parquet")}
    again = [*SAEFLOW[:-1], slow.format(seconds=0), *words, "--store"]
    for folder in (killed, undisturbed):
        assert subprocess.run([*again, str(folder)], capture_output=True).returncode == 0
    assert len(done) >= 2
    one, other = (tree(next(Path(folder, "effects").glob("k-*"))) for folder in (killed, undisturbed))
    assert one == other
    assert not list(Path(killed, "tmp").glob("effects-k-*"))


def test_an_equal_question_is_answered_from_the_store(store: Store, zeroed: MeasuredEffects) -> None:
    again = measure_effects(store, "resid", EffectSettings(n=6, ahead=2, bands=3, name="kept"), quiet())
    assert again.was_there
    assert again.artefact == zeroed.artefact
    assert json.loads((zeroed.artefact.path / "artefact.json").read_text())["facts"]["n_firings"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resid", "--features", "64"], "has '64', but features go from 0 to 63"),
        (["resid", "--features", "9-2"], "has the range '9-2'"),
        (["resid", "--features", "a,b"], "Write numbers and ranges"),
        (["resid", "--features", ""], "Write numbers and ranges"),
        (["resid", "--features", "99999999999"], "Write numbers and ranges"),
        (["resid", "--features", "1", "--change", "gone"], "--change is 'gone'; it may be zero, mean"),
        (["resid", "--features", "1", "--change", "1e99"], "at most 1e+30"),
        (["resid", "--features", "1", "--change", "nan"], "--change is 'nan'"),
        (["resid", "--features", "1", "--n", "-1"], "--n is -1"),
        (["resid", "--features", "1", "--bands", "0"], "--bands is 0"),
        (["resid", "--features", "1", "--ahead", "-1"], "--ahead is -1"),
        (["resid", "--features", "1", "--top", "0"], "--top is 0"),
        (["resid", "--features", "1", "--name", "../x"], "--name is '../x'"),
        (["resid", "--features", "1", "--model", "/nowhere"], "model is '/nowhere', but the activations"),
        (["resid", "--features", "1", "--device", "tpu"], "--device is 'tpu'"),
        (["nobody", "--features", "1"], "There is no run 'nobody'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_is_refused_before_work(store: Store, saeflow: Command, words: list[str], message: str) -> None:
    before = outside_tmp(store)
    said = saeflow("effects", *words, "--store", store.root)
    assert said.code == 2
    assert message in said.err
    assert outside_tmp(store) == before
    assert not list(store.root.glob("tmp/*.checkpoint"))


def outside_tmp(store: Store) -> list[Path]:
    return sorted(path for path in store.root.rglob("*") if "tmp" not in path.relative_to(store.root).parts)


@pytest.mark.parametrize(
    ("text", "value"),
    [("zero", 0.0), ("0", 0.0), ("mean", 0.25), ("max", 4.0), ("MAX*2", 8.0), ("3x", 12.0), ("-1.5x", -6.0),
     ("3.5", 3.5), ("-2e-1", -0.2), ("same", None)],
)  # fmt: skip
def test_a_change_means_a_value(text: str, value: float | None) -> None:
    assert FeatureChange.parse(text).new_value(FeatureLevels(0.25, 4.0)) == value
    again = FeatureChange.parse(str(FeatureChange.parse(text)))
    assert again.new_value(FeatureLevels(0.25, 4.0)) == value


@given(st.floats(-1e29, 1e29), st.sampled_from(["{!r}", "max*{!r}"]))
def test_two_changes_have_two_texts(number: float, form: str) -> None:
    change = FeatureChange.parse(form.format(number))
    assert FeatureChange.parse(str(change)) == change


@pytest.mark.parametrize(
    ("change", "name"), [("zero", "zero"), ("max*-2", "max-2"), ("-3.5", "minus3.5"), ("1e20", "1e20")]
)
def test_a_measurement_has_the_name_of_its_change_if_it_is_given_none(change: str, name: str) -> None:
    settings = EffectSettings(change=change)
    settings.require_sensible()
    assert settings.artefact_name == name
