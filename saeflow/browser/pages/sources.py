"""The sources of the corpus, and which features tell two of them apart."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import MOST_FEATURES, Panel, with_words

MOST_NAMES = 50
"""Sources that a field offers."""

ABOUT_CONTRAST = (
    "Whether one document makes the difference, a feature's page says under “Sources it fires in”: largest_share."
)


def page(asked: Asked, opened: OpenedRun) -> Page:
    """Return the sources, and the features that tell two of them apart: the two largest, if none are given."""
    answers = [Panel("sources", "Sources", "sources").ask(opened)]
    names = sources_of(opened)
    pair = {"a": "", "b": ""} | dict(zip("ab", names, strict=False)) | asked.given("a", "b")
    if all(pair.values()):
        title = "What tells {a} from {b}".format(**pair)
        answers.append(
            Panel("contrast", title, "source_contrast", pair, "table", MOST_FEATURES, ABOUT_CONTRAST).ask(opened)
        )
    return Page(
        "sources.html", "Sources", with_words(answers, opened), opened.run.schema, {"pair": pair, "sources": names}
    )


def sources_of(opened: OpenedRun) -> list[str]:
    """Return the names of the largest sources. There are none where an earlier saeflow did not count them."""
    found = opened.cursor.execute(
        "select source from stg_encoded_tokens where source is not null and not is_rest "
        "and (select has_marginals from stg_shape) "
        "group by source order by sum(n_tokens) desc, source limit ?", [MOST_NAMES],
    ).fetchall()  # fmt: skip
    return [name for (name,) in found]
