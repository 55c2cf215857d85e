"""A static copy of a run's pages: whole, self-contained, and gone on with after a kill."""

from __future__ import annotations

import json
import posixpath
import shutil
from pathlib import Path

import pytest

from saeflow.browser.connections import opened_alone
from saeflow.browser.export import EXPORT_FILES, Export, choose_features
from saeflow.browser.output import OutputFolder
from saeflow.store.store import Store
from tests.browser.test_report import HOSTILE, Page, outside
from tests.conftest import Finished
from tests.support.chromium import CHROMIUM, window
from tests.support.command import Command
from tests.support.small_store import Document, Given

ONLY = [0, 3, 5]


def write(store: Store, path: Path, features: list[int], stop_after: int = 1000) -> Path:
    left = stop_after

    def advance(n: int) -> None:
        nonlocal left
        left -= n
        if not left:
            raise KeyboardInterrupt

    with opened_alone(store, None) as opened:
        folder = OutputFolder(path, "export", EXPORT_FILES)
        folder.prepare()
        Export(opened, choose_features(opened, features, 0)).write(folder, advance)
    return path


@pytest.fixture(scope="module")
def exported(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of three features; do not write there."""
    return write(finished.store, tmp_path_factory.mktemp("export") / "e", ONLY)


def pages_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.html"))


def test_an_export_has_the_run_and_a_page_of_each_feature(exported: Path):
    names = {path.relative_to(exported).as_posix() for path in pages_of(exported)}
    assert names >= {"index.html", "about.html", *(f"features/{feature}.html" for feature in ONLY)}
    assert not any(name.startswith("features/") and int(Path(name).stem) not in ONLY for name in names)


def test_every_link_of_an_export_leads_to_a_file_of_it(exported: Path):
    for path in pages_of(exported):
        for lead in Page(path).leads:
            target, _, part = lead.partition("#")
            if target.startswith("data:"):
                continue
            assert not target.startswith(("/", "?")), (path.name, lead)
            file = exported / posixpath.normpath(posixpath.join(path.parent.relative_to(exported).as_posix(), target))
            file = file if target else path
            assert file.is_file(), (path.name, lead)
            assert not part or f'id="{part}"' in file.read_text("utf-8"), (path.name, lead)


def test_an_export_names_no_other_machine_and_fetches_nothing(exported: Path):
    for path in pages_of(exported):
        text = path.read_text("utf-8")
        assert outside(text) == [], path.name
        assert '"url":' not in text, path.name
        assert "Content-Security-Policy" in text
        assert "This file holds text of the corpus" in text
        assert "<form" not in text


def test_the_rows_of_an_exported_page_are_those_of_its_server(exported: Path, pages):
    html = pages.get("/runs/small/features/3?all=1").text
    copy = (exported / "features" / "3.html").read_text("utf-8")
    contexts = html.partition('<section class="panel" id="examples"')[2].partition("</section>")[0]
    assert (
        contexts.count("<li>")
        == copy.partition('<section class="panel" id="examples"')[2].partition("</section>")[0].count("<li>")
        > 0
    )


@pytest.mark.long
def test_an_export_that_was_stopped_goes_on_where_it_was(finished: Finished, exported: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        write(finished.store, tmp_path / "e", ONLY, stop_after=4)
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "e").rglob("*") if path.is_file()}
    assert 0 < len(begun) < len(list(exported.rglob("*")))
    (tmp_path / "e" / ".about.html.new").write_text("half")
    write(finished.store, tmp_path / "e", ONLY)
    assert {path: path.stat().st_mtime_ns for path in begun} == begun
    for path in pages_of(exported):
        assert (tmp_path / "e" / path.relative_to(exported)).read_bytes() == path.read_bytes()


def test_an_export_of_other_features_takes_the_place_of_an_earlier_one(
    finished: Finished, exported: Path, tmp_path: Path
):
    shutil.copytree(exported, tmp_path / "e")
    (tmp_path / "e" / "notes.txt").write_text("mine")
    write(finished.store, tmp_path / "e", [1])
    assert [path.name for path in (tmp_path / "e" / "features").iterdir()] == ["1.html"]
    assert (tmp_path / "e" / "notes.txt").read_text() == "mine"


def test_export_says_where_it_is_how_large_and_what_it_holds(saeflow: Command, finished: Finished, tmp_path: Path):
    said = saeflow("export", "small", "--features", 2, "--store", finished.store.root)
    assert said.code == 0, said.err
    folder = tmp_path / "export-small"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert "export-small/index.html" in said.out
    assert f"{len(files)} files" in said.out
    assert f"({sum(path.stat().st_size for path in files):,} bytes)" in said.out
    assert "text of the corpus" in said.err
    features = json.loads((folder / "saeflow.json").read_text())["features"]
    assert {f"features/{feature}.html" for feature in features} <= set(Page(folder / "features.html").leads)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "3,x"], "--only is '3,x', but it must be whole numbers"),
        (["--only", "99999"], "There is no feature 99999"),
        (["-o", "."], "is not empty, and holds no earlier export"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_said_before_anything_is_written(
    saeflow: Command, finished: Finished, tmp_path: Path, arguments, says
):
    (tmp_path / "mine.txt").write_text("mine")
    said = saeflow("export", "small", "--store", finished.store.root, *arguments)
    assert (said.code, says in said.err) == (2, True), said.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_hostile_text_stays_text_in_an_export(tmp_path: Path):
    given = Given(
        documents=[Document("<blink>key</blink>", "<marquee>source</marquee>", HOSTILE)],
        values=[(0, 0, 1.0), (1, 0, 2.0), (2, 1, 1.0), (3, 1, 2.0)],
    )
    for path in pages_of(write(given.write(tmp_path / "store"), tmp_path / "e", [0, 1])):
        assert not {"img", "blink", "marquee"} & set(Page(path).tags)
        assert "<script>" not in path.read_text("utf-8")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_an_export_opens_from_the_disk_and_draws_its_charts_without_a_message(exported: Path, tmp_path: Path):
    with window(tmp_path / "chromium") as page:
        for path in pages_of(exported):
            page.open(path.as_uri())
            page.wait(
                "document.querySelectorAll('figure.chart').length == document.querySelectorAll('figure.drawn').length"
            )
        page.open((exported / "index.html").as_uri())
        page.press("?")
        page.wait("location.pathname.endsWith('about.html')")
        assert page.messages == []
        assert {url.partition(":")[0] for url in page.requests} <= {"file", "data", "about"}
