"""Which features of one run are found again in another, by their directions: how stable a dictionary is.

Autoencoders that differ in nothing but their seeds learn partly different features. The share of features found again
says how much of a dictionary is in the data (Paulo & Belrose 2025, arXiv 2501.16615).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saeflow.query.ask import query
from saeflow.query.outside.directions import can_compare, directions_of
from saeflow.query.runs import Run
from saeflow.runtime.errors import UserError
from saeflow.runtime.memory import require_share_of_memory
from saeflow.store.store import Store

FOUND_AGAIN = (0.7, 0.9)
"""Cosines from which a feature counts as found again. Paulo & Belrose take 0.7."""

QUESTIONS = ("correlate_runs", "stg_feature_stats")
"""Questions and views that a connection must know for `match_runs`."""

_LIVE = (
    "select feature_id, n_tokens, sum_value from every_run.stg_feature_stats where run = ? and n_tokens > 0 order by 1"
)
_BLOCK = 1024
"""Features whose cosines with all others are in memory together."""


@dataclass(frozen=True)
class Matched:
    """The features of one run and their partners in another."""

    table: pa.Table
    """One row per live feature of the run, the largest cosine of a one-to-one match first.

    nearest_id is the live feature of the other run whose decoder row has the largest cosine, nearest_cosine. match_id
    and match_cosine are those of the match one to one that has the largest sum of cosines; null if no feature is left.
    n_tokens and match_n_tokens count the tokens at which the two of the match fire, each in its own run. correlation is
    that of their values over all tokens that both runs encoded and jaccard that of the tokens at which they fire, both
    null if the runs are of different tokens."""
    n_live: int
    n_other_live: int

    def share_found(self, cosine: float) -> float:
        """Share of the run's live features whose match has at least this cosine."""
        return self._share("match_cosine", cosine)

    def share_near(self, cosine: float) -> float:
        """Share of the run's live features that have a feature of at least this cosine; several may share one."""
        return self._share("nearest_cosine", cosine)

    def share_of_values(self, cosine: float) -> float:
        """Share of the run's non-zero values that belong to features whose match has at least this cosine."""
        found = pc.greater_equal(self.table["match_cosine"], cosine)
        n_found = pc.sum(pc.if_else(pc.fill_null(found, False), self.table["n_tokens"], 0)).as_py()
        return (n_found or 0) / max(pc.sum(self.table["n_tokens"]).as_py() or 0, 1)

    def _share(self, column: str, least: float) -> float:
        found = pc.sum(pc.greater_equal(self.table[column], least)).as_py()
        return (found or 0) / max(self.n_live, 1)

    def mean(self, column: str) -> float | None:
        """Return the mean of a column of the table, without nulls; None of nothing."""
        found: float | None = pc.mean(self.table[column]).as_py()
        return found


def match_runs(
    store: Store, connection: duckdb.DuckDBPyConnection, run: Run, other: Run, compare_values: bool = True
) -> Matched:
    """Match the live features of two runs one to one, for the largest sum of the cosines of their decoder rows.

    The values of a signed run may point either way: its directions first get the sign of the sum of their values.
    `compare_values` adds correlations, which reads all values of both. Memory is 8 bytes for each pair of features, and
    what DuckDB may take. Raises UserError if those bytes are more than half of the machine's memory, or if the
    directions do not lie in one space.
    """
    if not can_compare(store, run.artefact, other.artefact):
        raise UserError(
            f"{run.schema} and {other.schema} read different activations, so their directions cannot be compared."
        )
    mine, theirs = _live(connection, run), _live(connection, other)
    _require_room_for_cosines(run, len(mine), other, len(theirs))
    found = match_by_direction(_directions(store, run, mine), _directions(store, other, theirs))
    columns = {"feature_id": mine["feature_id"].combine_chunks()} | {
        f"{kind}_{name}": column
        for kind, (places, cosines) in found.items()
        for name, column in (
            ("id", _taken(theirs["feature_id"], places)),
            ("cosine", pa.array(cosines, mask=places < 0)),
        )
    }
    columns["n_tokens"] = mine["n_tokens"].combine_chunks()
    columns["match_n_tokens"] = _taken(theirs["n_tokens"], found["match"][0])
    table = pa.table(columns).append_column("row", pa.array(range(len(mine))))
    table = _with_correlations(connection, run, other, table, compare_values)
    order = [("match_cosine", "descending"), ("feature_id", "ascending")]
    return Matched(table.sort_by(order).drop_columns("row"), len(mine), len(theirs))


