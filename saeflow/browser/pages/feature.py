"""One feature: numbers, values, contexts, neighbours, all under a filter; its label can be changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from saeflow.browser.address import FILTER, IN_WORDS, WINDOW, Asked, address_of_panel
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.pages.meaning import LATER_MEANING as LATER_MEANING
from saeflow.browser.pages.meaning import Measured, not_measured
from saeflow.browser.pages.meaning import panels_of_meaning as panels_of_meaning
from saeflow.browser.pages.sources import sources_of
from saeflow.browser.panels import Panel, address_of_run, as_query, with_words
from saeflow.query import labels
from saeflow.runtime.errors import UserError

OWN = "own"
"""The file of labels that people write."""

IN_NARROW_COLUMN = ("numbers", "values", "sources", "entries", "logits", "similar", "companions")
"""Panels in the narrow column, in their order."""

LATER = ("similar", "companions", "near_misses", "entries", "documents", "sources", *LATER_MEANING)
"""Panels that a page fetches when they are looked at: they read more than the feature's own tokens."""

PAGES_OF_THEIR_OWN = ("strongest", "bands", "random")
"""Panels that are pages of their own: a feature's page shows the first rows of each, which one question gives."""

WIDEST = 100
"""Most tokens on either side of a context."""

MOST_CONTEXTS = 200
"""Most contexts of a panel that is a page of its own."""


def page(asked: Asked, opened: OpenedRun) -> Page:
    feature = asked.number("feature")
    missing = not_measured(opened, feature)
    left_out = {name for each in missing for name in each.panels}
    every = [panel for panel in panels_of_feature(asked, feature) if panel.name not in left_out]
    later = [panel for panel in every if panel.name in LATER and not asked.switch("all")]
    now = [panel for panel in every if panel not in later and panel.name not in PAGES_OF_THEIR_OWN]
    return _page_of(asked, opened, now, later, missing)


def one_panel(asked: Asked, opened: OpenedRun) -> Page:
    """Return a page of one panel, with more rows. A feature's page fetches the panels that come later from here."""
    every = {panel.name: panel for panel in panels_of_feature(asked, asked.number("feature"))}
    chosen = every.get(asked.path["panel"])
    if chosen is None:
        raise UserError("A feature has no such panel.")
    most = asked.count("n", 0, MOST_CONTEXTS)
    if most and "n" in chosen.arguments:
        chosen = replace(chosen, arguments={**chosen.arguments, "n": most})
    return _page_of(asked, opened, [chosen], [])


def _page_of(
    asked: Asked, opened: OpenedRun, now: list[Panel], later: list[Panel], missing: Sequence[Measured] = ()
) -> Page:
    feature, schema = asked.number("feature"), opened.run.schema
    answers = [panel.ask(opened) for panel in now]
    if not later and len(now) == 1:  # a panel that a page fetches
        answers = with_words(answers, opened)
    name = opened.cursor.execute("select label from feature_names where feature_id = ?", [feature]).fetchall()
    about = {"feature": feature, "label": name[0][0] if name else ""}
    more = {
        **about, "data": about, "beside": IN_NARROW_COLUMN, "widest": WIDEST, "window": window_of(asked),
        "later": [(panel, address_of_panel(schema, feature, panel.name, asked.query)) for panel in later],
        "fields": [(field, IN_WORDS[field]) for field in FILTER], "sources": sources_of(opened),
        "not_measured": missing,
    }  # fmt: skip
    return Page("feature.html", f"Feature {feature}", answers, schema, more)


def window_of(asked: Asked) -> dict[str, int]:
    """Return how many tokens are shown before and after those of a context."""
    return {name: asked.count(name, 12, WIDEST) for name in WINDOW}


def panels_of_feature(asked: Asked, feature: int) -> list[Panel]:
    """Return the panels of a feature, under the filter of the address."""
    about: Mapping[str, object] = {"feature": feature}
    under = {**about, **asked.filter.values}
    shown = {**under, **window_of(asked)}
    missed = {**shown, "n": 10, **asked.given("vocab")}
    companions = ("feature_companions", {**under, "n": 10}) if asked.filter else ("coactive_features", about)
    values, counted = ("feature_values", under) if asked.filter else ("feature_histogram", about)
    whole = "The filter does not change this panel." if asked.filter else ""
    return [
        Panel("numbers", "Numbers", "feature_numbers", under, "facts"),
        Panel("values", "Values", values, counted, "histogram"),
        Panel("logits", "Next tokens", "feature_logits", about, "logits", about=whole),
        Panel("similar", "Similar directions", "similar_features", about, "neighbours", 10, whole),
        Panel("companions", "Features that fire together", *companions, "neighbours", 10),
        *panels_of_meaning(feature, whole),
        Panel("examples", "Contexts", "feature_examples", shown, "examples"),
        Panel("strongest", "Strongest contexts", "feature_contexts", {**shown, "n": 50}, "contexts"),
        Panel("bands", "Contexts by strength", "feature_bands", {**shown, "n": 10}, "bands"),
        Panel("random", "Random contexts", "random_contexts", {**shown, "n": 50}, "contexts"),
        Panel("near_misses", "Near misses", "near_miss_contexts", missed, "near_misses"),
        Panel("entries", "Tokens it fires on", "feature_entries", under, "entries", 10),
        Panel("documents", "Documents it fires in", "feature_documents", under),
        Panel("sources", "Sources it fires in", "feature_sources", under),
    ]


def put_label(asked: Asked, opened: OpenedRun) -> str:
    """Write the label of the form, or remove it if it is empty; return the address of the feature's page."""
    feature, sae = asked.number("feature"), opened.run.artefact.record.input("saes")
    Panel("", "", "feature_histogram", {"feature": feature}).ask(opened)  # refuses a feature that there is not
    if sae is None:
        raise UserError("This run does not say which SAE it belongs to, so that its features take no labels.")
    label = labels.clean_label(asked.form.get("label", ""), None, "label")
    labels.put(opened.store, sae, OWN, {feature: label})
    return f"{address_of_run(opened.run.schema)}/features/{feature}{as_query(asked.query)}"
