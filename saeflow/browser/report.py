"""A report of a run: one HTML file with its pictures in it, and each picture as a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from markupsafe import Markup

from saeflow.browser import pictures
from saeflow.browser.address import Asked
from saeflow.browser.answers import Page, as_html
from saeflow.browser.connections import OpenedRun
from saeflow.browser.output import OutputFolder
from saeflow.browser.panels import Answer, Panel, address_of_run
from saeflow.browser.static_copy import static_copy

REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""What the file may load: nothing. Its style sheet is inside it."""

REPORT_FILES = ("report.html", "pictures/*.svg", "pictures/*.png")
"""Files of a report."""

N_FEATURES, N_CONTEXTS_EACH = 20, 5
"""Features that a report shows, and contexts of each."""

MOST_STEPS = 100_000
"""Most steps of a training that its picture shows."""

REPORT_PANELS = [
    Panel("metrics", "Metrics", "metrics"),
    Panel("training", "Training", "training_curve", view="curves", most_rows=MOST_STEPS),
    Panel("density", "How often features fire", "density_histogram", view="densities",
          about="Features by the share of the tokens on which they fire. Those that never fire are in the numbers."),
    Panel("front", "L0 against variance unexplained", "runs_on_same_tokens", view="front",
          about="The runs on the same tokens. The point of this run is filled."),
    Panel("cosines", "Nearest neighbours", "decoder_cosines", view="cosines",
          about="Features by the cosine of their direction with the most similar other direction."),
    Panel("timeline", "When the stages were made", "stages", view="timeline",
          about="A point is a stage's last publication; a bar is the time it took, if its record says so."),
    Panel("bytes", "What the stages left on the disk", "stages", view="stage_bytes"),
    Panel("settings", "Settings that differ from the default", "settings", view="changed"),
    Panel("features", f"The {N_FEATURES} most telling features", "find_features", {"n": N_FEATURES}, "listed"),
]  # fmt: skip


def write_report(opened: OpenedRun, folder: OutputFolder, advance: Callable[[int], None]) -> None:
    """Write `report.html` and the folder `pictures` in place of those of an earlier report."""
    found = []
    for answer in ask_for_report(opened):
        found.append(answer)
        advance(1)
    html = as_report(opened, found)
    drawn = [answer for answer in found if pictures.is_chart(answer.panel.view) and answer.rows]
    files = {f"{answer.panel.name}.svg": pictures.as_svg(answer.panel.view, answer.rows).encode() for answer in drawn}
    files |= {f"{answer.panel.name}.png": pictures.as_png(answer.panel.view, answer.rows) for answer in drawn}
    folder.clear()
    folder.begin({"run": opened.run.artefact.id})
    for name, content in files.items():
        folder.put(f"pictures/{name}", content)
    folder.put("report.html", html.encode())


def ask_for_report(opened: OpenedRun) -> Iterator[Answer]:
    """Yield the panels of a report, and at the end the contexts of the most telling features."""
    for panel in REPORT_PANELS:
        yield (answer := panel.ask(opened))
    for row in answer.rows:
        if not row["n_tokens"]:
            continue
        feature = row["feature_id"]
        title = f"Feature {feature}" + (f": {row['label']}" if row["label"] else "")
        arguments = {"feature": feature, "n": N_CONTEXTS_EACH}
        yield Panel(f"feature-{feature}", title, "feature_contexts", arguments, "contexts").ask(opened)


def as_report(opened: OpenedRun, found: list[Answer]) -> str:
    """Return the report as HTML that needs no other file."""
    style = Markup((Path(__file__).parent / "static" / "browser.css").read_text("utf-8"))
    page = Page("report.html", f"Report of {opened.run.schema}", found, opened.run.schema)
    common = {"store_name": opened.store.name, "policy": REPORT_POLICY, "style": style}
    html = as_html(page, Asked({}, {}, {}, ""), drawn=True, **common)
    here = f"{address_of_run(opened.run.schema)}/features/"
    inside = {answer.link: f"#sql-{answer.panel.name}" for answer in found}
    inside |= {
        f"{here}{answer.values['feature']}": f"#{answer.panel.name}" for answer in found if "feature" in answer.values
    }
    return static_copy(html, "report.html", inside)
