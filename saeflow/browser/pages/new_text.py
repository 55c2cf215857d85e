"""A text of one's own through the run's model and SAE."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import LONGEST_TEXT, Answer, Panel, with_words
from saeflow.runtime.errors import UserError

ABOUT_TEXT = "Each token says its value or number, and leads to the features of that token in the corpus."


def page(asked: Asked, opened: OpenedRun) -> Page:
    """Return the text shaded, with the features that fire on it, or what to do if the model is not on this machine."""
    given, feature = asked.given("text", "model"), asked.given("feature")
    answers, message = list[Answer](), ""
    if "text" in given:
        try:
            shaded = f"Shaded by feature {asked.query['feature']}" if feature else "Shaded by the number of features"
            panels = [
                Panel("text", shaded, "text_tokens", {**given, **feature}, "read_text", about=ABOUT_TEXT),
                Panel("features", "Features", "features_of_text", {**given, "n": 50}, "read_features"),
            ]
            answers = with_words([panel.ask(opened) for panel in panels], opened)
        except UserError as error:
            message = str(error)
    more = {"message": message, "longest": LONGEST_TEXT, "data": {"problem": message} if message else {}}
    return Page("try.html", "Try a text", answers, opened.run.schema, more)
