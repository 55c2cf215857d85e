"""The list of features: searched, sorted, a page at a time."""

from __future__ import annotations

import io

import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from saeflow.browser.charts import tiny_histogram
from saeflow.browser.shading import per_cent
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


def test_the_list_says_how_much_each_token_and_source_counts(pages: TestClient) -> None:
    here = f"/runs/{run_of(pages)}/features"
    html = pages.get(f"{here}?source=tales&n=3").text
    for row in rows_of(pages, f"{here}.json?source=tales&n=3"):
        assert row["main_source"] == "tales"
        for part in (row["source_share"], *row["shares"]):  # type: ignore[misc]
            assert f"<small>{per_cent(part, 2)}</small>" in html
    assert '<option value="letters"></option>' in html
    assert "single-token nine tenths" in " ".join(html.split())


def test_a_kind_leads_back_to_all_kinds(pages: TestClient) -> None:
    here = f"/runs/{run_of(pages)}/features"
    assert f'<a href="{here}?text=a">all kinds</a>' in pages.get(f"{here}?text=a&kind=other").text
    assert "all kinds" not in pages.get(f"{here}?text=a").text


def test_the_page_of_sources_tells_the_two_largest_apart_unless_others_are_named(pages: TestClient) -> None:
    here = f"/runs/{run_of(pages)}/sources"
    rows = pages.get(f"{here}.json").json()["panels"]["sources"]["rows"]
    assert rows == sorted(rows, key=lambda row: -row["n_tokens"])
    first, second = [row["source"] for row in rows][:2]
    assert f"What tells {first} from {second}" in pages.get(here).text
    named = pages.get(f"{here}.json?a={second}&b={first}").json()["panels"]["contrast"]
    assert (named["arguments"]["a"], named["arguments"]["b"]) == (second, first)
    assert pages.get(f"{here}?a=nowhere").status_code == 404


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
