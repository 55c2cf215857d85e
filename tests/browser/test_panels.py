"""Each panel's rows are those of its SQL."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient

import saeflow
from saeflow.query.text_formats import as_json_value
from tests.conftest import Finished

PAGES = ["/.json", "/runs/{run}/features/1.json", "/runs/{run}/ask/feature_summary.json"]


@pytest.mark.parametrize("address", PAGES)
def test_the_sql_of_each_panel_gives_its_rows(pages: TestClient, finished: Finished, address: str):
    run = pages.get("/.json").json()["panels"]["runs"]["rows"][0]["schema_name"]
    with saeflow.open(finished.store.root) as opened:
        for name, panel in pages.get(address.format(run=run)).json()["panels"].items():
            rows = opened.sql(panel["sql"].removesuffix(";")).to_pylist()
            assert json.loads(json.dumps(as_json_value(rows))) == panel["rows"], name
