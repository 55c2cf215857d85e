"""Pages around runs: the list, two compared, one run, its features, its map, its questions."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from saeflow.browser.server import application
from saeflow.store.store import Store
from tests.browser.conftest import ADDRESS
from tests.support.small_store import Given


def pages_of(store: Store) -> TestClient:
    return TestClient(application(store), base_url=ADDRESS, follow_redirects=False)


def test_the_list_says_of_each_run_what_it_is_how_good_and_in_which_state(pages: TestClient):
    (row,) = pages.get("/.json").json()["panels"]["runs"]["rows"]
    assert row["state"] == "ready"
    assert row["n_bytes"] > 0
    assert row["model"].endswith("model")
    assert row["written"].startswith("20")
    html = pages.get("/").text
    for word in (
        "model",
        "site",
        "architecture",
        "tokens",
        "L0",
        "variance unexplained",
        "loss recovered",
        "dead",
        "size",
        "date",
    ):
        assert f'<th scope="col">{word}</th>' in html


def test_a_store_without_a_run_says_how_to_make_one(tmp_path: Path):
    answer = pages_of(Store.create(tmp_path / "store")).get("/")
    assert answer.status_code == 200
    assert "saeflow run my.toml" in answer.text


def test_a_damaged_run_is_listed_with_its_problem(tmp_path: Path):
    Given(name="old", fp="f0000000").write(tmp_path)
    store = Given().write(tmp_path)
    (tmp_path / "features" / "old-f0000000" / "manifest.json").write_text("{")
    pages = pages_of(store)
    rows = pages.get("/.json").json()["panels"]["runs"]["rows"]
    assert {row["name"]: row["state"] for row in rows} == {"demo": "not evaluated", "old": "damaged"}
    assert "damaged: " in pages.get("/").text
    only = pages_of(_without(store, "demo-f0000001")).get("/")
    assert only.status_code == 200
    assert "old-f0000000" in only.text


def _without(store: Store, folder: str) -> Store:
    (store.root / "features" / folder / "manifest.json").write_text("{")
    return Store.open(store.root)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """Runs demo and old of the same tokens, and another of other tokens."""
    tmp_path = tmp_path_factory.mktemp("two_runs")
    for name in ("old", "demo"):
        store = Given(name=name, corpus=("demo", "t0000001")).write(tmp_path)
    Given(name="another", fp="f0000009").write(tmp_path)
    return pages_of(store)


def test_two_ticked_runs_are_compared(two_runs: TestClient):
    html = two_runs.get("/compare-runs?run=demo&run=old").text
    assert "/runs/demo/features/0" in html
    assert 'href="/runs/old"' in html
    by_name = two_runs.get("/compare-runs.json?a=demo&b=old").json()
    assert by_name["panels"]["matches"]["question"] == "compare_runs"
    assert len(by_name["panels"]["matches"]["rows"]) == 4


def test_runs_of_different_tokens_are_refused_with_the_reason(two_runs: TestClient):
    answer = two_runs.get("/compare-runs?run=demo&run=another")
    assert answer.status_code == 200
    assert "were encoded on different tokens" in answer.text
    assert "matches" not in two_runs.get("/compare-runs.json?run=demo&run=another").json()["panels"]


@pytest.mark.parametrize("asked", ["", "?run=demo", "?run=demo&run=old&run=another", "?a=demo&b=no", "?a=%00&b=demo"])
def test_other_than_two_runs_are_refused_with_a_way_back(two_runs: TestClient, asked: str):
    answer = two_runs.get(f"/compare-runs{asked}")
    assert answer.status_code == 404
    assert '<a href="/">' in answer.text
