"""Pages of features, documents and tokens: filters, labels, bands, hostile texts."""

from __future__ import annotations

import urllib.parse
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from starlette.testclient import TestClient

from saeflow.browser.server import application
from tests.browser.conftest import ADDRESS
from tests.browser.test_panels import PAGES, UNDER_FILTER
from tests.browser.test_server import run_of
from tests.support.small_store import Document, Given

HOSTILE = [
    b"<script>alert(1)</script>", b"</bdi>", b"\x1b[31m", b"\0", "\u202eabc".encode(), b"\n", b" ", b"&amp;",
    b'"onload="', b"\xc3", b"\xa9",
]  # fmt: skip
LONG = b"x" * 1_000_000
KEYS = [
    "a/b/../c",
    "q?x=1&feature=9#t1",
    '"><script>',
    "quote'\"",
    "日本/ü ñ",
    "ends.json",
    " spaces ",
    "%2F%00",
    "\u202ertl",
]


class Strict(HTMLParser):
    """Collects what the pages' policy forbids: scripts and styles inside a page."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "style" or "style" in given or any(name.startswith("on") for name in given):
            self.forbidden.append(self.get_starttag_text() or tag)
        if tag == "script" and given.get("type") != "application/json" and not (given.get("src") or "").startswith("/"):
            self.forbidden.append(self.get_starttag_text() or tag)
        if (given.get("href") or "").lower().startswith("javascript"):
            self.forbidden.append(self.get_starttag_text() or tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(html: str) -> Strict:
    found = Strict()
    found.feed(html)
    return found


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """Pages of a store of hostile texts and keys. Feature 0 fires everywhere."""
    documents = [Document(key, "<b>source</b>", HOSTILE) for key in KEYS] + [Document("long", "s", [LONG, LONG])]
    n_tokens = len(KEYS) * len(HOSTILE) + 2
    given = Given(documents, [(token, 0, 1.0 + token) for token in range(n_tokens)], name="hostile")
    return TestClient(application(given.write(tmp_path_factory.mktemp("hostile") / "store")), base_url=ADDRESS)


def html_pages() -> list[str]:
    return [page.replace(".json", "") or "/" for page in PAGES]


@pytest.mark.parametrize("address", [*html_pages(), "/runs/{run}/compare", "/runs/{run}/tokens", "/runs/{run}/try"])
def test_a_page_has_no_script_and_no_style_inside(pages: TestClient, address: str):
    answer = pages.get(address.format(run=run_of(pages)))
    assert answer.status_code == 200
    assert parsed(answer.text).forbidden == []


@pytest.mark.parametrize("page", ["features/0?all=1", "features/0/bands", "tokens-at/1", "tokens?text=%3C", "docs"])
def test_hostile_texts_stay_text_and_short(hostile: TestClient, page: str):
    answer = hostile.get(f"/runs/{run_of(hostile)}/{page}")
    assert answer.status_code == 200
    found = parsed(answer.text)
    assert found.forbidden == []
    assert not set("\x1b\0\u202e") & set(answer.text)
    assert len(answer.text) < 200_000


@pytest.mark.parametrize("key", KEYS)
def test_a_document_of_any_key_has_a_page(hostile: TestClient, key: str):
    here = f"/runs/{run_of(hostile)}"
    answer = hostile.get(f"{here}/doc", params={"key": key, "feature": 0})
    assert answer.status_code == 200
    found = parsed(answer.text)
    assert found.forbidden == []
    text = "".join(found.texts)
    assert "<script>alert(1)</script>" in text
    assert "é" in text  # a letter of two tokens
    links = hostile.get(f"{here}/docs").text
    assert f"{here}/doc?{urllib.parse.urlencode({'key': key})}" in links.replace("&amp;", "&")


def test_a_document_is_shaded_by_the_number_of_features_or_by_one(pages: TestClient):
    here = f"/runs/{run_of(pages)}"
    key = pages.get(f"{here}/docs.json").json()["panels"]["documents"]["rows"][0]["key"]
    rows = pages.get(f"{here}/doc.json", params={"key": key}).json()["panels"]["text"]["rows"]
    assert max(row["n_features"] or 0 for row in rows) > 0
    assert all(row["value"] is None for row in rows)
    by_path = pages.get(f"{here}/docs/{key}.json").json()["panels"]["text"]["rows"]
    assert by_path == rows
    strongest = pages.get(f"{here}/features/1.json").json()["panels"]["examples"]["rows"][0]
    shown = pages.get(f"{here}/doc", params={"key": strongest["key"], "feature": 1, "at": strongest["token_id"]})
    assert f'id="t{strongest["token_id"]}"' in shown.text
    assert 'class="v9"' in shown.text


def test_the_filter_in_force_is_shown_and_in_the_json(pages: TestClient):
    address = f"/runs/{run_of(pages)}/features/1"
    html, json = pages.get(f"{address}?{UNDER_FILTER}").text, pages.get(f"{address}.json?{UNDER_FILTER}").json()
    assert json["filter"] == {"source": "tales", "threshold": "0.1", "without_feature": "2"}
    in_force = html.partition('class="filter-in-force"')[2].partition("</p>")[0]
    assert all(word in in_force for word in ("source", "tales", "value above", "0.1", "is silent"))
    assert html.count("The filter does not change this panel.") == 3  # next tokens, similar directions, labels
    assert "filter-in-force" not in pages.get(f"{address}?threshold=0&source=").text
    for panel in ("numbers", "values", "examples"):
        assert json["panels"][panel]["arguments"]["source"] == "tales"


def test_a_filter_changes_every_number_of_a_panel(pages: TestClient):
    address = f"/runs/{run_of(pages)}/features/1.json?all=1"
    whole, part = (pages.get(address + more).json()["panels"] for more in ("", "&source=tales"))
    assert part["numbers"]["rows"][0]["n_tokens"] < whole["numbers"]["rows"][0]["n_tokens"]
    assert {row["source"] for row in part["examples"]["rows"]} == {"tales"}
    assert {row["source"] for row in part["documents"]["rows"]} == {"tales"}
    assert sum(row["n_tokens"] for row in part["values"]["rows"]) == part["numbers"]["rows"][0]["n_tokens"]


def test_examples_lie_inside_their_band(pages: TestClient):
    rows = pages.get(f"/runs/{run_of(pages)}/features/1.json").json()["panels"]["examples"]["rows"]
    bands = [row for row in rows if row["part"] == "band"]
    assert len({row["band"] for row in bands}) > 1
    assert all(row["low_value"] <= abs(row["value"]) <= row["high_value"] for row in bands)
    edges = sorted({(row["band"], row["low_value"], row["high_value"]) for row in bands})
    assert all(weaker[2] <= stronger[1] for stronger, weaker in pairwise(edges))


def test_a_token_says_its_value_to_pointer_keyboard_and_screen_reader(pages: TestClient):
    address = f"/runs/{run_of(pages)}/features/1"
    row = pages.get(f"{address}.json").json()["panels"]["examples"]["rows"][0]
    assert f'tabindex="0">{row["pieces"][row["place"] - 1]}<i> {row["value"]:.4g}</i></mark>' in pages.get(address).text


def test_panels_that_come_later_are_a_link_away(pages: TestClient):
    address = f"/runs/{run_of(pages)}/features/1"
    html = pages.get(f"{address}?source=tales").text
    for panel in ("near_misses", "entries", "documents", "sources", "companions"):
        there = f"{address}/{panel}?source=tales"
        assert f'href="{there}"' in html
        assert f'id="{panel}"' in pages.get(there).text


@pytest.mark.parametrize(
    "wrong", ["features/1/no", "features/1?before=x", "features/1?source=nowhere", "features/1?since=never",
              "features/1?with_feature=99999999999999999999", "features/1?threshold=nan", "compare?a=1&b=-1",
              "docs/no", "doc?key=no",
              "compare?a=1&b=99999999999999999999", "tokens/-1", "tokens/99999999", "tokens/x", "tokens-at/99999999999",
              "selection?tokens=x", "selection?tokens=1,x", "selection?tokens=99999999999999999999",
              f"selection?tokens={','.join(map(str, range(101)))}",
              "tokens-at/'", "docs?after_id=x", "doc?key=tales/000&feature=x", "features/1?role=nobody"],
)  # fmt: skip
def test_a_wrong_word_is_said_with_a_way_back(pages: TestClient, wrong: str):
    answer = pages.get(f"/runs/{run_of(pages)}/{wrong}")
    assert answer.status_code == 404
    assert '<a href="/">' in answer.text


def test_the_list_of_documents_goes_on_where_it_stopped(hostile: TestClient):
    address = f"/runs/{run_of(hostile)}/docs.json"
    rows = hostile.get(address).json()["panels"]["documents"]["rows"]
    rest = hostile.get(f"{address}?after_id={rows[3]['document_id']}").json()["panels"]["documents"]["rows"]
    assert rest == rows[4:]


def test_a_text_of_ones_own_is_read_by_the_model(pages: TestClient):
    address = f"/runs/{run_of(pages)}/try.json"
    rows = pages.get(address, params={"text": "the sea"}).json()["panels"]["features"]["rows"]
    assert rows
    assert "there" in pages.get(address, params={"text": "the sea", "model": "/nowhere"}).json()["problem"]


def test_the_contexts_of_a_page_begin_the_panels_that_they_lead_to(pages: TestClient):
    here = f"/runs/{run_of(pages)}"
    stats = pages.get(f"{here}/ask/feature_summary.json").json()["panels"]["rows"]["rows"]
    often = sorted(stats, key=lambda row: -row["n_tokens"])
    for feature in (often[0]["feature_id"], often[len(often) // 2]["feature_id"]):
        rows = pages.get(f"{here}/features/{feature}.json").json()["panels"]["examples"]["rows"]
        for part, ask in (("strongest", "feature_contexts.json?n=8"), ("band", "feature_bands.json?bands=5&n=2")):
            whole = pages.get(f"{here}/ask/{ask}&feature={feature}").json()["panels"]["rows"]["rows"]
            mine = [row for row in rows if row["part"] == part]
            assert [{name: row[name] for name in whole[0]} for row in mine] == whole
