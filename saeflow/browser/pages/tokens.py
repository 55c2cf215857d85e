"""Vocabulary entries with the features that fire on them, and one token of the corpus with its features."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import Panel, with_words
from saeflow.browser.shading import shown_piece
from saeflow.runtime.errors import UserError

MOST_ENTRIES = 100

PUSHED = "Features on it that push the next token's logit up (+) or down, where it does come next: value times logit."


def search(asked: Asked, opened: OpenedRun) -> Page:
    """Return the vocabulary entries that contain a text, or only the form if none is given."""
    panel = Panel("entries", "Vocabulary entries", "search_token", asked.given("text"), "table", MOST_ENTRIES)
    answers = [panel.ask(opened)] if asked.given("text") else []
    return Page("tokens.html", "Tokens", answers, opened.run.schema)


def entry(asked: Asked, opened: OpenedRun) -> Page:
    """Return the features that fire on a vocabulary entry."""
    number = asked.number("vocab")
    found = opened.cursor.execute("select piece from stg_vocab where vocab_id = ?", [number]).fetchall()
    if not found:
        raise UserError(f"There is no vocabulary entry {number}.")
    about = {"vocab": number, **asked.filter.values}
    features = Panel("features", "Features that fire on it", "entry_features", about, "entry", 20).ask(opened)
    followers = Panel("followers", "What comes after it", "entry_followers", about, "followers", about=PUSHED).ask(
        opened
    )
    answers = [*with_words([features], opened), followers]
    return Page("tokens.html", f"Token {shown_piece(found[0][0])}", answers, opened.run.schema)


def at(asked: Asked, opened: OpenedRun) -> Page:
    """Return the features that fire at one token of the corpus."""
    about = {"token": asked.number("token")}
    place = Panel("place", "In the text", "context", {**about, "before": 30, "after": 30}, "place").ask(opened)
    if not place.rows:
        raise UserError(f"The corpus has no token {about['token']}.")
    features = Panel("features", "Features that fire here", "token_features", about, most_rows=100).ask(opened)
    answers = [place, *with_words([features], opened)]
    return Page("token.html", f"Token {about['token']}", answers, opened.run.schema, {"token_id": about["token"]})
