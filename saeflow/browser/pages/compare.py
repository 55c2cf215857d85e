"""Two features of a run side by side, under a filter; and two runs, with what features of one match in the other."""

from __future__ import annotations

from dataclasses import replace

import saeflow.browser.pages.feature as feature_page
from saeflow.browser.address import LARGEST, Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.pages.home import RUNS
from saeflow.browser.panels import Panel
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import did_you_mean

SHOWN = ("numbers", "values", "logits", "strongest")
"""Panels of each feature."""

N_CONTEXTS = 10

QUICK_TOKENS = 500_000
"""Features of runs of more tokens are matched only if asked for: that takes many seconds."""


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
        for panel in feature_page.panels_of_feature(asked, number)
        if panel.name in SHOWN
    ]


def page_of_runs(asked: Asked, opened: OpenedRun) -> Page:
    """Return the page of the runs `a` and `b`, or of the two in `run`."""
    every = RUNS.ask(opened)
    a, b = names_of(asked)
    known = {row["schema_name"]: row for row in every.rows if row["problem"] is None}
    for name in (a, b):
        if name not in known:
            raise UserError(f"There is no run {name!r}. {did_you_mean(name, known)}")
    asked_for = asked.switch("match") or max(known[name]["n_tokens"] or 0 for name in (a, b)) <= QUICK_TOKENS
    refused = known[a]["tokens_artefact"] != known[b]["tokens_artefact"]
    title = f"Features of {a}, and the closest of {b}"
    matches = [Panel("matches", title, "compare_runs", {"a": a, "b": b}, "matches")]
    answers = [panel.ask(opened) for panel in matches if asked_for and not refused]
    more = {"a": a, "b": b, "refused": refused}
    return Page("compare_runs.html", f"{a} and {b}", [every, *answers], more=more)


def names_of(asked: Asked) -> tuple[str, str]:
    ticked = [*asked.given("a", "b").values()] or asked.query.get("run", "").split(",")
    if len(ticked) != 2:
        raise UserError("Two runs are compared. Tick two in the list of runs.")
    return str(ticked[0]), str(ticked[1])
