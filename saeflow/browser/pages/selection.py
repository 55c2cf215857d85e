"""Some tokens that a reader chose, and the features that tell them from the rest: features by example."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import MOST_FEATURES, Panel, with_words
from saeflow.query.questions import parse_whole_numbers
from saeflow.runtime.errors import UserError

MOST_CHOSEN = 100
"""Tokens that a page takes; the script that chooses them stops there, too."""

ABOUT_FEATURES = "The features that fire on these tokens and seldom elsewhere come first."
NO_FEATURES = "No feature fires on a token that is chosen and encoded."
NO_TOKENS = "The corpus has none of these tokens."


def page(asked: Asked, opened: OpenedRun) -> Page:
    """Return the chosen tokens in the text and the features on them, or only the form if none are given."""
    tokens = tokens_in_address(asked)
    answers = []
    if tokens:
        found = [panel.ask(opened) for panel in panels_of_tokens(tokens)]
        answers = with_words(found, opened)
    title = "One token" if len(tokens) == 1 else f"{len(tokens)} tokens" if tokens else "Features by example"
    return Page("selection.html", title, answers, opened.run.schema, {"tokens": tokens, "most": MOST_CHOSEN})


def panels_of_tokens(tokens: list[int]) -> list[Panel]:
    about = {"tokens": tokens}
    features = {**about, "n": MOST_FEATURES}
    return [
        Panel(
            "features",
            "Features that tell them from the rest",
            "features_of_selection",
            features,
            about=ABOUT_FEATURES,
            if_none=NO_FEATURES,
        ),
        Panel("tokens", "The tokens", "tokens_in_text", about, "chosen", if_none=NO_TOKENS),
    ]


def tokens_in_address(asked: Asked) -> list[int]:
    """Return the tokens of the address, each once, in corpus order. Raises UserError if they are no numbers or many."""
    if not asked.given("tokens"):
        return []
    tokens = sorted(set(parse_whole_numbers("tokens", asked.query["tokens"])))
    if len(tokens) > MOST_CHOSEN:
        raise UserError(
            f"{len(tokens)} tokens are chosen; a page takes at most {MOST_CHOSEN}.\n"
            "Ask for more in a terminal: saeflow ask features_of_selection --sql 'select token_id …'"
        )
    return tokens
