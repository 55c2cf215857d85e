"""A page as a file: where its links lead."""

from __future__ import annotations

import json

import pytest

from saeflow.browser.static_copy import static_copy

FILES = {
    "/runs/a": "index.html",
    "/runs/a/features/3": "features/3.html",
    "/static/x.css": "static/x.css",
    "/?q=1&r=2": "q.html",
}


@pytest.mark.parametrize(
    ("here", "html", "expected"),
    [
        pytest.param("index.html", '<a href="/runs/a/features/3">3</a>', '<a href="features/3.html">3</a>', id="down"),
        pytest.param("features/3.html", '<a href="/runs/a">a</a>', '<a href="../index.html">a</a>', id="up"),
        pytest.param("features/3.html", '<link href="/static/x.css">', '<link href="../static/x.css">', id="style"),
        pytest.param("index.html", '<a href="/runs/a#x">a</a>', '<a href="index.html#x">a</a>', id="fragment"),
        pytest.param("index.html", '<a href="#main">a</a>', '<a href="#main">a</a>', id="same page"),
        pytest.param("index.html", '<a href="/?q=1&amp;r=2">a</a>', '<a href="q.html">a</a>', id="query"),
        pytest.param("index.html", '<a class="c" href="/runs/b">b</a>', '<span class="c">b</span>', id="not exported"),
        pytest.param("index.html", '<a href="https://evil.example/">b</a>', "<span>b</span>", id="elsewhere"),
        pytest.param("index.html", 'x<a href="/runs/a.json">JSON</a>y', "xy", id="format"),
        pytest.param("index.html", '<nav><a href="/no">n</a><a href="/runs/a">a</a></nav>',
                     '<nav><a href="index.html">a</a></nav>', id="navigation"),
        pytest.param("index.html", '<form class="f"><label>L <input></label><p>kept</p><button>B</button></form>',
                     '<div class="f"><p>kept</p></div>', id="form"),
    ],
)  # fmt: skip
def test_links_lead_to_files_or_become_text(here: str, html: str, expected: str):
    assert static_copy(html, here, FILES) == expected


@pytest.mark.parametrize(
    "html",
    [
        "<!doctype html><p title=\"a &amp; b\">&lt;script&gt; &#39;x&#39; 猫 href=\"/runs/a\"</p>",
        '<script type="application/json">{"text": "\\u003c/script\\u003e href=\\"/runs/a\\""}</script>',
        '<svg viewBox="0 0 1 1"><path d="M0,0"/><path d="M1,1"/></svg><br>',
        "<details open><summary>a</summary></details>",
    ],
)  # fmt: skip
def test_what_is_no_link_stays_as_it_is(html: str):
    assert static_copy(html, "index.html", FILES) == html


def test_a_chart_that_fetches_its_rows_gets_them_and_its_points_lead_to_files():
    spec = {"data": {"url": "/runs/a/map.json?n=2", "format": {"type": "json", "property": "points"}},
            "transform": [{"calculate": '"/runs/a/features/" + datum.feature_id', "as": "address"}]}  # fmt: skip
    asked = []

    def rows_at(address: str, inside: str) -> list[dict[str, object]]:
        asked.append((address, inside))
        return [{"feature_id": 3, "label": "</script>"}, {"feature_id": 4, "label": None}]

    html = static_copy(f'<script type="application/json">{json.dumps(spec)}</script>', "map.html", FILES, rows_at)
    assert asked == [("/runs/a/map.json?n=2", "points")]
    assert html.count("</script>") == 1
    found = json.loads(html.partition(">")[2].removesuffix("</script>"))
    assert found["data"] == {"name": "rows"}
    assert [row["address"] for row in found["datasets"]["rows"]] == ["features/3.html", None]
    assert found["transform"] == []
