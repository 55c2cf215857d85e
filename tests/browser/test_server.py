"""What pages answer, and what they refuse."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from saeflow.browser.server import POLICY, application
from saeflow.cli.browse import listen
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.browser.conftest import ADDRESS
from tests.conftest import Finished


def run_of(pages: TestClient) -> str:
    return str(pages.get("/.json").json()["panels"]["runs"]["rows"][0]["schema_name"])


def test_a_page_answers_as_html_and_as_json(pages: TestClient):
    address = f"/runs/{run_of(pages)}/features/0"
    html, json = pages.get(address), pages.get(f"{address}.json")
    assert html.status_code == json.status_code == 200
    assert "Feature 0" in html.text
    assert json.json()["panels"].keys() >= {"values", "examples"}


def test_the_rows_of_a_question_come_as_csv_and_parquet(pages: TestClient):
    address = f"/runs/{run_of(pages)}/ask/feature_summary"
    n_rows = len(pages.get(f"{address}.json").json()["panels"]["rows"]["rows"])
    assert len(pages.get(f"{address}.csv").text.splitlines()) == 1 + n_rows
    assert pages.get(f"{address}.parquet").content[:4] == b"PAR1"


@pytest.mark.parametrize(
    "wrong", ["/no", "/runs/no", "/runs/{run}/features/-1", "/runs/{run}/features/99999999999999999999",
              "/runs/{run}/features/'", "/runs/{run}/features/%00", "/runs/{run}/ask/no", "/runs/{run}/ask/contexts",
              "/runs/{run}/ask/contexts?feature=1&n=-1"],
)  # fmt: skip
def test_what_is_not_there_is_said_with_a_way_back(pages: TestClient, wrong: str):
    answer = pages.get(wrong.format(run=run_of(pages)))
    assert answer.status_code == 404
    assert '<a href="/">' in answer.text


def test_a_wrong_name_on_a_page_of_a_run_leads_back_to_the_run(pages: TestClient):
    run = run_of(pages)
    answer = pages.get(f"/runs/{run}/features/1?source=nowhere")
    assert answer.status_code == 404
    assert f'href="/runs/{run}/features"' in answer.text
    assert pages.get(f"/runs/{run}/features/1.csv?source=nowhere").json()["problem"].startswith("There is no source")
    assert 'href="/runs/no"' not in pages.get("/runs/no/features").text


def test_an_address_that_is_printed_takes_connections_before_its_server_runs():
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname(), timeout=5):
        taken = listening.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {taken}: nothing can listen there"):
            listen("127.0.0.1", taken)


def test_every_answer_has_the_policy(pages: TestClient):
    for address in ("/", "/no", "/static/browser.css", "/.json"):
        assert pages.get(address).headers["content-security-policy"] == POLICY


def test_another_host_and_another_site_are_refused(pages: TestClient):
    assert pages.get("/", headers={"host": "evil.example"}).status_code == 403
    assert pages.get("/", headers={"host": "127.0.0.1.evil.example:8417"}).status_code == 403
    assert pages.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert pages.get("/", headers={"host": "localhost:1"}).status_code == 200


@pytest.fixture
def own_pages(finished: Finished, tmp_path: Path) -> TestClient:
    """Pages of a copy of the store."""
    shutil.copytree(finished.store.root, tmp_path / "store")
    return TestClient(application(Store.open(tmp_path / "store")), base_url=ADDRESS, follow_redirects=False)


def token_of(pages: TestClient, address: str) -> str:
    return pages.get(address).text.partition('name="token" value="')[2].partition('"')[0]


def test_a_label_is_written_and_shown(own_pages: TestClient):
    address = f"/runs/{run_of(own_pages)}/features/3"
    form = {"token": token_of(own_pages, address), "label": "<b>seas</b>"}
    sent = own_pages.post(f"{address}/label", data=form, headers={"origin": ADDRESS})
    assert sent.status_code == 303
    assert sent.headers["location"] == address
    filtered = own_pages.post(f"{address}/label?threshold=0.1", data=form, headers={"origin": ADDRESS})
    assert filtered.headers["location"] == f"{address}?threshold=0.1"
    assert "&lt;b&gt;seas&lt;/b&gt;" in own_pages.get(address).text


def test_a_label_from_elsewhere_is_refused(own_pages: TestClient):
    address = f"/runs/{run_of(own_pages)}/features/3"
    form = {"token": token_of(own_pages, address), "label": "seas"}
    assert own_pages.post(f"{address}/label", data=form).status_code == 403
    assert own_pages.post(f"{address}/label", data=form, headers={"origin": "http://evil.example"}).status_code == 403
    wrong = form | {"token": "x"}
    assert own_pages.post(f"{address}/label", data=wrong, headers={"origin": ADDRESS}).status_code == 403
