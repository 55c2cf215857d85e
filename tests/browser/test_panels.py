"""Each panel's rows are those of its SQL, and a person reads these rows and no others."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

import saeflow
from saeflow.query.connection import connect
from saeflow.query.text_formats import as_json_value
from tests.browser.reader import Reader
from tests.conftest import Finished

UNDER_FILTER = "source=tales&threshold=0.1&without_feature=2"
PAGES = [
    "/.json", "/compare-runs.json?a={run}&b={run}", "/runs/{run}.json", "/runs/{run}/features.json?text=a&n=5",
    "/runs/{run}/ask/feature_summary.json", "/runs/{run}/features/1.json?all=1",
    f"/runs/{{run}}/features/1.json?all=1&before=3&after=0&{UNDER_FILTER}", "/runs/{run}/features/1/strongest.json?n=3",
    f"/runs/{{run}}/features/1/bands.json?{UNDER_FILTER}", "/runs/{run}/features/1/random.json",
    "/runs/{run}/features/1/near_misses.json?vocab=270",
    f"/runs/{{run}}/compare.json?a=1&b=2&{UNDER_FILTER}", "/runs/{run}/tokens.json?text=a",
    "/runs/{run}/tokens-at/3.json", "/runs/{run}/docs.json?text=tales&source=tales&after_id=2",
    f"/runs/{{run}}/features/1/companions.json?{UNDER_FILTER}", "/runs/{run}/doc.json?key=tales/000&feature=1&first=5",
    "/runs/{run}/docs/tales/000.json", f"/runs/{{run}}/tokens/270.json?{UNDER_FILTER}", "/runs/{run}/tokens/270.json",
]  # fmt: skip
FURTHER = [
    "/runs/{run}/features.json", "/runs/{run}/features.json?sort=density&kind=other",
    "/runs/{run}/compare.json?a=3&b=0", "/runs/{run}/ask/feature_bands.json?feature=3",
    f"/runs/{{run}}/features/2/near_misses.json?{UNDER_FILTER}", "/runs/{run}/doc.json?key=chinese",
    "/runs/{run}/doc.json?key=emoji&feature=5", "/runs/{run}/tokens/30.json",
    "/runs/{run}/ask/documents.json", "/runs/{run}/ask/runs.json", "/runs/{run}/try.json?text=the+dog",
]  # fmt: skip


@pytest.mark.parametrize("address", PAGES)
def test_the_sql_of_each_panel_gives_its_rows(pages: TestClient, finished: Finished, address: str):
    run = pages.get("/.json").json()["panels"]["runs"]["rows"][0]["schema_name"]
    with saeflow.open(finished.store.root) as opened:
        for name, panel in pages.get(address.format(run=run)).json()["panels"].items():
            rows = opened.sql(panel["sql"].removesuffix(";")).to_pylist()
            assert json.loads(json.dumps(as_json_value(rows))) == panel["rows"], name


@pytest.fixture(scope="module")
def reader(pages: TestClient, finished: Finished) -> Iterator[Reader]:
    with contextlib.closing(connect(finished.store)) as connection:
        yield Reader(pages, connection, "small")


@pytest.mark.parametrize("address", PAGES + FURTHER)
def test_a_page_shows_every_row_of_its_sql_and_no_other(reader: Reader, address: str):
    assert reader.read(address.format(run=reader.name).replace(".json", "", 1))
