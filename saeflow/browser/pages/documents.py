"""The documents of a run, and one document shaded by a feature or by the number of features."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import Panel

MOST_DOCUMENTS = 50
"""Documents of a page of the list."""

FIELDS = {"text": "key contains", "source": "source", "since": "written since", "until": "written until"}


def index(asked: Asked, opened: OpenedRun) -> Page:
    """Return the documents, a page at a time."""
    chosen = {**asked.given(*FIELDS, "after_id"), "n": MOST_DOCUMENTS}
    answer = Panel("documents", "Documents", "find_documents", chosen).ask(opened)
    is_full = len(answer.rows) == MOST_DOCUMENTS
    later = asked.link(after_id=answer.rows[-1]["document_id"]) if is_full else ""
    return Page("documents.html", "Documents", [answer], opened.run.schema, {"fields": FIELDS, "later": later})
