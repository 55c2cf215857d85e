"""One feature: numbers, values, contexts, neighbours; its label can be changed."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import Panel, address_of_run
from saeflow.query import labels
from saeflow.query.questions import find_question, parse_arguments
from saeflow.runtime.errors import UserError

OWN = "own"
"""The file of labels that people write."""


def page(asked: Asked, opened: OpenedRun) -> Page:
    feature = number_of(asked)
    answers = [panel.ask(opened) for panel in panels(feature)]
    label = opened.cursor.execute("select label from feature_names where feature_id = ?", [feature]).fetchone()
    more = {"feature": feature, "label": label[0] if label else ""}
    return Page("feature.html", f"Feature {feature}", answers, opened.run.schema, more)


def number_of(asked: Asked) -> int:
    """Return the feature of the address. Raises UserError if it is no whole number."""
    values = parse_arguments(find_question("contexts"), {"feature": asked.path["feature"]})
    found = values["feature"]
    assert isinstance(found, int)
    return found


def panels(feature: int) -> list[Panel]:
    about = {"feature": feature}
    return [
        Panel("values", "Values", "feature_histogram", about, "histogram"),
        Panel("contexts", "Strongest contexts", "contexts", {**about, "n": 10}, "contexts"),
        Panel("logits", "Next tokens", "feature_logits", about),
        Panel("similar", "Similar directions", "similar_features", about, most_rows=10),
    ]


def put_label(asked: Asked, opened: OpenedRun) -> str:
    """Write the label of the form, or remove it if it is empty; return the address of the feature's page."""
    feature, sae = number_of(asked), opened.run.artefact.record.input("saes")
    Panel("", "", "feature_histogram", {"feature": feature}).ask(opened)  # refuses a feature that there is not
    if sae is None:
        raise UserError("This run does not say which SAE it belongs to, so that its features take no labels.")
    label = labels.clean_label(asked.form.get("label", ""), None, "label")
    labels.put(opened.store, sae, OWN, {feature: label})
    return f"{address_of_run(opened.run.schema)}/features/{feature}"
