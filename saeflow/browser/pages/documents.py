"""The documents of a run, and one document shaded by a feature or by the number of features."""

from __future__ import annotations

from typing import Any

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import Panel, with_words
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief

MOST_DOCUMENTS = 50
"""Documents of a page of the list."""

TOKENS_ON_A_PAGE = 1_000
"""Tokens of a page of a document."""

FIELDS = {"text": "key contains", "source": "source", "since": "written since", "until": "written until"}


def index(asked: Asked, opened: OpenedRun) -> Page:
    """Return the documents, a page at a time."""
    chosen = {**asked.given(*FIELDS, "after_id"), "n": MOST_DOCUMENTS}
    answer = Panel("documents", "Documents", "find_documents", chosen).ask(opened)
    is_full = len(answer.rows) == MOST_DOCUMENTS
    later = asked.link(after_id=answer.rows[-1]["document_id"]) if is_full else ""
    return Page("documents.html", "Documents", [answer], opened.run.schema, {"fields": FIELDS, "later": later})


def page(asked: Asked, opened: OpenedRun) -> Page:
    """Return a document shaded by a feature, or by the number of features at each token. Raises UserError."""
    key = asked.path.get("doc", asked.query.get("key", ""))
    found = opened.cursor.execute(
        "select first_token_id, end_token_id from stg_document_places where key = ?", [key]
    ).fetchall()
    if not found:
        raise UserError(f"There is no document {brief(key)!r} with tokens.")
    begin, end = found[0]
    at = asked.count("at", begin, end - 1)
    first = asked.count("first", max(at - begin, 0) // TOKENS_ON_A_PAGE * TOKENS_ON_A_PAGE, end)
    about = {"document_key": key}
    shown = {**about, **asked.given("feature"), "first": first, "n": TOKENS_ON_A_PAGE}
    answers = [
        Panel("text", "Text", "document_tokens", shown, "text").ask(opened),
        Panel("features", "Features that tell it from others", "document_features", {**about, "n": 30}).ask(opened),
    ]
    answers = with_words(answers, opened)
    steps = {
        "before": asked.link(first=max(first - TOKENS_ON_A_PAGE, 0), at=None) if first else "",
        "after": asked.link(first=first + TOKENS_ON_A_PAGE, at=None) if begin + first + TOKENS_ON_A_PAGE < end else "",
    }
    more: dict[str, Any] = {"key": key, "steps": steps, "at": at if "at" in asked.query else None, "data": {"key": key}}
    return Page("document.html", f"Document {key}", answers, opened.run.schema, more)
