"""Charts as pictures: SVG and PNG, drawn here by vl-convert. Also the charts that only a report has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from markupsafe import Markup

from saeflow.browser import charts
from saeflow.browser.shading import shown_text
from saeflow.query.text_formats import as_json_value

Rows = Sequence[Mapping[str, Any]]


def picture(name: str, rows: Rows, label: str) -> Markup:
    """Return a chart of these rows as HTML with the picture in it. Its lines and words have the colour of the page."""
    figure = Markup('<figure class="picture" role="img" aria-label="{}">').format(label)
    return figure + Markup(as_svg(name, rows, _colours("currentColor", "#88888855"))) + Markup("</figure>")


def as_svg(name: str, rows: Rows, config: Mapping[str, Any] | None = None) -> str:
    """Return a chart of these rows as SVG; without `config`, dark on white."""
    import vl_convert

    return str(
        vl_convert.vegalite_to_svg(_spec_with_rows(name, rows), config=dict(config or _ON_PAPER), allowed_base_urls=[])
    )


def as_png(name: str, rows: Rows) -> bytes:
    """Return a chart of these rows as PNG, dark on white, at twice its size."""
    import vl_convert

    return bytes(
        vl_convert.vegalite_to_png(_spec_with_rows(name, rows), scale=2, config=_ON_PAPER, allowed_base_urls=[])
    )


def _spec_with_rows(name: str, rows: Rows) -> dict[str, Any]:
    spec = copy.deepcopy(chart_or_picture(name))
    spec["datasets"] = {"rows": [{key: _drawable(value) for key, value in row.items()} for row in rows]}
    return spec


def _drawable(value: object) -> object:
    """Return a value of a row. A control character in a text would end the process: the picture is made of XML."""
    plain = as_json_value(value)
    return shown_text(plain) if isinstance(plain, str) else plain


def _colours(ink: str, grid: str, background: str | None = None) -> dict[str, Any]:
    colours = {"labelColor": ink, "titleColor": ink}
    axis = {"gridColor": grid, "tickColor": ink, "domainColor": ink}
    return {
        "background": background,
        "axis": colours | axis,
        "legend": colours,
        "text": {"color": ink},
        "view": {"stroke": None},
    }


_ON_PAPER = _colours("#333333", "#dddddd", "white")


@cache
def chart_or_picture(name: str) -> dict[str, Any]:
    """Return the specification of a chart, a report's or a page's, whose data are called `rows`."""
    found: dict[str, Any] = REPORT_CHARTS[name]().to_dict() if name in REPORT_CHARTS else charts.specification(name)
    return found


def is_chart(name: str) -> bool:
    return name in REPORT_CHARTS or name in charts.CHARTS


def _chart_of_rows(height: int) -> Any:
    import altair

    return altair.Chart(altair.NamedData("rows"), width=charts.WIDTH, height=height)


def front() -> Any:
    """Runs on the same tokens: features per token against the variance that they miss. The run itself is filled."""
    import altair

    whole = altair.Scale(zero=True, nice=True)
    placed = _chart_of_rows(220).encode(
        x=altair.X("l0:Q", title="features per token (L0)", scale=whole),
        y=altair.Y("variance_unexplained:Q", title="variance unexplained", scale=whole),
    )
    is_this = altair.when("datum.is_current").then(altair.value(1)).otherwise(altair.value(0))
    points = placed.mark_point(size=90, fill="#4c78a8").encode(
        fillOpacity=is_this, shape=altair.Shape("architecture:N", title="architecture")
    )
    return points + placed.mark_text(align="left", dx=9).encode(text="schema_name:N")


def cosines() -> Any:
    """Features by the cosine with their nearest neighbour."""
    import altair

    return _chart_of_rows(charts.HEIGHT).mark_bar().encode(
        x=altair.X("from_cosine:Q", title="cosine with the nearest neighbour", bin="binned"),
        x2="to_cosine:Q",
        y=altair.Y("n_features:Q", title="features"),
    )  # fmt: skip


def timeline() -> Any:
    """Stages by the time of their last publication; a bar is as long as the stage says that it took."""
    import altair

    placed = _chart_of_rows(110).encode(
        y=altair.Y("stage:N", title=None, sort=["tokens", "activations", "saes", "features"])
    )
    bars = placed.transform_calculate(began="toDate(datum.written) - 1000 * datum.seconds").transform_filter(
        "isValid(datum.seconds)"
    )
    time = altair.X("written:T", title="time (UTC)")
    return bars.mark_bar().encode(x=altair.X("began:T", title="time (UTC)"), x2="written:T") + placed.mark_point(
        filled=True, size=60
    ).encode(x=time)


def stage_bytes() -> Any:
    """Stages by what they left on the disk."""
    import altair

    return _chart_of_rows(110).mark_bar().encode(
        x=altair.X("n_bytes:Q", title="bytes on disk", axis=altair.Axis(format="~s")),
        y=altair.Y("stage:N", title=None, sort=None),
    )  # fmt: skip


REPORT_CHARTS: dict[str, Callable[[], Any]] = {
    "front": front, "cosines": cosines, "timeline": timeline, "stage_bytes": stage_bytes,
}  # fmt: skip
"""Charts by name, beside those of the pages."""
