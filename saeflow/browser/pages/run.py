"""One run: how good it is, how it was made, and how often its features fire."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import Panel

ABOUT_POINTS = "A point is a feature; click to open it. The list of features is the same without a picture."

PANELS = [
    Panel("metrics", "Measures", "metrics"),
    Panel("densities", "Densities", "density_histogram", view="densities"),
    Panel("scatter", "Density and largest value", "density_and_max", {"n": 16_384}, "scatter", 16_384, ABOUT_POINTS),
    Panel("settings", "Settings", "settings", view="settings"),
    Panel("training", "Training", "training_curve", view="curves", about="Measures of single batches, by tokens seen."),
    Panel("stages", "Stages", "stages", view="stages"),
]


def page(asked: Asked, opened: OpenedRun) -> Page:
    about = Panel("run", "Run", "runs").ask(opened)
    answers = [about, *(panel.ask(opened) for panel in PANELS)]
    return Page("run.html", opened.run.schema, answers, opened.run.schema)
