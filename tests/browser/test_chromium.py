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

from saeflow.browser.server import application
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
    "/runs/small/compare?a=1&b=2", "/runs/small/try", "/runs/small/sources",
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
