"""A run in a notebook, as `saeflow.open` gives it: it shows its features as `saeflow browse` does, without a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from markupsafe import Markup

from saeflow.browser.address import FILTER, WINDOW, Asked
from saeflow.browser.answers import Page, environment
from saeflow.browser.connections import OpenedRun
from saeflow.browser.pages import feature as feature_page
from saeflow.browser.panels import Panel
from saeflow.browser.static_copy import static_copy
from saeflow.query.api import OpenRun
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import did_you_mean

ALL = {"all": "1"}
"""A notebook fetches nothing later, so that it shows every panel."""


class NotebookRun(OpenRun):
    """A run whose features show themselves in Jupyter and marimo."""

    def feature(self, feature: int, **filter: object) -> Shown:
        """Show a feature: numbers, values, next tokens, neighbours and contexts, under a filter.

            run.feature(1077)
            run.feature(1077, source="kjv", threshold=0.5, before=30)

        The filter is the one of `feature_numbers`; `before` and `after` count the tokens around a context. Raises
        UserError for a feature, a source or a setting that does not exist.
        """
        known = (*FILTER, *WINDOW)
        for name in filter.keys() - set(known):
            raise UserError(f"A feature is not filtered by {name!r}. {did_you_mean(name, known)}")
        given = {name: str(value) for name, value in filter.items() if value is not None}
        asked = Asked({"feature": str(feature)}, given | ALL, {}, "")
        return Shown(feature_page.page(asked, self._opened()), asked)

    def features(self, text: str = "", n: int = 20, **wanted: object) -> Shown:
        """Show the features that the question `find_features` finds, each with a small histogram of its values.

        run.features()  # the most interesting ones
        run.features("Jerusalem", sort="density", max_density=0.01)
        """
        panel = Panel("features", "Features", "find_features", {"text": text, "n": n, **wanted}, "features")
        page = Page("notebook.html", "Features", [panel.ask(self._opened())], self.name)
        return Shown(page, Asked({}, {}, {}, ""))

    def _opened(self) -> OpenedRun:
        return OpenedRun(self.store, self._run, self._connection)


@dataclass(frozen=True)
class Shown:
    """Panels of a run, as a notebook shows them. `tables` holds their rows as Arrow tables, by the panel's name."""

    page: Page = field(repr=False)
    asked: Asked = field(repr=False)

    @property
    def tables(self) -> Mapping[str, pa.Table]:
        return {name: answer.table for name, answer in self.page.panels.items()}

    def __repr__(self) -> str:
        return f"<{self.page.title} of saeflow run {self.page.run!r}: {', '.join(self.page.panels)}>"

    def _repr_html_(self) -> str:
        """Return HTML that loads nothing, with a style that touches nothing around it."""
        style = (Path(__file__).parent / "static" / "browser.css").read_text("utf-8")
        style = Markup(style.replace(":root", "&").replace("\nbody", "\n&"))
        more = {"label": "", "beside": (), **self.page.more}
        template = environment(drawn=True).get_template("notebook.html")
        return static_copy(template.render(page=self.page, asked=self.asked, style=style, **more), "", {})
