"""A text of one's own through the run's model and SAE."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import Answer, Panel
from saeflow.runtime.errors import UserError

LONGEST_TEXT = 5_000
"""Characters of a text that a page reads."""


def page(asked: Asked, opened: OpenedRun) -> Page:
    """Return the features that fire on the text, or what to do if the model is not on this machine."""
    given, answers, message = asked.given("text", "model"), list[Answer](), ""
    if "text" in given:
        try:
            if len(str(given["text"])) > LONGEST_TEXT:
                raise UserError(f"The text is longer than {LONGEST_TEXT:,} characters. Ask in a terminal: saeflow ask.")
            answers = [Panel("features", "Features", "features_of_text", {**given, "n": 50}).ask(opened)]
        except UserError as error:
            message = str(error)
    more = {"message": message, "longest": LONGEST_TEXT, "data": {"problem": message} if message else {}}
    return Page("try.html", "Try a text", answers, opened.run.schema, more)
