"""A static copy of a run's pages: a folder that opens from a disk, without a server or a network."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from starlette.routing import compile_path

from saeflow import __version__
from saeflow.browser import charts
from saeflow.browser.address import Asked
from saeflow.browser.answers import Page, as_html, page_as_json
from saeflow.browser.connections import Connections, OpenedRun
from saeflow.browser.output import OutputFolder
from saeflow.browser.pages import PAGES, questions
from saeflow.browser.panels import Panel, address_of_run
from saeflow.browser.static_copy import static_copy
from saeflow.query.ask import resolve_names
from saeflow.query.generations import generations
from saeflow.query.questions import find_question
from saeflow.recipe.fingerprint import fingerprint
from saeflow.runtime.threads import map_in_order, n_threads

EXPORT_POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file:; img-src 'self' file: data:; base-uri 'none'"
)
"""What a page may load: files. On a disk, `'self'` alone means nothing to some browsers."""

EXPORT_FILES = ("*.html", "features/*.html", "static/*.css", "static/*.js")
"""Files of an export."""

STATIC = Path(__file__).parent / "static"


class Export:
    """An export of a run: which address becomes which file."""

    def __init__(self, opened: OpenedRun, features: Sequence[int], are_listed: bool = False) -> None:
        """`are_listed`: the features are the first of the list, so that it is exported, too."""
        self.opened, self.features = opened, features
        here, sae = address_of_run(opened.run.schema), opened.run.artefact.record.input("saes")
        static = ["charts.js", *sorted(path.name for path in STATIC.iterdir() if path.is_file())]
        self.files = {
            here: "index.html",
            **({f"{here}/map": "map.html"} if sae and opened.store.by_id(sae).complete() else {}),
            **({f"{here}/features": "features.html"} if are_listed else {}),
            "/about": "about.html",
            **{f"{here}/features/{feature}": f"features/{feature}.html" for feature in features},
            **{f"/static/{name}": f"static/{name}" for name in static},
        }

    def write(self, folder: OutputFolder, advance: Callable[[int], None]) -> None:
        """Write what is missing. An export of another run, of other features or of an earlier state goes first."""
        state = fingerprint(__version__, repr(generations(self.opened.store)))
        folder.begin({"run": self.opened.run.artefact.id, "features": list(self.features), "state": state})
        missing = [(address, name) for address, name in self.files.items() if not folder.has(name)]
        advance(len(self.files) - len(missing))
        for name, content in map_in_order(self._written, missing, n_threads(0)):
            folder.put(name, content)
            advance(1)

    def _written(self, file: tuple[str, str]) -> tuple[str, bytes]:
        """Return the name of a file and its content. Several threads make pages at the same time."""
        address, name = file
        if address.startswith("/static/"):
            path = charts.chart_script() if name == "static/charts.js" else STATIC / Path(name).name
            return name, path.read_bytes()
        with self.opened.with_own_cursor() as opened:
            return name, self._content(address, name, opened)

    def _content(self, address: str, name: str, opened: OpenedRun) -> bytes:
        asked, page = page_at(address, opened, all="1", n=str(len(self.features)))
        # of a feature, all panels, as none is fetched later; of the list, all that are exported
        common: dict[str, Any] = {
            "run": self.opened.run.schema,
            "store_name": self.opened.store.name,
            "token": "",
            "policy": EXPORT_POLICY,
        }
        is_only_list = name == "index.html" and "features.html" not in self.files.values()
        common["copied"] = self.features if is_only_list else ()
        statements = {answer.link: f"#sql-{answer.panel.name}" for answer in page.answers}
        rows_at = partial(_rows_at, opened)
        return static_copy(as_html(page, asked, **common), name, self.files | statements, rows_at).encode()


def _rows_at(opened: OpenedRun, address: str, inside: str) -> list[dict[str, Any]]:
    """Return rows of the JSON of a page, which a chart would ask the server for."""
    asked, page = page_at(address, opened)
    found = json.loads(page_as_json(page, asked))
    for name in inside.split("."):
        found = found[name]
    return list(found)


def page_at(address: str, opened: OpenedRun, **given: str) -> tuple[Asked, Page]:
    """Return the page that the server would make for an address with these further words. Raises KeyError."""
    url = urllib.parse.urlsplit(address)
    path = url.path.removesuffix(".json")
    query = given | dict(urllib.parse.parse_qsl(url.query))
    if path == "/about":
        return (asked := Asked({}, query, {}, address)), questions.about(asked, Connections(opened.store))
    for pattern, make in PAGES:
        if found := compile_path(pattern)[0].match(path):
            asked = Asked(found.groupdict(), query, {}, address, "json" if path != url.path else "")
            return asked, make(asked, opened)
    raise KeyError(address)


def choose_features(opened: OpenedRun, only: Sequence[int] | None, n: int) -> list[int]:
    """Return the features that are named, or the n most telling. Raises UserError for one that there is not."""
    question = find_question("find_features")
    if only is None:
        return [row["feature_id"] for row in Panel("", "", question.name, {"n": n}, most_rows=n).ask(opened).rows]
    resolve_names(opened.cursor, question, {"features": list(only)})
    return sorted(set(only))
