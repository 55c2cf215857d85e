"""The classes that annotations gave to tokens, and one class: its best features, and its spans in the text."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import MOST_FEATURES, Panel, with_words
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief

NO_CLASSES = "No tokens have classes yet. In a terminal: saeflow annotate NAME FILE"
NOT_PROBED = "No feature was compared with this class yet. In a terminal: saeflow probe {annotation}"
NONE_FIRES = "No feature fires on a token of this class."

_IS_PROBED = "select exists(from stg_feature_classes as scores where scores.annotation = ? and scores.class = ?)"

INDEX = (
    Panel("annotations", "Classes of tokens", "annotations", if_none=NO_CLASSES),
    Panel("sparse", "Sparse probes", "sparse_probes", if_none="None yet. In a terminal: saeflow probe NAME --sparse"),
)


def page(asked: Asked, opened: OpenedRun) -> Page:
    """Return all classes, or one: the features that tell it best, and spans of it."""
    chosen = asked.given("annotation", "class")
    if len(chosen) < 2:
        return Page("panels.html", "Classes", [panel.ask(opened) for panel in INDEX], opened.run.schema)
    is_probed = opened.cursor.execute(_IS_PROBED, [*chosen.values()]).fetchall()[0][0]
    features, spans = (panel.ask(opened) for panel in panels_of_class(chosen, is_probed))
    if not spans.rows:  # both names exist, but not together
        annotation, name = (brief(str(each)) for each in chosen.values())
        raise UserError(f"The annotation {annotation!r} has no class {name!r}.")
    answers = with_words([features, spans], opened)
    return Page("panels.html", f"{chosen['annotation']}: {chosen['class']}", answers, opened.run.schema)


def panels_of_class(chosen: dict[str, object], is_probed: bool) -> list[Panel]:
    """Return the panels of a class, named by its annotation and its own name."""
    features = {**chosen, "n": MOST_FEATURES}
    if_none = NONE_FIRES if is_probed else NOT_PROBED.format(**chosen)
    return [
        Panel("features", "Features that tell it", "features_of_class", features, "tells", if_none=if_none),
        Panel("spans", "In the text", "class_in_text", chosen, "spans"),
    ]
