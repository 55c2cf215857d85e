"""The map of decoder directions."""

from __future__ import annotations

from typing import Any

import numpy as np

from saeflow.browser import directions
from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import MOST_IN_A_FILE, Panel, address_of_run, as_query
from saeflow.runtime.errors import UserError

MOST_DRAWN = 16_384
"""Points of the picture. The page's JSON has all."""

FEATURES = Panel("features", "Features", "feature_summary", most_rows=MOST_IN_A_FILE)


def page(asked: Asked, opened: OpenedRun) -> Page:
    """Return the page of the map; its points are in the JSON alone, at most `n` of them if that is given."""
    run, by = opened.run.schema, asked.query.get("by", "pca")
    if by not in ("pca", "umap"):
        raise UserError(f"A map is by pca or by umap, not by {by!r}.")
    n_features = opened.run.shape.get("n_features") or 0
    more: dict[str, Any] = {
        "by": by,
        "n_features": n_features,
        "n_drawn": min(n_features, MOST_DRAWN),
        "url": f"{address_of_run(run)}/map.json{as_query({'by': by, 'n': MOST_DRAWN})}",
        "has_umap": directions.has_umap(n_features),
    }
    if asked.format:
        more["data"] = {"by": by, "points": points(asked, opened, by)}
    return Page("map.html", "Map", (), run, more)


def points(asked: Asked, opened: OpenedRun, by: str) -> list[dict[str, Any]]:
    """Return a point for each feature, or for evenly spaced ones; beside its place what `feature_summary` says."""
    found = directions.places(opened.store.input_of(opened.run.artefact, "saes"), by)
    step = -(-len(found) // max(1, asked.count("n", len(found), len(found))))
    rows = FEATURES.ask(opened).rows[::step]
    at = np.round(found[[row["feature_id"] for row in rows]].astype(np.float64), 4).tolist()
    kept = ("feature_id", "label", "density", "max_value")
    return [{name: row[name] for name in kept} | {"x": x, "y": y} for row, (x, y) in zip(rows, at, strict=True)]
