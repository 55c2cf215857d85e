"""Features of one run found again in another: by direction, one to one, and by their values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import saeflow as package
from saeflow.meaning.matching import QUESTIONS, Matched, match_by_direction, match_runs
from saeflow.pipeline import encode, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.query.connection import connect_to_run
from saeflow.query.outside.directions import directions_of
from saeflow.query.runs import pick_run, runs
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.support.command import Command
from tests.support.small_pipeline import a_table, brought_data, quiet, write_table
from tests.support.stored_run import Stored

SEEDS = {"one": 0, "two": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two runs of one table that differ in their seed, and a smaller one of another table."""
    folder = tmp_path_factory.mktemp("matching")
    store = Store.create(folder / "store")
    table = np.abs(a_table())
    for name, seed in SEEDS.items():
        sae = {"n_features": 24, "k": 3, "seed": seed}
        data = brought_data(write_table(folder / "t.npy", table), sae=sae) | {"name": name, "data": "shared"}
        make(store, data)
    other = brought_data(write_table(folder / "u.npy", table[:90] + 0.01), sae={"n_features": 12, "k": 3})
    make(store, other | {"name": "elsewhere"})
    return store


def make(store: Store, data: dict[str, object]) -> None:
    recipe = parse_recipe(data)
    for stage in (import_table, train, encode):
        stage.run(Lineage(store, recipe), quiet())


def matched(store: Store, one: str, other: str) -> Matched:
    run, connection = connect_to_run(store, one, names=QUESTIONS)
    with connection:
        return match_runs(store, connection, run, pick_run(store, runs(store), other))


def live(store: Store, name: str) -> tuple[list[int], np.ndarray, dict[tuple[int, int], float]]:
    """The live features of a run, their unit directions, and the run's values."""
    run = pick_run(store, runs(store), name)
    values = {(token, feature): value for token, feature, value in Stored(store, run.artefact).values}
    features = sorted({feature for _, feature in values})
    rows = directions_of(store, run).numpy().astype(np.float64)[features]
    return features, rows / np.linalg.norm(rows, axis=1, keepdims=True), values


def test_a_run_finds_every_feature_of_itself(store: Store) -> None:
    found = matched(store, "one", "one")
    assert found.table["feature_id"] == found.table["match_id"] == found.table["nearest_id"]
    assert found.share_found(0.9999) == found.share_near(0.9999) == 1.0
    assert found.mean("correlation") == pytest.approx(1.0)
    assert set(found.table["jaccard"].to_pylist()) == {1.0}


