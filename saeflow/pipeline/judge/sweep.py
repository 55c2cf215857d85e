"""The table and picture of a sweep: every SAE judged on the same held-out tokens, and the Pareto front."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saeflow.pipeline.judge import evaluate
from saeflow.pipeline.lineage import Lineage, grouped
from saeflow.recipe.fingerprint import FORMAT_VERSION, fingerprint
from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import n_threads, use_threads
from saeflow.sae.formats.load import load_sae
from saeflow.store.files import replacing
from saeflow.store.lease import Lease
from saeflow.store.records import read_or_empty, write_checked

TABLE, PICTURE = "table.json", "pareto.png"
JUDGED_FIGURES = ("n_tokens", "l0", "variance_unexplained", "mean_squared_error", "shrinkage", "silent", "judged_on")
"""The figures of `evaluate.Judged` that the table keeps."""
_LABELLED = 24
"""If there are more SAEs, only those on the front get a label."""
_LEAST_L0 = 0.01
"""Where an SAE that never fires is drawn on the logarithmic axis."""


def run(lineage: Lineage, progress: Progress) -> dict[str, Any]:
    """Judge the SAEs of a sweep in one reading of the held-out tokens, draw the picture, and return the table."""
    store = lineage.store
    missing = [member.sae.name for member in lineage.members if not member.sae.complete()]
    if missing:
        raise UserError(f"Not trained yet: {', '.join(missing)}. Run `saeflow train RECIPE` first.")
    path = folder_of(lineage)
    with store.writing(f"sweeps-{path.name}", f"the table of {lineage.recipe.name}") as lease:
        store.storage.pull_one(path)  # another machine may have judged since this process began
        return _judge_and_draw(lineage, path, progress, lease)


def _judge_and_draw(lineage: Lineage, path: Path, progress: Progress, lease: Lease) -> dict[str, Any]:
    store, recipe, members = lineage.store, lineage.recipe, lineage.members
    folders = [part.folder for part in lineage.activations.published().parts]
    digest = fingerprint(folders, lineage.tokens.published().hidden_ids)  # of the tokens to judge on
    judged = {"name": recipe.name, "max_tokens": recipe.evaluate.max_tokens, "tokens": digest}
    known = read_or_empty(path / TABLE)
    if known:
        with contextlib.suppress(FileNotFoundError):
            store.storage.fetch(path / PICTURE)
    if {name: known.get(name) for name in judged} == judged and (path / PICTURE).is_file():
        progress.skip("evaluate", f"{len(members)} SAEs in {path}")
        return known
    use_threads(recipe.threads)
    rows = _table_rows(members, _figures_of_members(members, progress))
    table = {"format_version": FORMAT_VERSION} | judged | {"saes": rows}
    picture = draw(recipe.name, rows)
    with lease.fence():
        write_checked(path / TABLE, table)
        with replacing(path / PICTURE) as temporary:
            picture.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
        store.storage.send(path / TABLE, path / PICTURE)
    progress.say(f"evaluate: table and picture in {path}")
    return table


def folder_of(lineage: Lineage) -> Path:
    fps = [member.sae.fp for member in lineage.members]
    return lineage.store.root / "sweeps" / f"{lineage.recipe.name}-{fingerprint(fps)}"


def picture_of(lineage: Lineage) -> Path:
    return folder_of(lineage) / PICTURE


def _figures_of_members(members: Sequence[Lineage], progress: Progress) -> list[dict[str, Any]]:
    """Return the figures of every SAE. SAEs of the same sites are judged in one reading."""
    figures: dict[str, dict[str, Any]] = {}
    for together in grouped(members, lambda member: member.sites):
        saes = [load_sae(member.sae.fetched(), n_threads(member.recipe.threads)) for member in together]
        found = evaluate.judge_together(together[0], saes, progress)
        figures |= {member.recipe.name: judged.figures for member, judged in zip(together, found, strict=True)}
    return [figures[member.recipe.name] for member in members]


def _table_rows(members: Sequence[Lineage], figures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    front = pareto([(each["l0"], each["variance_unexplained"]) for each in figures])
    return [
        {
            "member": member.recipe.name,
            "sae": member.sae.id,
            "architecture": member.sae_config.architecture,
            "sparsity": sparsity(member.recipe.sae),
            "n_features": member.sae_config.n_features,
            "on_front": number in front,
            **{name: figures[number][name] for name in JUDGED_FIGURES},
            "l0_missed": member.recipe.sae.misses_k(figures[number]["l0"]),
        }
        for number, member in enumerate(members)
    ]


def sparsity(config: SAEConfig) -> str:
    """Return the setting that decides how many features are active, and its value."""
    if config.source is not None:
        return "imported"
    if config.counts_k or (config.architecture == "jumprelu" and config.penalty == "l0"):
        return f"k {config.k}"
    return f"penalty {config.penalty_weight if config.architecture == 'jumprelu' else config.l1_weight:g}"


def pareto(points: Sequence[tuple[float, float]]) -> set[int]:
    """Return indices of the points that no other point betters; smaller is better. Equal points are all returned."""
    return {
        number
        for number, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    }


def recommended(rows: Sequence[dict[str, Any]]) -> str:
    """Return the member in the middle of the front, to try first."""
    front = sorted((row for row in rows if row["on_front"]), key=lambda row: float(row["l0"]))
    return str(front[len(front) // 2]["member"])


def draw(name: str, rows: Sequence[dict[str, Any]]) -> Any:
    """Plot L0 against variance unexplained: a colour and marker for each architecture, the Pareto front as a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    front = sorted((_place_in_picture(row) for row in rows if row["on_front"]), key=lambda place: place[0])
    axes.plot(
        *zip(*front, strict=True), color="0.75", linewidth=6, solid_capstyle="round", zorder=1, label="Pareto front"
    )
    for number, architecture in enumerate(dict.fromkeys(row["architecture"] for row in rows)):
        places = [_place_in_picture(row) for row in rows if row["architecture"] == architecture]
        axes.scatter(
            *zip(*places, strict=True), marker="osD^vP"[number % 6], color=f"C{number}", label=architecture, zorder=2
        )
    for row in rows:
        if row["on_front"] or len(rows) <= _LABELLED:
            below = not row["on_front"]
            axes.annotate(
                _label_of_member(name, row), _place_in_picture(row), (4, 4) if below else (-4, -4),
                textcoords="offset points", fontsize=7,
                ha="left" if below else "right", va="bottom" if below else "top",
            )  # fmt: skip
    axes.set_xscale("log")
    for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis(StrMethodFormatter("{x:g}"))
    axes.margins(0.12)
    axes.set_xlabel("active features per token (L0)")
    axes.set_ylabel("variance unexplained")
    axes.set_title(f"{name}: {len(rows)} SAEs on {rows[0]['judged_on']}")
    axes.legend(fontsize=8)
    return figure


def _place_in_picture(row: dict[str, Any]) -> tuple[float, float]:
    return max(float(row["l0"]), _LEAST_L0), float(row["variance_unexplained"])


def _label_of_member(name: str, row: dict[str, Any]) -> str:
    """Return a member's name without the sweep's name and the architecture, which the picture shows."""
    return str(row["member"]).removeprefix(f"{name}_").removeprefix(row["architecture"]).strip("_")
