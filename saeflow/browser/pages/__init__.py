"""One file for each page: a function from what was asked and an open run to a `Page`.

home         the runs of the store
run          one run: measures, settings, training, stages
features     the list of features
feature_map  the map of decoder directions
feature      one feature: numbers, values, contexts, neighbours
meaning      panels of a feature's page: labels and their scores, classes, effects on the model
compare      two features side by side, or two runs
classes      the classes of annotations, and the features of one class
sources      the sources of the corpus, and what tells two of them apart
documents    the documents of a run, and one of them shaded
tokens       vocabulary entries, and one token of the corpus, with their features
new_text     a text of one's own
selection    some chosen tokens, and the features that tell them from the rest
questions    all questions with a form each, any one with its SQL, and definitions
"""

from collections.abc import Callable

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import Connections, OpenedRun
from saeflow.browser.pages import (
    classes,
    compare,
    documents,
    feature,
    feature_map,
    features,
    home,
    new_text,
    questions,
    run,
    selection,
    sources,
    tokens,
)

PAGES_OF_STORE: list[tuple[str, Callable[[Asked, Connections], Page]]] = [
    ("/", home.page),
    ("/about", questions.about),
]
"""Pages that a store without any run has, too."""

PAGES: list[tuple[str, Callable[[Asked, OpenedRun], Page]]] = [
    ("/compare-runs", compare.page_of_runs),
    ("/runs/{run}", run.page),
    ("/runs/{run}/features", features.page),
    ("/runs/{run}/features/{feature}", feature.page),
    ("/runs/{run}/features/{feature}/{panel}", feature.one_panel),
    ("/runs/{run}/compare", compare.page),
    ("/runs/{run}/sources", sources.page),
    ("/runs/{run}/classes", classes.page),
    ("/runs/{run}/docs", documents.index),
    ("/runs/{run}/doc", documents.page),
    ("/runs/{run}/docs/{doc:path}", documents.page),
    ("/runs/{run}/tokens", tokens.search),
    ("/runs/{run}/tokens/{vocab}", tokens.entry),
    ("/runs/{run}/tokens-at/{token}", tokens.at),
    ("/runs/{run}/try", new_text.page),
    ("/runs/{run}/selection", selection.page),
    ("/runs/{run}/map", feature_map.page),
    ("/runs/{run}/questions", questions.page),
    ("/runs/{run}/ask/{question}", questions.one),
]
"""Addresses and what makes their pages."""
