"""The pages in real Chromium: by keyboard alone, without a request to another host or a word in the console."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from starlette.testclient import TestClient

from saeflow.browser.server import application
from saeflow.browser.shading import shown_text
from tests.conftest import Finished
from tests.support.chromium import CHROMIUM, Window, window
from tests.support.walk import at, strayed, walk, walk_through

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="There is no Chromium on this machine.")


@pytest.fixture(scope="module")
def address(finished: Finished) -> Iterator[str]:
    """The address of the finished store's pages."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        application(finished.store), log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    with window(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture
def shown(chromium: Window, address: str) -> Iterator[Window]:
    """A window that stayed on this machine and wrote nothing into the console, which is checked at the end."""
    chromium.requests.clear()
    chromium.messages.clear()
    yield chromium
    assert strayed(chromium, address) == []


def test_keys_alone_lead_from_the_runs_to_a_token_and_back(shown: Window, address: str) -> None:
    way = walk(shown, address)
    assert way[1:3] == ["/runs/small", "/runs/small/features"]
    assert way[-2:] == ["/runs/small", "/"]


@pytest.mark.long
def test_the_walk_needs_saeflow_browse_and_nothing_else(finished: Finished, capfd: pytest.CaptureFixture[str]) -> None:
    assert walk_through(finished.store.root) == []
    assert "/runs/small/tokens" in capfd.readouterr().out


def test_the_walk_says_plainly_that_chromium_is_missing(finished: Finished) -> None:
    command = [sys.executable, "-m", "tests.support.walk", str(finished.store.root)]
    said = subprocess.run(command, env=os.environ | {"PATH": ""}, capture_output=True, text=True)
    assert said.returncode == 1
    assert "no Chromium on this machine (apt-get install chromium)" in said.stdout


PAGES = [
    "/", "/about", "/runs/small", "/runs/small/features", "/runs/small/map", "/runs/small/questions",
    "/runs/small/ask/feature_summary", "/runs/small/features/1", "/runs/no", "/compare-runs?a=small&b=small",
    "/runs/small/docs", "/runs/small/doc?key=tales/000", "/runs/small/tokens?text=a", "/runs/small/tokens-at/3",
    "/runs/small/compare?a=1&b=2", "/runs/small/selection?tokens=3,40", "/runs/small/try", "/runs/small/sources",
]  # fmt: skip
DRAWN = "[...document.querySelectorAll('figure.chart')].every((each) => each.classList.contains('drawn'))"


def test_slash_leads_to_the_filter_of_a_feature_and_not_to_its_label(shown: Window, address: str) -> None:
    shown.open(f"{address}/runs/small/features/1")
    shown.press("/")
    assert shown.value("document.activeElement.name") == "source"


def test_what_a_feature_page_shows_beside_its_contexts_does_not_scroll_sideways(shown: Window, address: str) -> None:
    shown.resize(1200, 1000)
    shown.open(f"{address}/runs/small/features/1")
    shown.wait(DRAWN)
    assert shown.value("[...document.querySelectorAll('figure.chart')].every((f) => f.scrollWidth <= f.clientWidth)")


PLACE = (
    "(() => {{ const box = {}.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }})()"
)


def click(shown: Window, element: str) -> None:
    """Click in the middle of an element, given as JavaScript."""
    shown.value(f"{element}.scrollIntoView({{ block: 'center' }})")
    x, y = shown.value(PLACE.format(element))
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        shown.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)


SILENT = """[...document.querySelectorAll('#examples [data-lengths]')].map((each) => {
  const node = [...each.childNodes].find((node) => node.nodeType === 3 && node.data.trim());
  return node && each;
}).find(Boolean)"""
"""A context with silent tokens."""

SPELT = """(() => {
  const found = [];
  for (const context of document.querySelectorAll('[data-lengths]')) {
    context.dispatchEvent(new Event('focusin', { bubbles: true }));
    for (const each of context.querySelectorAll('[data-token]')) {
      const text = [...each.childNodes].filter((node) => node.nodeName !== 'I').map((node) => node.textContent);
      found.push([Number(each.dataset.token), text.join('')]);
    }
  }
  return found;
})()"""
"""Every token of the contexts as a reader may choose it: its number and its text."""


def test_every_token_of_a_context_can_be_chosen_under_its_own_number(shown: Window, address: str, pages: TestClient):
    for path in ("features/1/strongest", "features/2/random", "selection?tokens=3,40"):
        shown.open(f"{address}/runs/small/{path}")
        expected = []
        for panel in (
            pages.get(f"/runs/small/{path}".replace("?", ".json?") if "?" in path else f"/runs/small/{path}.json")
            .json()["panels"]
            .values()
        ):
            for row in (row for row in panel["rows"] if "place" in row):
                first = row["token_id"] - row["place"] + 1
                expected += [
                    [first + i, shown_text(each)]
                    for i, each in enumerate(row["pieces"])
                    if each or i + 1 == row["place"]
                ]
        found = shown.value(SPELT)
        assert [each for each in found if each[1]] == [each for each in expected if each[1]], path


