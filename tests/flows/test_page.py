"""Markdown for Prefect's pages: what others wrote stays text, whatever it is made of."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from flows.support import page

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")

HOSTILE = [
    "![x](https://evil.example/pixel.png)",
    "[click](javascript:alert(1))",
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "https://evil.example/bare",
    "<https://evil.example>",
    "a | b | c",
    "# heading\n\n- list\n\n```\ncode",
    "`code` **bold** _emphasis_ ~~gone~~",
    "    indented",
    "1. one",
    "&lt;b&gt; &#60;b&#62;",
    "\x1b[31mred \u202eesrever\u2066",
]


def rendered(markdown: str) -> tuple[set[str], str]:
    """Kinds of the elements that markdown makes, and the text that is read."""
    kinds, text = set(), ""
    for token in MARKDOWN.parse(markdown):
        kinds.add(token.type)
        for child in token.children or []:
            kinds.add(child.type)
            text += child.content
    return kinds, text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_makes_no_element(text: str) -> None:
    kinds, read = rendered(page.plain(text))
    assert kinds <= {"paragraph_open", "paragraph_close", "inline", "text", "text_special"}
    assert read == page.sanitise(text).strip()
    assert "://" not in page.plain(text)


@given(st.text(max_size=60))
def test_any_text_is_read_as_it_was_written(text: str) -> None:
    kinds, read = rendered("x" + page.plain(text))
    assert kinds <= {"paragraph_open", "paragraph_close", "inline", "text", "text_special"}
    assert read == "x" + page.sanitise(text).strip()


def test_a_hostile_cell_stays_in_its_cell() -> None:
    html = MARKDOWN.render(page.table({"judged on": "a | b | <img src=x> ![y](z)", "n_tokens": 12_345, "bytes": 2048}))
    assert html.count("<td") == 6
    assert "<img" not in html
    assert "12,345" in html
    assert "2.0 KiB" in html


def test_a_command_cannot_leave_its_block() -> None:
    html = MARKDOWN.render(page.commands(["saeflow ask --store '/tmp/a\n```\n<img src=x>'", "saeflow ls"]))
    assert html.count("<pre>") == 1
    assert "<img" not in html
    assert html.rstrip().endswith("saeflow ls\n</code></pre>")


def test_a_picture_is_in_the_page_and_its_path_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "](x) ![evil](https:evil.example).png"
    path.write_bytes(b"picture")
    html = MARKDOWN.render(page.picture("density", path))
    assert html.count("<img") == 1
    assert base64.b64encode(b"picture").decode() in html
    assert "evil" in html


def test_a_large_picture_is_named_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "pareto.png"
    path.write_bytes(bytes(page.PICTURE_BYTES + 1))
    assert page.picture("sweep", path) == page.plain(str(path))
