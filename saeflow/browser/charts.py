"""Charts in Vega-Lite. Altair writes each specification once, without data; a page brings its rows as inline JSON."""

from __future__ import annotations

import copy
import importlib.metadata
import json
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
    spec["datasets"] = {"rows": [as_json_value(dict(row)) for row in rows]}
    text = json.dumps(spec, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    figure = Markup('<figure class="chart" role="img" aria-label="{}"><script type="application/json">').format(label)
    return figure + Markup(text) + Markup("</script></figure>")


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

    return _base().mark_bar().encode(
        x=altair.X("from_value:Q", bin="binned", title="value", scale=altair.Scale(type="symlog", constant=0.1)),
        x2="to_value:Q",
        y=altair.Y("n_tokens:Q", title="tokens"),
        tooltip=["from_value:Q", "to_value:Q", "n_tokens:Q"],
    )  # fmt: skip


CHARTS: dict[str, Callable[[], Any]] = {"histogram": histogram}
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