def _live(connection: duckdb.DuckDBPyConnection, run: Run) -> pa.Table:
    return query(connection, _LIVE, [run.schema])


def _require_room_for_cosines(run: Run, n_mine: int, other: Run, n_theirs: int) -> None:
    sizes = f"{run.schema} has {n_mine:,} live features and {other.schema} {n_theirs:,}"
    remedy = "Use a larger machine. `saeflow ask compare_runs` finds features that fire on the same tokens."
    require_share_of_memory(8 * n_mine * n_theirs, f"{sizes}: to match them takes", remedy)


def _directions(store: Store, run: Run, live: pa.Table) -> Any:
    """Return the decoder rows (n, D) of the live features."""
    import torch

    rows = directions_of(store, run)[torch.from_numpy(live["feature_id"].to_numpy().copy())]
    signs = np.where((live["sum_value"].to_numpy() < 0) & bool(run.shape["is_signed"]), -1, 1).astype(np.float32)
    return rows * torch.from_numpy(signs)[:, None]


def match_by_direction(mine: Any, theirs: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return places (n,) among the other run's directions, -1 for none, with their cosines: nearest, and one to one."""
    from saeflow.sae.recovery import cosine_blocks, match_directions

    nearest, largest = np.full(len(mine), -1), np.zeros(len(mine))
    matched, matched_cosines = match_directions(mine, theirs, _BLOCK), np.zeros(len(mine))
    for rows, cosines in cosine_blocks(mine, theirs, _BLOCK) if len(theirs) else ():
        nearest[rows], largest[rows] = cosines.argmax(1), cosines.max(1)
        places = np.maximum(matched[rows], 0)
        matched_cosines[rows] = cosines[np.arange(len(cosines)), places]
    return {"nearest": (nearest, largest), "match": (matched, matched_cosines)}


def _taken(column: pa.ChunkedArray, places: np.ndarray) -> pa.Array:
    """Return the column's values at these places, null where a place is -1."""
    return column.combine_chunks().take(pa.array(places, mask=places < 0))


def _with_correlations(
    connection: duckdb.DuckDBPyConnection, run: Run, other: Run, table: pa.Table, compare_values: bool
) -> pa.Table:
    """Add how alike the values of the matched features are, null if the runs are of different tokens."""
    matched = table.filter(pc.is_valid(table["match_id"]))
    is_same = run.artefact.record.input("tokens") == other.artefact.record.input("tokens")
    columns: dict[str, list[float | None]] = {name: [None] * len(table) for name in ("correlation", "jaccard")}
    if compare_values and is_same and len(matched):
        pairs = [matched[name].to_pylist() for name in ("feature_id", "match_id")]
        sql = "select correlation, jaccard from correlate_runs(?, ?, ?, ?)"
        for place, row in zip(
            matched["row"].to_pylist(),
            query(connection, sql, [run.schema, other.schema, *pairs]).to_pylist(),
            strict=True,
        ):
            for name in columns:
                columns[name][place] = row[name]
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.float64()))
    return table


def draw_matches(matched: Matched, run: str, other: str, path: Path, kind: str) -> None:
    """Draw how many features have a match, and a nearest feature, at each cosine. `kind`: png, svg or pdf."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    bins = list(np.linspace(-0.2, 1, 61))
    nearest, match = (
        np.clip(matched.table[name].drop_null().to_numpy(), bins[0], bins[-1])
        for name in ("nearest_cosine", "match_cosine")
    )
    axes.hist(nearest, bins=bins, histtype="step", label="nearest")
    axes.hist(match, bins=bins, alpha=0.5, label="matched one to one")
    for cosine in FOUND_AGAIN:
        axes.axvline(cosine, color="gray", linestyle=":")
        axes.annotate(
            f"{matched.share_found(cosine):.0%} ≥ {cosine}",
            (cosine, 0.98),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="right",
            va="top",
        )
    axes.set_xlabel("cosine of decoder rows")
    run, other = (name.replace("$", r"\$") for name in (run, other))
    axes.set_ylabel(f"features of {run}")
    axes.set_title(f"{run} in {other}: {matched.n_live:,} live features")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=110, format=kind)