def test_the_matches_of_two_seeds_are_one_to_one_with_the_largest_sum_and_agree_with_the_values(store: Store) -> None:
    found = matched(store, "one", "two")
    rows = found.table.to_pylist()
    mine, theirs = live(store, "one"), live(store, "two")
    cosines = mine[1] @ theirs[1].T
    assert sorted(row["feature_id"] for row in rows) == mine[0]
    assert (found.n_live, found.n_other_live) == cosines.shape
    tokens = sorted({token for each in (mine, theirs) for token, _ in each[2]})
    n_tokens = len(a_table())
    for row in rows:
        place = mine[0].index(row["feature_id"])
        assert row["nearest_cosine"] == pytest.approx(cosines[place].max(), abs=1e-5)
        assert row["nearest_id"] == theirs[0][int(cosines[place].argmax())]
        if row["match_id"] is not None:
            assert row["match_cosine"] == pytest.approx(cosines[place, theirs[0].index(row["match_id"])], abs=1e-5)
            pairs = ((mine[2], row["feature_id"]), (theirs[2], row["match_id"]))
            x, y = (np.array([values.get((t, f), 0.0) for t in tokens]) for values, f in pairs)
            x, y = (np.concatenate([each, np.zeros(n_tokens - len(tokens))]) for each in (x, y))
            assert row["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
            assert row["jaccard"] == ((x != 0) & (y != 0)).sum() / ((x != 0) | (y != 0)).sum()
            assert (row["n_tokens"], row["match_n_tokens"]) == ((x != 0).sum(), (y != 0).sum())
    counts = {row["feature_id"]: row["n_tokens"] for row in rows}
    assert counts == {f: sum(g == f for _, g in mine[2]) for f in mine[0]}
    for cosine in (0.0, 0.5, 0.9):
        again = [row for row in rows if (row["match_cosine"] or -1) >= cosine]
        assert found.share_found(cosine) == len(again) / len(rows)
        assert found.share_of_values(cosine) == sum(row["n_tokens"] for row in again) / len(mine[2])
    matches = [row["match_id"] for row in rows if row["match_id"] is not None]
    assert len(set(matches)) == len(matches) == min(cosines.shape)
    best = sum(row["match_cosine"] for row in rows if row["match_id"] is not None)
    dice = np.random.default_rng(0)
    few, many = sorted(cosines.shape)
    wide = cosines if len(cosines) == few else cosines.T
    assert all(wide[range(few), dice.permutation(many)[:few]].sum() <= best + 1e-4 for _ in range(300))
    assert [row["match_cosine"] or 0 for row in rows] == sorted(
        (row["match_cosine"] or 0 for row in rows), reverse=True
    )


def test_the_share_found_again_is_that_of_the_planted_copies() -> None:
    dice = np.random.default_rng(5)
    mine = torch.from_numpy(np.linalg.qr(dice.normal(size=(64, 64)))[0].astype(np.float32))
    theirs = torch.from_numpy(np.linalg.qr(dice.normal(size=(64, 64)))[0].astype(np.float32))[:50]
    order = dice.permutation(50)
    theirs[order[:16]] = mine[:16] * 3 + 0.1 * torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    found = match_by_direction(mine, theirs)
    places, cosines = found["match"]
    assert places[:16].tolist() == order[:16].tolist() == found["nearest"][0][:16].tolist()
    assert (cosines >= 0.9).sum() == 16
    assert sorted(places[places >= 0].tolist()) == list(range(50))
    assert (places < 0).sum() == 14


def test_runs_of_other_activations_are_refused_and_so_is_what_takes_too_much_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="read different activations"):
        matched(store, "one", "elsewhere")
    monkeypatch.setattr("saeflow.runtime.memory.total_memory", lambda: 4000)
    with pytest.raises(UserError, match=r"takes \d.* of memory, but half of this machine's is 2"):
        matched(store, "one", "two")


def test_splitting_says_the_cosine_of_each_feature_with_the_one_it_splits(store: Store) -> None:
    features, directions, values = live(store, "one")
    others, rows, their_values = live(store, "two")
    commonest = max(features, key=lambda feature: sum(f == feature for _, f in values))
    with package.open(store.root, "one", threads=1) as run:
        found = run.ask("split_features", commonest, "two", min_inside=0.0, n=99).to_pylist()
        with pytest.raises(UserError, match="runs of different tokens"):
            run.ask("split_features", commonest, "elsewhere")
    tokens = {token for token, feature in values if feature == commonest}
    assert {row["other_id"] for row in found} == {f for token, f in their_values if token in tokens}
    for row in found:
        cosine = directions[features.index(commonest)] @ rows[others.index(row["other_id"])]
        assert row["cosine"] == pytest.approx(cosine, abs=1e-5)


def test_the_command_writes_the_matches_their_summary_and_a_picture(
    saeflow: Command, store: Store, tmp_path: Path
) -> None:
    said = saeflow("compare", "one", "two", "--picture", "again.png", "-f", "json", "--store", store.root)
    assert said.code == 0, said.err
    found = matched(store, "one", "two")
    assert json.loads(said.out) == found.table.to_pylist()
    assert f"{found.share_found(0.7):.1%} found again one to one" in said.err
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    quick = json.loads(saeflow("compare", "one", "two", "--no-values", "-f", "json", "--store", store.root).out)
    alike = {"correlation": None, "jaccard": None}
    assert quick == [row | alike for row in found.table.to_pylist()]
    wrong = saeflow("compare", "one", "two", "--picture", "again.gif", "--store", store.root)
    assert (wrong.code, "must end in .png" in wrong.err) == (2, True)
    unknown = saeflow("compare", "one", "tow", "--store", store.root)
    assert (unknown.code, "'tow'" in unknown.err) == (2, True)
