"""Panels of a feature's page about its meaning: labels and their scores, classes, effects on the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import Panel

NO_LABELS = "Nobody has said so yet. Write a label above, or in a terminal: saeflow explain"

NO_MISTAKES = "None is known: whatever was tested was right each time."

LATER_MEANING = ("mistakes", "classes", "effects", "moved", "effect_contexts")
"""Panels that a page fetches when they are looked at."""


@dataclass(frozen=True)
class Measured:
    """What some command measures of features: the panels that show it, and rows of a feature if it was measured."""

    panels: tuple[str, ...]
    rows: str
    """SQL of these rows; `?` stands for the feature."""
    otherwise: str
    """What is said in place of the panels."""
    command: str


MEASURED = (
    Measured(
        ("scores",),
        "from stg_explanation_scores where feature_id = ?",
        "No language model has judged its labels",
        "saeflow explain {run} --features {feature} --endpoint URL --model NAME",
    ),
    Measured(
        ("mistakes",),
        "from (select feature_id from stg_explanation_mistakes union all select feature_id from stg_rules) "
        "where feature_id = ?",
        "No rule was tested, so nobody knows where it fails",
        "saeflow explain {run} --features {feature}",
    ),
    Measured(
        ("classes",),
        "from feature_classes where feature_id = ?",
        "Nobody has compared it with classes of tokens",
        "saeflow annotate NAME FILE, then saeflow probe NAME",
    ),
    Measured(
        ("effects", "moved", "effect_contexts"),
        "from stg_effects where feature_id = ?",
        "Nobody has changed it to see what the model does",
        "saeflow effects {run} --features {feature}",
    ),
)


def not_measured(opened: OpenedRun, feature: int) -> list[Measured]:
    """Return what no command has measured of this feature yet."""
    exist = ", ".join(f"exists({each.rows})" for each in MEASURED)
    found = opened.cursor.execute(f"select {exist}", [feature] * len(MEASURED)).fetchall()[0]
    return [each for each, is_measured in zip(MEASURED, found, strict=True) if not is_measured]


def panels_of_meaning(feature: int, note: str = "") -> list[Panel]:
    """Return the panels, with a note under each title."""
    about: Mapping[str, object] = {"feature": feature}
    ten, five = {**about, "n": 10}, {**about, "n": 5}
    found = [
        Panel("labels", "What it is said to mean", "labels_of_feature", about, if_none=NO_LABELS),
        Panel("scores", "How well its labels tell where it fires", "scores_of_labels", about, most_rows=12),
        Panel(
            "mistakes",
            "Tokens that cost its labels points",
            "explanation_mistakes",
            five,
            "mistakes",
            if_none=NO_MISTAKES,
        ),
        Panel("classes", "Classes of tokens it tells", "classes_of_feature", ten, "tells"),
        Panel("effects", "What the model does when it is changed", "measured_effects", about, "effects"),
        Panel("moved", "Tokens that become more or less likely", "effects_on_entries", ten, "moved"),
        Panel("effect_contexts", "Where the change moves the model most", "effect_contexts", ten, "effect_contexts"),
    ]
    return [replace(panel, about=note) for panel in found]
