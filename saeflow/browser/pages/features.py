"""The features of a run: searched, sorted, a page at a time."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.pages.sources import sources_of
from saeflow.browser.panels import MOST_IN_A_FILE, MOST_ROWS, Panel
from saeflow.query.questions import find_question

SEARCH = ("text", "entry", "kind", "min_density", "max_density", "min_peak", "max_peak", "source")
"""Parameters that find_features and count_features share."""

FEATURE_KINDS = ("other", "single-token", "position", "dense", "rare", "dead")
SORTS = {
    "interesting": "interesting first",
    "density": "dense first",
    "rare": "rare first",
    "max": "largest value first",
    "mean": "largest mean first",
    "id": "by number",
}

ON_A_PAGE = 50


def page(asked: Asked, opened: OpenedRun) -> Page:
    """Return a page of the list. CSV and Parquet hold the whole list unless `n` is given."""
    search = asked.given(*SEARCH)
    whole = asked.format in ("csv", "parquet") and "n" not in asked.query
    n = MOST_IN_A_FILE if whole else asked.count("n", ON_A_PAGE, MOST_ROWS)
    given = {**search, **asked.given("sort", "after_sort", "after_id"), "n": n + 1}
    found = Panel("features", "Features", "find_features", given, "features", n).ask(opened)
    counts = Panel("counts", "Counts", "count_features", search).ask(opened)
    last = found.rows[-1] if found.rows and found.has_more and not whole else None
    further = asked.link(after_sort=last["sort_key"], after_id=last["feature_id"]) if last else ""
    more = {
        "next": further, "kinds": FEATURE_KINDS, "sorts": SORTS, "data": {"next": further or None},
        "meaning": find_question("feature_kind").units, "sources": sources_of(opened),
    }  # fmt: skip
    return Page("features.html", "Features", [found, counts], opened.run.schema, more)
