"""A report of a run, and its pictures, as files."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import saeflow
from saeflow.browser import report
from saeflow.browser.connections import opened_alone
from saeflow.browser.output import OutputFolder
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.chromium import CHROMIUM, window
from tests.support.command import Command
from tests.support.small_store import Document, Given

HOSTILE = [
    b"<script>alert(1)</script>",
    b"</style><img src=https://evil.example/x.png>",
    b"\x1b[2J\x07\x00",
    "\u202e}}{{7*7}}".encode(),
]


def write(store: Store, folder: Path) -> Path:
    with opened_alone(store, None) as opened:
        target = OutputFolder(folder, "report", report.REPORT_FILES)
        target.prepare()
        report.write_report(opened, target, lambda _: None)
    return folder


@pytest.fixture(scope="module")
def reported(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(finished.store, tmp_path_factory.mktemp("report") / "r")


class Page(HTMLParser):
    """What a page loads and where it leads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.leads: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.leads += [value or "" for name, value in attrs if name in ("href", "src", "action", "xlink:href")]


def outside(text: str) -> list[str]:
    """Return addresses of other machines, but names of schemas."""
    found = re.findall(r"https?://[^\s\"'<>]+", text)
    return [each for each in found if not each.startswith(("http://www.w3.org/", "https://vega.github.io/schema/"))]


def test_a_report_is_one_file_that_loads_nothing(reported: Path):
    page, text = Page(reported / "report.html"), (reported / "report.html").read_text("utf-8")
    assert "script" not in page.tags
    assert outside(text) == []
    assert all(lead.startswith(("#", "data:")) for lead in page.leads)
    assert {f'id="{lead[1:]}"' in text for lead in page.leads if lead.startswith("#")} == {True}
    assert "default-src &#39;none&#39;" in text
    assert "This file holds text of the corpus" in text


def test_each_number_of_a_report_is_its_statements_answer(finished: Finished):
    with opened_alone(finished.store, None) as opened, saeflow.open(finished.store.root) as run:
        for answer in report.ask_for_report(opened):
            assert run.sql(answer.sql.removesuffix(";")).to_pylist() == answer.rows, answer.panel.name


def test_a_report_shows_measures_settings_and_the_most_telling_features(reported: Path, finished: Finished):
    text = (reported / "report.html").read_text("utf-8")
    with saeflow.open(finished.store.root) as run:
        assert f"{run.ask('metrics').to_pylist()[0]['value']:.4g}" in text
        found = run.ask("find_features", n=20).to_pylist()
        features = [row["feature_id"] for row in found if row["n_tokens"]]
    assert [int(each) for each in re.findall(r'<section class="panel" id="feature-(\d+)"', text)] == features
    assert "train.<bdi>n_tokens</bdi>" in text  # of the small recipe, not the default


def test_pictures_are_svg_and_png(reported: Path):
    names = {path.name for path in (reported / "pictures").iterdir()}
    drawn = {panel.name for panel in report.REPORT_PANELS if panel.view not in ("table", "changed", "listed")}
    assert names == {f"{name}.{ending}" for name in drawn for ending in ("svg", "png")}
    for path in (reported / "pictures").iterdir():
        content = path.read_bytes()
        assert content.startswith(b"<svg" if path.suffix == ".svg" else b"\x89PNG\r\n")
        assert path.suffix == ".png" or outside(content.decode()) == []


def test_hostile_text_stays_text_in_a_report(tmp_path: Path):
    given = Given(
        documents=[Document("<blink>key</blink>", "<marquee>source</marquee>", HOSTILE)],
        values=[(0, 0, 1.0), (1, 0, 2.0), (2, 1, 1.0), (3, 1, 2.0)],
    )
    page = write(given.write(tmp_path / "store"), tmp_path / "r") / "report.html"
    text = page.read_text("utf-8")
    assert not {"script", "img", "blink", "marquee"} & set(Page(page).tags)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", text)


def test_a_report_says_where_it_is_how_large_and_what_it_holds(
    saeflow: Command, reported: Path, finished: Finished, tmp_path: Path
):
    said = saeflow("report", "small", "--store", finished.store.root, "-o", "there")
    assert said.code == 0, said.err
    files = [path for path in (tmp_path / "there").rglob("*") if path.is_file()]
    n_bytes = sum(path.stat().st_size for path in files)
    assert "there/report.html" in said.out
    assert f"{len(files)} files" in said.out
    assert f"({n_bytes:,} bytes)" in said.out
    assert "text of the corpus" in said.err
    for path in files:  # the same run gives the same report
        assert path.read_bytes() == (reported / path.relative_to(tmp_path / "there")).read_bytes()


def test_a_report_goes_into_no_folder_of_somebody_else(saeflow: Command, finished: Finished, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    said = saeflow("report", "small", "--store", finished.store.root, "-o", "mine")
    assert said.code == 2
    assert "mine is not empty, and holds no earlier report" in said.err
    assert saeflow("report", "small", "--store", finished.store.root, "-o", "mine/notes.txt").code == 2
    assert "--set and --member change a recipe" in saeflow("report", "small", "--set", "sae.k=3").err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_report_opens_from_the_disk_without_a_message(reported: Path, tmp_path: Path):
    with window(tmp_path / "chromium") as page:
        page.open((reported / "report.html").as_uri())
        assert page.value("document.querySelectorAll('figure.picture svg').length") == len(
            list(reported.glob("pictures/*.svg"))
        )
        assert page.messages == []
        assert {url.partition(":")[0] for url in page.requests} <= {"file", "data", "about"}
