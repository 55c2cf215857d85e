"""The runs of the store. Two that are ticked can be compared."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import LIST_OF_RUNS, Connections, TooSlow
from saeflow.browser.panels import Panel
from saeflow.runtime.errors import UserError

RUNS = Panel("runs", "Runs", "runs", view="runs")


def page(asked: Asked, connections: Connections) -> Page:
    """Return the list of runs; if none can be asked, how to make one."""
    try:
        found = connections.ask(RUNS.ask, names=LIST_OF_RUNS)
        return Page("home.html", "Runs", [found], more={"missing": ""})
    except TooSlow:
        raise
    except UserError as error:
        return Page("home.html", "Runs", more={"missing": str(error), "data": {"problem": str(error)}})
