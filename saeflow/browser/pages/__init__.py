"""One file for each page: a function from what was asked and an open run to a `Page`.

home      the runs of the store
feature   one feature: numbers, values, contexts, neighbours
question  any named question, with its SQL
"""

from collections.abc import Callable

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.pages import feature, home, question

PAGES: list[tuple[str, Callable[[Asked, OpenedRun], Page]]] = [
    ("/", home.page),
    ("/runs/{run}/features/{feature}", feature.page),
    ("/runs/{run}/ask/{question}", question.page),
]
"""Addresses and what makes their pages."""
