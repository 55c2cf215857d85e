"""Two features of a run side by side, under a filter."""

from __future__ import annotations

from dataclasses import replace

import saeflow.browser.pages.feature as feature_page
from saeflow.browser.address import LARGEST, Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import Panel

SHOWN = ("numbers", "values", "logits", "strongest")
"""Panels of each feature."""

N_CONTEXTS = 10


def page(asked: Asked, opened: OpenedRun) -> Page:
    pair = {side: asked.count(side, 0, LARGEST) for side in ("a", "b") if asked.query.get(side, "").strip()}
    answers = []
    if len(pair) == 2:
        meeting = {"feature": pair["a"], "other": pair["b"], **asked.filter.values}
        both = Panel("pair", "Where they meet", "feature_pair", meeting, "facts")
        every = [both, *(panel for side, number in pair.items() for panel in _of_side(asked, side, number))]
        answers = [panel.ask(opened) for panel in every]
    title = " and ".join(f"feature {number}" for number in pair.values()) or "two features"
    return Page("compare.html", f"Compare {title}", answers, opened.run.schema)


def _of_side(asked: Asked, side: str, number: int) -> list[Panel]:
    return [
        replace(
            panel,
            name=f"{side}_{panel.name}",
            title=f"{panel.title} of {number}",
            arguments={**panel.arguments, "n": N_CONTEXTS} if "n" in panel.arguments else panel.arguments,
        )
        for panel in feature_page.panels(asked, number)
        if panel.name in SHOWN
    ]
