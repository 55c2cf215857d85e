"""The list of features: searched, sorted, a page at a time."""

from __future__ import annotations

import io

import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from saeflow.browser.charts import tiny_histogram
from tests.browser.test_server import run_of


def rows_of(pages: TestClient, address: str) -> list[dict[str, object]]:
    return list(pages.get(address).json()["panels"]["features"]["rows"])


def test_the_pages_of_the_list_hold_each_feature_once_in_order(pages: TestClient) -> None:
    here = f"/runs/{run_of(pages)}/features"
    every = rows_of(pages, f"{here}.json?n=1000&sort=density")
    address, found = f"{here}.json?n=7&sort=density", []
    while address:
        page = pages.get(address).json()
        found += page["panels"]["features"]["rows"]
        path, _, query = (page["next"] or "").partition("?")
        address = f"{path}.json?{query}" if query else ""
    assert found == every
    assert len({row["feature_id"] for row in found}) == len(found)


def test_the_counts_are_those_of_the_list(pages: TestClient) -> None:
    here = f"/runs/{run_of(pages)}/features"
    for asked in ("", "text=a", "kind=other", "min_density=0.01", "max_peak=1", "text=a&min_density=0.01"):
        answer = pages.get(f"{here}.json?n=1000&{asked}").json()["panels"]
        assert sum(row["n_features"] for row in answer["counts"]["rows"]) == len(answer["features"]["rows"])


def test_dense_features_do_not_fill_the_first_page(pages: TestClient) -> None:
    rows = rows_of(pages, f"/runs/{run_of(pages)}/features.json?n=1000")
    kinds = [row["kind"] in ("dense", "dead", "rare") for row in rows]
    assert kinds == sorted(kinds)


def test_the_page_shows_what_is_in_force_and_leads_to_the_next(pages: TestClient) -> None:
    html = pages.get(f"/runs/{run_of(pages)}/features?text=a&kind=other&sort=max&n=2").text
    assert 'name="text" maxlength="1000" value="a"' in html
    assert "<option selected>other</option>" in html
    assert 'rel="next"' in html


def test_the_list_as_a_file_holds_all_that_was_found(pages: TestClient) -> None:
    here = f"/runs/{run_of(pages)}/features"
    n_rows = len(rows_of(pages, f"{here}.json?n=1000&text=a"))
    assert n_rows > 0
    assert len(pages.get(f"{here}.csv?text=a").text.splitlines()) == n_rows + 1
    assert pq.read_table(io.BytesIO(pages.get(f"{here}.parquet?text=a").content)).num_rows == n_rows


@pytest.mark.parametrize("wrong", ["sort=love", "n=-1", "n=x", "entry=love", "min_density=x", "after_id=%27"])
def test_a_wrong_word_of_the_search_is_refused_with_its_name(pages: TestClient, wrong: str) -> None:
    answer = pages.get(f"/runs/{run_of(pages)}/features?{wrong}")
    assert answer.status_code == 404
    assert wrong.partition("=")[0] in answer.text


def test_a_tiny_histogram_draws_a_bar_for_each_bin_with_tokens() -> None:
    assert tiny_histogram([], None) == ""
    drawn = tiny_histogram([4, 0, 1], 0.5)
    assert drawn.count("M") == 2
    assert "Values from 0.5 to 0.841" in drawn
