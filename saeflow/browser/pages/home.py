"""The runs of the store."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import Panel


def page(asked: Asked, opened: OpenedRun) -> Page:
    return Page("home.html", "Runs", [Panel("runs", "Runs", "runs", view="runs").ask(opened)])
