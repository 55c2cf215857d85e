"""One file for each page: a function from what was asked and an open run to a `Page`.

home      the runs of the store
feature   one feature: numbers, values, contexts, neighbours
compare   two features side by side
tokens    vocabulary entries, and one token of the corpus, with their features
new_text  a text of one's own
question  any named question, with its SQL
"""

from collections.abc import Callable

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.pages import compare, feature, home, new_text, question, tokens

PAGES: list[tuple[str, Callable[[Asked, OpenedRun], Page]]] = [
    ("/", home.page),
    ("/runs/{run}/features/{feature}", feature.page),
    ("/runs/{run}/features/{feature}/{panel}", feature.one_panel),
    ("/runs/{run}/compare", compare.page),
    ("/runs/{run}/tokens", tokens.search),
    ("/runs/{run}/tokens-at/{token}", tokens.at),
    ("/runs/{run}/try", new_text.page),
    ("/runs/{run}/ask/{question}", question.page),
]
"""Addresses and what makes their pages."""
