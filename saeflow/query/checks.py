"""Run the checks of `sql/checks`: on a whole run, and on parts before they are published."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import duckdb
import pyarrow as pa

from saeflow.query.catalog import sql_folder
from saeflow.query.connection import connect_parts
from saeflow.recipe.settings import FeaturesConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.sql_errors import QUERY_ERRORS, is_of_system, message
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord
from saeflow.store.store import Store

CHECK_VALUES = FeaturesConfig().check_values
"""Most values to check, if no recipe says how many."""


def check(connection: duckdb.DuckDBPyConnection, limit: int = 1000) -> list[tuple[str, pa.Table]]:
    """Return each check with the rows that break it, at most `limit` of them. No rows is good."""
    paths = sorted((sql_folder() / "checks").glob("*.sql"))
    return [(path.stem, _offending_rows(connection, path.read_text("utf-8"), path.stem, limit)) for path in paths]


def _offending_rows(connection: duckdb.DuckDBPyConnection, sql: str, name: str, limit: int) -> pa.Table:
    try:
        return connection.sql(sql).limit(limit).to_arrow_table()
    except QUERY_ERRORS as error:
        if is_of_system(error):
            raise
        raise UserError(f"{name} failed.\n{message(error)}") from error


def parts_to_check(parts: Sequence[PartRecord], most_values: int) -> list[PartRecord]:
    """Return the last of these parts, with at most `most_values` values together, but at least one part; none if 0."""
    found: list[PartRecord] = []
    for part in reversed(parts):
        n_values = sum(each.counts["n_values"] for each in [*found, part])
        if most_values == 0 or (found and n_values > most_values):
            break
        found.append(part)
    return found[::-1]


def require(store: Store, target: Artefact, parts: Sequence[PartRecord], most_values: int, progress: Progress) -> None:
    """Check finished parts of a run before they are published.

    If they break a check, removes them, so that the next run makes them again, and raises UserError.
    """
    taken = parts_to_check(parts, most_values)
    if not taken:
        return
    n_values = sum(part.counts["n_values"] for part in taken)
    with (
        progress.bar("checks", n_values, "values") as bar,
        contextlib.closing(connect_parts(store, target, taken)) as db,
    ):
        broken = [f"{name} ({len(rows)} rows)" for name, rows in check(db) if len(rows)]
        bar.advance(n_values)
    if not broken:
        return
    for part in parts:
        target.remove(target.part_path(part))
    raise UserError(
        f"The parts just encoded for {target.id} break {len(broken)} checks: {', '.join(broken)}.\n"
        "They were removed, and none was published. Look for a failing disk or memory (saeflow verify --full), then "
        "run the same command again."
    )
