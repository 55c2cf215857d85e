"""Pages that stay open while the store changes: every answer is of one generation, the one of that time."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from saeflow.browser.connections import MOST_OPEN, Connections, OpenedRun
from saeflow.browser.server import Application
from saeflow.pipeline.lifecycle.forget import forget
from saeflow.query.runs import Run
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.browser.conftest import ADDRESS
from tests.conftest import Finished
from tests.faults.open_pages import OpenPages
from tests.faults.states import Command, Seen, States, comparable, copy_by_links
from tests.support.small_pipeline import quiet

PAGES = ("/runs/small/ask/feature_summary.json", "/runs/small/doc?key=tales/000")


@pytest.fixture
def store(finished: Finished, tmp_path: Path) -> Store:
    """A copy of the finished store."""
    shutil.copytree(finished.store.root, tmp_path / "store")
    return Store.open(tmp_path / "store")


def test_an_answer_of_an_old_or_of_no_generation_would_be_found(store: Store, tmp_path: Path) -> None:
    pages = TestClient(Application(store).app, base_url=ADDRESS)
    commands = [noted("begin", store, tmp_path)]
    seen = [loaded(pages, store, path) for path in PAGES]
    began = time.time()
    forget(store, ["tales/000"], quiet())
    commands.append(noted("forget", store, tmp_path, began))
    seen += [loaded(pages, store, path) for path in PAGES]
    assert [each.status for each in seen] == [200, 200, 200, 404]
    states = States(commands, PAGES)
    assert states.wrong(seen) == []
    for text in (seen[0].text, seen[2].text.replace("1", "2", 1)):
        (problem,) = states.wrong([*seen, replace(seen[2], text=text)])
        assert problem.startswith(PAGES[0])


def noted(name: str, store: Store, folder: Path, began: float = 0.0) -> Command:
    copy_by_links(Path(store.root), folder / f"copy-{name}")
    return Command(name, began, time.time(), folder / f"copy-{name}")


def loaded(pages: TestClient, store: Store, path: str) -> Seen:
    asked = time.time()
    answer = pages.get(path)
    return Seen(path, asked, time.time(), answer.status_code, comparable(answer.text, store.name))


def test_a_run_that_vanishes_is_not_found_and_the_list_shows_the_others(store: Store) -> None:
    pages = TestClient(Application(store).app, base_url=ADDRESS)
    assert pages.get("/runs/small/features/1").status_code == 200
    (run,) = (Path(store.root) / "features").iterdir()
    (run / "manifest.json").unlink()
    assert pages.get("/runs/small/features/1").status_code == 404
    shutil.rmtree(run)
    for path in ("/runs/small", "/runs/small/features/1", "/runs/small/ask/feature_summary.csv"):
        answer = pages.get(path)
        assert answer.status_code == 404
        assert '<a href="/">' in answer.text or path.endswith(".csv")
    assert pages.get("/").status_code == 200


def test_names_of_no_run_close_no_run_that_is_open(store: Store) -> None:
    connections = Connections(store)
    pages = TestClient(Application(store, connections=connections).app, base_url=ADDRESS)
    with connections.opened("small") as opened:
        before = opened.run
    for i in range(2 * MOST_OPEN):
        assert pages.get(f"/runs/no-{i}").status_code == 404
    with connections.opened("small") as opened:
        assert opened.run is before


def test_a_page_whose_files_go_while_it_is_made_is_made_from_those_that_took_their_place(store: Store) -> None:
    connections, tries = Connections(store), 0
    (manifest,) = Path(store.root).glob("features/*/manifest.json")

    def make(opened: OpenedRun) -> Run:
        nonlocal tries
        tries += 1
        if tries == 1:
            os.utime(manifest)
        if tries < 3:
            raise UserError("A file is gone.")
        return opened.run

    with pytest.raises(UserError, match="A file is gone"):  # the second time, when nothing had changed
        connections.ask(make, "small")
    assert tries == 2
    assert connections.ask(make, "small").schema == "small"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_pages_answer_from_one_generation_at_a_time_while_commands_change_the_store(tmp_path: Path) -> None:
    assert OpenPages(tmp_path).watch(30) == []
