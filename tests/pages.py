"""Prefect's pages of a finished and of a failed run, looked at in headless Chromium; pictures of them in docs/pages/.

python -m tests.pages                      about a minute and a half
python -m tests.pages --into /tmp/pages    pictures elsewhere

Needs Debian's chromium and the package playwright: `apt-get install chromium`, `pip install playwright`. Nothing but
this machine is asked: the browser's requests to other hosts are refused.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.pipeline import pipeline_flow
from flows.support import page, reporting
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.support.prefect_server import ROOT, prefect_server
from tests.support.small_pipeline import Ingredients, documents, recipe_data, write_corpus

CHROMIUM = "/usr/bin/chromium"
WINDOW = {"width": 1280, "height": 860}
HOSTILE = "![x](https://evil.example/x.png) [y](https://evil.example) <img src=https://evil.example/z.png>"


class Pages:
    """A browser window on the pages of one server."""

    def __init__(self, window: Any, url: str, into: Path) -> None:
        self.window, self.url, self.into = window, url, into

    def open(self, path: str, *texts: str, tab: str | None = None) -> None:
        """Go to a page, and to a tab of it; raises where a text does not come up there."""
        self.window.goto(f"{self.url}/{path}")
        if tab is not None:
            self.window.get_by_text(tab, exact=True).first.click()
        for text in texts:
            self.window.get_by_text(text).first.wait_for(timeout=30_000)

    def keep(self, name: str, height: int = WINDOW["height"]) -> None:
        """A picture of what is seen, once it has stopped moving."""
        self.window.set_viewport_size(WINDOW | {"height": height})
        self.window.wait_for_timeout(1500)
        self.window.screenshot(path=self.into / f"{name}.png")
        self.window.set_viewport_size(WINDOW)
        print(f"  {name}.png", flush=True)

    def count(self, selector: str) -> int:
        return int(self.window.locator(selector).count())


@contextlib.contextmanager
def browser(url: str, into: Path) -> Iterator[Pages]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("tests.pages needs playwright: pip install playwright")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        window = chromium.new_page(viewport=WINDOW, color_scheme="light")
        window.route("**/*", lambda route: route.continue_() if is_here(route.request.url, url) else route.abort())
        try:
            yield Pages(window, url, into)
        finally:
            chromium.close()


def is_here(asked: str, url: str) -> bool:
    return asked.startswith((url, "data:", "blob:"))


def recipes(folder: Path) -> tuple[Recipe, Recipe]:
    """One that runs to its end, and one that is refused half way."""
    ingredients = Ingredients.write(folder)
    write_corpus(ingredients.corpus, documents(3000))
    good = recipe_data(ingredients, name="tales", train={"n_tokens": 1_500_000}, tokens={"part_tokens": 30_000})
    return parse_recipe(good), parse_recipe(recipe_data(ingredients, name="tight", feed={"pool_bytes": 1000}))


@flow(name="hostile")
def hostile_flow() -> None:
    reporting.show_table("hostile", {"file": HOSTILE})
    reporting.show_markdown("hostile", page.plain(HOSTILE), "What others wrote")


def run_all(folder: Path) -> str:
    """Run the flows; returns what the failed one said."""
    good, tight = recipes(folder)
    pipeline_flow(good, str(folder / "store"))
    hostile_flow()
    try:
        pipeline_flow(tight, str(folder / "tight"))
    except UserError as error:
        return str(error)
    raise AssertionError("the second recipe was to be refused")


def newest(flow_name: str, recipe: str = "") -> FlowRun:
    with get_client(sync_client=True) as client:
        flow_id = client.read_flow_by_name(flow_name).id
        found = [run for run in client.read_flow_runs() if run.flow_id == flow_id and recipe in run.name]
    return max(found, key=lambda run: run.created.timestamp() if run.created else 0.0)


def artifact(key: str, run: UUID | None = None) -> UUID:
    with get_client(sync_client=True) as client:
        return next(each.id for each in client.read_artifacts() if each.key == key and run in (None, each.flow_run_id))


def look(pages: Pages, refused: str) -> None:
    finished, train = newest("saeflow-pipeline", "tales"), newest("saeflow-train", "tales")
    pages.open(
        f"runs/flow-run/{finished.id}", finished.name, "Completed", "batchtopk", "encode tales:", tab="Subflow Runs"
    )
    pages.open(f"runs/flow-run/{finished.id}", "n_values")
    pages.keep("finished")
    pages.open(f"runs/flow-run/{train.id}", train.name, " left, unexplained")
    pages.keep("log")
    pages.open(f"runs/flow-run/{train.id}", "done: train:", tab="Artifacts")
    pages.keep("artifacts")
    pages.open(
        f"artifacts/artifact/{artifact('saeflow-result')}", "saeflow ask search_token the", "variance unexplained"
    )
    pages.window.wait_for_function("[...document.images].some(i => i.src.startsWith('data:') && i.naturalWidth > 300)")
    pages.keep("result", 1200)
    pages.open(f"artifacts/artifact/{artifact('saeflow-pipeline-numbers')}", "n_tokens", f"{n_tokens(finished):,}")
    failed = newest("saeflow-pipeline", "tight")
    pages.open(f"runs/flow-run/{failed.id}", failed.name, "Failed", *refused.splitlines())
    assert pages.count("text=Traceback") == 0
    pages.keep("failed")
    for key in ("saeflow-hostile-numbers", "saeflow-hostile"):
        pages.open(f"artifacts/artifact/{artifact(key)}", HOSTILE)
        assert pages.count("[src*=evil], [href*=evil]") == 0, f"{key} has an active link or image"


def n_tokens(run: FlowRun) -> int:
    """What the store of a finished run holds."""
    recipe, store = Recipe.model_validate(run.parameters["recipe"]), Store.open(run.parameters["store"])
    return Lineage(store, recipe).tokens.published().total("n_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.pages", description=__doc__)
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "pages", help="folder of the pictures")
    into = parser.parse_args().into
    into.mkdir(parents=True, exist_ok=True)
    reporting.PROGRESS_SECONDS, reporting.LOG_SECONDS = 0.5, 1.0  # the run is short
    with tempfile.TemporaryDirectory(prefix="saeflow-pages-") as temporary:
        folder = Path(temporary)
        with (
            prefect_server(folder / "prefect", pages=True) as server,
            temporary_settings({PREFECT_API_URL: server.api}),
        ):
            refused = run_all(folder)
            time.sleep(3)  # logs and events are sent from time to time
            with browser(server.url, into) as pages:
                look(pages, refused)
    print(f"all as it should be; pictures in {into}")


if __name__ == "__main__":
    main()
