"""Charts in Vega-Lite. Altair writes each specification once, without data; a page brings its rows as inline JSON."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saeflow.query.text_formats import as_json_value
from saeflow.store.files import replacing

WIDTH, HEIGHT = 420, 160
"""Size of a chart, in pixels."""


def chart(name: str, rows: Sequence[Mapping[str, Any]], label: str) -> Markup:
    """Return a chart of these rows as HTML: its specification and data as JSON, which the page's script draws."""
    spec = copy.deepcopy(specification(name))
    fields = _fields_of(spec)
    spec["datasets"] = {"rows": [{field: _short(row.get(field)) for field in fields} for row in rows]}
    return _chart_figure(spec, label)


def tiny_histogram(counts: Sequence[int], from_value: float | None) -> Markup:
    """Return a histogram of values as a small picture in a line of text. Bars are drawn by the root of the count."""
    if not counts or not from_value:
        return Markup("")
    tallest = math.sqrt(max(counts))
    bars = "".join(
        f"M{3 * i} 16V{16 - max(1, round(15 * math.sqrt(count) / tallest))}h2V16"
        for i, count in enumerate(counts)
        if count
    )
    label = f"Values from {from_value:.3g} to {from_value * 2 ** (len(counts) / 4):.3g}"
    return Markup(
        '<svg class="tiny" role="img" aria-label="{}" width="{}" height="16"><path fill="currentColor" d="{}"/></svg>'
    ).format(label, 3 * len(counts), bars)


def chart_of(name: str, url: str, rows: str, label: str, run: str) -> Markup:
    """Return a chart of features as HTML; the page's script fetches its rows from a page's JSON, and opens a feature.

    `rows` is the path of the rows in that JSON, `run` the address of the run. Many points are quicker so.
    """
    spec = copy.deepcopy(specification(name))
    spec["data"] = {"url": url, "format": {"type": "json", "property": rows}}
    spec.setdefault("transform", []).append(
        {"calculate": f"{json.dumps(run + '/features/')} + datum.feature_id", "as": "address"}
    )
    return _chart_figure(spec, label)


def _chart_figure(spec: Mapping[str, Any], label: str) -> Markup:
    figure = Markup('<figure class="chart" role="img" aria-label="{}"><script type="application/json">').format(label)
    return figure + Markup(as_script(spec)) + Markup("</script></figure>")


def as_script(spec: Mapping[str, Any]) -> str:
    """Return a specification as JSON that may stand inside a page."""
    text = json.dumps(spec, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _fields_of(spec: object) -> list[str]:
    """Return the columns that a specification draws."""
    if isinstance(spec, list):
        return sorted({name for each in spec for name in _fields_of(each)})
    if not isinstance(spec, dict):
        return []
    own = {spec["field"]} if isinstance(spec.get("field"), str) else set()
    return sorted(own.union(*map(_fields_of, spec.values())))


def _short(value: object) -> object:
    """Return a number with as many digits as a picture shows."""
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else as_json_value(value)


@cache
def specification(name: str) -> dict[str, Any]:
    """Return the specification of a chart whose data are called `rows`."""
    found: dict[str, Any] = CHARTS[name]().to_dict()
    return found


def _base(width: int = WIDTH, height: int = HEIGHT) -> Any:
    import altair

    return altair.Chart(altair.NamedData("rows"), width=width, height=height)


def histogram() -> Any:
    """Values of a feature: tokens for each bin."""
    import altair

    return _base(380).mark_bar().encode(
        x=altair.X("from_value:Q", bin="binned", title="value", scale=altair.Scale(type="symlog", constant=0.1)),
        x2="to_value:Q",
        y=altair.Y("n_tokens:Q", title="tokens"),
        tooltip=["from_value:Q", "to_value:Q", "n_tokens:Q"],
    )  # fmt: skip


def densities() -> Any:
    """Densities of features: features for each bin."""
    import altair

    bins = _base().transform_filter("datum.from_density > 0").mark_bar()
    return bins.encode(
        x=altair.X(
            "from_density:Q",
            title="density",
            scale=altair.Scale(type="log"),
            axis=altair.Axis(format=".0e", tickCount=6),
        ),
        x2="to_density:Q",
        y=altair.Y("n_features:Q", title="features"),
        y2=altair.datum(0),
        tooltip=["from_density:Q", "to_density:Q", "n_features:Q"],
    )


def curves() -> Any:
    """Measures of a training by tokens: four small charts."""
    import altair

    def curve(field: str, title: str, scale: Any = "linear") -> Any:
        y = altair.Y(f"{field}:Q", title=title, scale=altair.Scale(type=scale))
        x = altair.X("n_tokens:Q", title="tokens", axis=altair.Axis(format="~s", tickCount=5))
        return _base(WIDTH, 120).mark_line(strokeWidth=1.2).encode(x=x, y=y)

    named = [
        ("variance_unexplained", "variance unexplained", "log"),
        ("l0", "L0"),
        ("dead", "dead features"),
        ("lr", "learning rate"),
    ]
    return altair.concat(*(curve(*each) for each in named), columns=2)


def _feature_points(width: int, height: int, x: Any, y: Any, *told: str) -> Any:
    """Features as points that open their pages."""
    import altair

    colour = altair.Color(
        "density:Q", scale=altair.Scale(type="log", scheme="viridis"), legend=altair.Legend(format=".0e")
    )
    points = _base(width, height).mark_circle(size=14, opacity=0.7, cursor="pointer")
    return points.transform_filter("datum.density > 0").encode(
        x=x, y=y, color=colour, href="address:N", tooltip=["feature_id:Q", "label:N", "density:Q", *told]
    )


def scatter() -> Any:
    """Density against the largest value."""
    import altair

    x = altair.X("density:Q", scale=altair.Scale(type="log"), axis=altair.Axis(format=".0e", tickCount=6))
    y = altair.Y("max_value:Q", title="largest value", scale=altair.Scale(type="symlog"))
    return _feature_points(700, 320, x, y, "max_value:Q")


def map_() -> Any:
    """Places on the plane, without axes: they have no meaning."""
    import altair

    x, y = (altair.X("x:Q", axis=None), altair.Y("y:Q", axis=None))
    return _feature_points(800, 640, x, y, "max_value:Q")


CHARTS: dict[str, Callable[[], Any]] = {
    "histogram": histogram,
    "densities": densities,
    "curves": curves,
    "scatter": scatter,
    "map": map_,
}
"""Charts by name."""


def chart_script() -> Path:
    """Return the file of the script that draws charts. vl-convert makes it once; then it lies in the user's cache."""
    import vl_convert

    version = importlib.metadata.version("vl-convert-python")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saeflow"
    path = folder / f"charts-{version}.js"
    if not path.is_file():
        script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text("{" + script + "}", "utf-8")
    return path
