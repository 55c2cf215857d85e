"""A page as HTML, JSON, CSV or Parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response, StreamingResponse

from saeflow.browser import charts, pictures, shading
from saeflow.browser.address import Asked, address_of_panel
from saeflow.browser.panels import Answer, address_of_run, address_of_token, as_query
from saeflow.query.questions import find_question
from saeflow.query.text_formats import as_csv, as_json_value, for_parquet
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import human_bytes, sanitise

FORMATS = ("json", "csv", "parquet")


@dataclass(frozen=True)
class Page:
    """What a page shows: answers of its panels, and what its template needs beside them."""

    template: str
    title: str
    answers: Sequence[Answer] = ()
    run: str | None = None
    """Schema of the run that the page is about."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further values of the template; `data` among them is part of the JSON."""

    @property
    def panels(self) -> dict[str, Answer]:
        return {answer.panel.name: answer for answer in self.answers}


def respond(page: Page, format: str, asked: Asked, **common: Any) -> Response:
    """Return the page in a format. CSV and Parquet hold its first panel. Raises UserError if it has none."""
    match format:
        case "":
            return HTMLResponse(as_html(page, asked, **common))
        case "json":
            return Response(page_as_json(page, asked), media_type="application/json")
    if not page.answers:
        raise UserError(f"This page has no rows that {format} could hold. Ask for its JSON.")
    table = page.answers[0].table
    if format == "csv":
        return StreamingResponse(as_csv(table), media_type="text/csv; charset=utf-8")
    buffer = io.BytesIO()
    pq.write_table(for_parquet(table), buffer, compression="zstd")
    return Response(buffer.getvalue(), media_type="application/vnd.apache.parquet")


def as_html(page: Page, asked: Asked, drawn: bool = False, **common: Any) -> str:
    """Return the page as HTML. Its charts are drawn here if `drawn`, else by the page's script."""
    values = {"page": page, "asked": asked, "panels": page.panels, "run": page.run} | common | dict(page.more)
    return environment(drawn).get_template(page.template).render(values)


def page_as_json(page: Page, asked: Asked) -> str:
    found = {
        "title": page.title,
        "address": asked.address,
        "run": page.run,
        "filter": dict(asked.filter.values),
        "panels": {name: answer.as_json() for name, answer in page.panels.items()},
        **page.more.get("data", {}),
    }
    return json.dumps(as_json_value(found), ensure_ascii=True, allow_nan=False)


@cache
def environment(drawn: bool = False) -> Environment:
    """Return the templates, with the functions that they may call. Everything that is not Markup is escaped."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    functions: dict[str, Callable[..., Any]] = {
        "shown": shading.shown_html,
        "number": shading.number,
        "marked": shading.marked_html,
        "linked": shading.linked,
        "around_token": shading.around_token,
        "piece": shading.piece,
        "lines": lambda text: shading.lines(sanitise(str(text))),
        "chart": pictures.picture if drawn else charts.chart,
        "chart_of": charts.chart_of,
        "tiny_histogram": charts.tiny_histogram,
        "is_chart": pictures.is_chart,
        "as_query": as_query,
        "address_of_run": address_of_run,
        "address_of_panel": address_of_panel,
        "address_of_token": address_of_token,
        "human_bytes": human_bytes,
        "share": shading.per_cent,
        "definition": lambda question: find_question(question).units,
    }
    made.globals.update(functions)
    made.filters.update(shown=shading.shown_html, number=shading.number, visible=shading.shown_text)
    views: dict[str, Any] = {}
    made.globals.update(views=views, policy="", copied=())
    for name in made.list_templates(filter_func=lambda name: name.endswith("views.html")):
        views.update(vars(made.get_template(name).module))
    made.globals["panel"] = views["panel"]
    return made