def test_five_tokens_clicked_on_lead_to_the_features_on_them(shown: Window, address: str, pages: TestClient) -> None:
    shown.open(f"{address}/runs/small/features/1")
    shown.value("sessionStorage.clear()")
    shown.open(f"{address}/runs/small/features/1")
    assert shown.value("document.querySelector('.bar').hidden")
    tokens = shown.value(f"{SPELT}.map((each) => each[0]).slice(0, 5)")
    for token in tokens:
        click(shown, f"document.querySelector('[data-token=\"{token}\"]')")
    assert shown.value("document.querySelector('.bar').innerText").startswith("5 tokens chosen")
    shown.open(f"{address}/runs/small/docs")  # the choice lasts from page to page
    click(shown, "document.querySelector('.bar a')")
    at(shown, "/runs/small/selection")
    address_now = shown.value("location.pathname + '.json' + location.search")
    assert shown.value("new URLSearchParams(location.search).get('tokens')") == ",".join(map(str, sorted(tokens)))
    panels = pages.get(address_now).json()["panels"]
    assert [row["token_id"] for row in panels["tokens"]["rows"]] == sorted(tokens)
    listed = "[...document.querySelectorAll('#features tbody a')].map((each) => Number(each.textContent))"
    assert shown.value(listed) == [row["feature_id"] for row in panels["features"]["rows"]]
    click(shown, "document.querySelector('.bar button')")
    assert shown.value("document.querySelector('.bar').hidden")


def test_keys_alone_choose_a_token_and_the_silent_one_beside_it(shown: Window, address: str) -> None:
    shown.open(f"{address}/runs/small/features/1/strongest")
    shown.value("sessionStorage.clear()")
    shown.open(f"{address}/runs/small/features/1/strongest")
    shown.value("document.querySelector('.contexts mark').focus()")
    first = shown.value("document.activeElement.dataset.token")
    shown.press("Enter")
    shown.value(
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', bubbles: true }))"
    )
    assert shown.value("document.activeElement.dataset.token") == str(int(first) + 1)
    shown.press("x")
    assert shown.value("document.querySelector('.bar a').search") == f"?tokens={first},{int(first) + 1}"
    shown.press("x")
    assert shown.value("document.querySelector('.bar a').search") == f"?tokens={first}"


def test_a_click_on_a_document_opens_a_token_unless_the_reader_chooses(shown: Window, address: str) -> None:
    shown.open(f"{address}/runs/small/doc?key=tales/000")
    shown.value("sessionStorage.clear()")
    shown.open(f"{address}/runs/small/doc?key=tales/000")
    click(shown, "document.querySelector('.choose input')")
    third, fourth = shown.value("[...document.querySelectorAll('.text a')].slice(2, 4).map((each) => each.id)")
    click(shown, f"document.querySelector('#{third}')")
    assert shown.value("document.querySelector('.bar a').search") == f"?tokens={third[1:]}"
    click(shown, "document.querySelector('.choose input')")
    click(shown, f"document.querySelector('#{fourth}')")
    at(shown, f"/runs/small/tokens-at/{fourth[1:]}")


def test_no_more_than_a_hundred_tokens_are_chosen(shown: Window, address: str) -> None:
    shown.open(f"{address}/runs/small/doc?key=tales/000")
    many = "JSON.stringify([...Array(100).keys()].map((i) => i + 100000))"
    shown.value(f"sessionStorage.setItem('chosen tokens of /runs/small', {many})")
    shown.open(f"{address}/runs/small/doc?key=tales/000")
    shown.value("document.querySelector('.text a').focus()")
    shown.press("x")
    assert "100 tokens chosen, the most there may be" in shown.value("document.querySelector('.bar').innerText")
    assert not shown.value("document.querySelector('.text a').classList.contains('picked')")
    shown.value("sessionStorage.clear()")


@pytest.mark.long
def test_every_page_is_drawn_light_and_dark_without_a_message(shown: Window, address: str) -> None:
    for scheme in ("light", "dark"):
        shown.prefers(scheme)
        for path in PAGES:
            shown.open(address + path)
            shown.wait(DRAWN)
            if path == "/runs/no":  # Chromium itself says that this page has the status 404
                assert len(shown.messages) == 1
                shown.messages.clear()


COLOURED = """(() => {
  const canvas = document.querySelector("figure.chart canvas");
  canvas.scrollIntoView({ block: "center" });
  const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width * 0.8, canvas.height);
  for (let i = 0; i < data.length; i += 4) {
    const colours = data.slice(i, i + 3);
    if (data[i + 3] < 170 || Math.max(...colours) - Math.min(...colours) < 40) continue;
    const box = canvas.getBoundingClientRect(), scale = box.width / canvas.width;
    return [box.x + scale * ((i / 4) % width), box.y + scale * Math.floor(i / 4 / width)];
  }
})()"""
"""Where a picture has a coloured pixel, which is that of a point."""


@pytest.mark.parametrize("path", ["/runs/small", "/runs/small/map"])
def test_a_click_on_a_point_opens_its_feature(shown: Window, address: str, path: str) -> None:
    shown.prefers("light")
    shown.open(address + path)
    shown.wait(DRAWN)
    x, y = shown.value(COLOURED)
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        shown.call("Input.dispatchMouseEvent", type=kind, x=x, y=y + 1, **button)
    at(shown, "/runs/small/features/")


def test_axe_finds_no_fault(shown: Window, address: str) -> None:
    package = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed.")
    (script,) = Path(package.__file__).parent.rglob("axe*.js")
    for scheme in ("light", "dark"):
        shown.prefers(scheme)
        for path in PAGES:
            shown.open(address + path)
            shown.value(script.read_text("utf-8") + "; 0")
            faults = (
                "axe.run().then((found) => found.violations.map((each) => [each.id, each.nodes.map((n) => n.html)]))"
            )
            assert shown.value(faults) == [], f"{path} {scheme}"
            shown.messages.clear()
