"""A run in a notebook: what is shown is what the questions answer, loads nothing, and obeys no text."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import saeflow
from saeflow.browser.notebook import NotebookRun, Shown
from tests.conftest import Finished
from tests.support.hostile_text import ACTS, HOSTILE
from tests.support.small_store import Document, Given

MARKUP = ["<script>alert(1)</script>", "</style></div><img src=https://evil.example/x.png onerror=alert(1)>", HOSTILE]
UNDER_FILTER = {"source": "tales", "threshold": 0.1, "without_feature": 2}


@pytest.fixture(scope="module")
def run(finished: Finished) -> Iterator[NotebookRun]:
    with saeflow.open(finished.store.root) as opened:
        yield opened


class Output(HTMLParser):
    """Tags, attributes and text of an output. Fails if a tag is closed that is not open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: dict[str, list[str | None]] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value)
        if tag in ("div", "section", "style", "table", "svg", "ol"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("div", "section", "style", "table", "svg", "ol"):
            assert self.open.pop() == tag


def read(shown: Shown) -> Output:
    found = Output(shown._repr_html_())
    assert found.open == []
    return found


def loads_nothing(html: str) -> bool:
    addresses = [
        each for each in re.findall(r"https?://[^\s\"'<>]+", html) if not each.startswith("http://www.w3.org/")
    ]
    return not addresses and not re.search(r"url\(|@import|<link|<script|<iframe|<img", html)


def test_an_open_run_shows_a_feature_with_the_panels_of_its_page(run: NotebookRun) -> None:
    shown = run.feature(1)
    html = shown._repr_html_()
    assert {"numbers", "values", "logits", "similar", "companions", "examples"} <= set(shown.tables)
    for title in ("Feature 1", "Numbers", "Values", "Next tokens", "Similar directions", "Contexts", "Near misses"):
        assert f"<bdi>{title}</bdi>" in html
    assert "<svg" in html
    assert "<mark" in html
    assert not re.search(r">(more|vs)<", html), "a link to a page that only a server has"
    assert loads_nothing(html)
    assert not read(shown).attributes.keys() & {"href", "src", "action", "style"}
    assert repr(shown).startswith("<Feature 1 of saeflow run 'small': numbers, values, ")


@pytest.mark.parametrize("filter", [{}, UNDER_FILTER], ids=["whole", "filtered"])
def test_what_is_shown_is_what_its_sql_answers(run: NotebookRun, filter: dict[str, object]) -> None:
    shown = run.feature(1, **filter)
    for name, answer in shown.page.panels.items():
        assert run.sql(answer.sql.removesuffix(";")).to_pylist() == shown.tables[name].to_pylist(), name
    numbers = run.ask("feature_numbers", 1, **filter).to_pylist()
    assert shown.tables["numbers"].to_pylist() == numbers
    assert ("Filter in force" in shown._repr_html_()) == bool(filter)


def test_a_run_is_opened_without_waiting_for_torch_or_a_picture(finished: Finished) -> None:
    heavy = "('torch', 'transformers', 'altair', 'vl_convert', 'matplotlib', 'zarr')"
    opens = f"import sys, saeflow; saeflow.open({str(finished.store.root)!r})"
    code = f"{opens}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_features_are_a_table_with_a_small_histogram_for_each(run: NotebookRun) -> None:
    shown = run.features(n=5, sort="density")
    html = shown._repr_html_()
    assert shown.tables["features"].num_rows == 5
    assert html.count('<svg class="tiny"') == sum(map(bool, shown.tables["features"].column("histogram").to_pylist()))
    assert shown.tables["features"].to_pylist() == run.ask("find_features", n=5, sort="density").to_pylist()
    assert loads_nothing(html)
    assert "No rows" in run.features("a text that is nowhere")._repr_html_()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda run: run.feature(9999), "There is no feature 9999; features go from 0 to 63"),
        (lambda run: run.feature("x"), "must be a whole number"),
        (lambda run: run.feature(1, sourc="tales"), r"not filtered by 'sourc'\. Did you mean source"),
        (lambda run: run.feature(1, threshold="much"), "threshold"),
        (lambda run: run.features(sort="beauty"), "sort is 'beauty'"),
        (lambda run: run.features(colour="red"), "no parameter 'colour'"),
    ],
    ids=["no feature", "no number", "no filter", "no threshold", "no order", "no parameter"],
)
def test_what_cannot_be_shown_is_a_user_s_error(run: NotebookRun, asked: object, message: str) -> None:
    with pytest.raises(saeflow.UserError, match=message):
        asked(run)  # type: ignore[operator]


@pytest.mark.parametrize("text", MARKUP, ids=["script", "end of the style", "escape codes"])
def test_text_of_a_corpus_stays_text(text: str, tmp_path: Path) -> None:
    documents = [Document(text, text, [text.encode(), b" x", text.encode()])]
    store = Given(documents=documents, values=[(0, 0, 1.0), (1, 0, 0.5), (2, 1, 2.0)]).write(tmp_path)
    with saeflow.open(store.root) as run:
        for shown in (run.feature(0), run.features()):
            html, found = shown._repr_html_(), read(shown)
            assert loads_nothing(html.replace("https://evil.example/x.png", ""))
            assert not found.tags & {"script", "img", "a", "form"}
            assert not [name for name in found.attributes if name.startswith("on") or name in ("src", "href", "style")]
            assert not ACTS.search(html.replace("\n", ""))


def test_the_style_touches_nothing_around_the_output(run: NotebookRun) -> None:
    html = run.features(n=1)._repr_html_()
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style.startswith(".saeflow {")
    depth = 1
    for letter in style.strip()[len(".saeflow {") : -1]:
        depth += (letter == "{") - (letter == "}")
        assert depth > 0
    assert (depth, style.strip()[-1]) == (1, "}")
    assert "body" not in style
    assert ":root" not in style
    assert html.strip().startswith('<div class="saeflow">')
    assert html.strip().endswith("</div>")
