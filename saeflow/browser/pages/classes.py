"""The classes that annotations gave to tokens, and one class: its best features, and its spans in the text."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import Panel, with_words

MOST_FEATURES = 50

NO_CLASSES = "No tokens have classes yet. In a terminal: saeflow annotate NAME FILE"
NOT_PROBED = "No feature was compared with this class yet. In a terminal: saeflow probe {annotation}"


INDEX = (
    Panel("annotations", "Classes of tokens", "annotations", if_none=NO_CLASSES),
    Panel("sparse", "Sparse probes", "sparse_probes", if_none="None yet. In a terminal: saeflow probe NAME --sparse"),
)


def page(asked: Asked, opened: OpenedRun) -> Page:
    """Return all classes, or one: the features that tell it best, and spans of it."""
    chosen = asked.given("annotation", "class")
    if len(chosen) < 2:
        return Page("panels.html", "Classes", [panel.ask(opened) for panel in INDEX], opened.run.schema)
    answers = [panel.ask(opened) for panel in panels(chosen)]
    return Page(
        "panels.html", f"{chosen['annotation']}: {chosen['class']}", with_words(answers, opened), opened.run.schema
    )


def panels(chosen: dict[str, object]) -> list[Panel]:
    """Return the panels of a class, named by its annotation and its own name."""
    features = {**chosen, "n": MOST_FEATURES}
    not_probed = NOT_PROBED.format(**chosen)
    return [
        Panel("features", "Features that tell it", "features_of_class", features, "tells", if_none=not_probed),
        Panel("spans", "In the text", "class_in_text", chosen, "spans"),
    ]
