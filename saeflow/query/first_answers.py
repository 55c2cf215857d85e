"""Three questions to ask first about any run, with their answers."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from saeflow.query.ask import ask
from saeflow.query.runs import runs
from saeflow.store.store import Store

_LARGEST_SOURCES = """
select source from stg_documents group by source order by sum(n_tokens) desc, source limit 2
"""

_STRIKING = """
select feature_id from feature_summary where n_tokens > 0
order by density between 0.0005 and 0.01 desc, abs(max_value) desc, feature_id limit 2
"""

READ_BY_ANSWERS = ("compare_sources", "feature_summary", "top_tokens", "stg_documents")
"""What `first_answers` asks."""

_FEWEST_TOKENS = 200
"""A feature can stand for a source only if it fires this often in it."""

NEXT = ("ask feature_summary", "ask search_token the", "sql 'select * from runs'")
"""Commands to try next."""


def next_commands(store: Store, run: str, where: str) -> list[str]:
    """Return commands to type after a run. `where` is the option that names the store."""
    which = which_run(store, run)
    return [f"saeflow {line}{where}" for line in ("ask", *(f"{asked}{which}" for asked in NEXT), "ls")]


def which_run(store: Store, run: str) -> str:
    """Return the option that names this run, or nothing if commands ask it by default."""
    readable = [each for each in runs(store) if each.problem is None]
    if not readable:
        return ""
    mine = next((each for each in readable if each.artefact.id == run), readable[0])
    return f" --run {shlex.quote(mine.schema)}" if mine is not readable[0] else ""


@dataclass(frozen=True)
class FirstAnswer:
    """A question with its arguments, and the columns and rows of its answer that fit on a page."""

    question: str
    arguments: list[str]
    table: pa.Table


def first_answers(connection: duckdb.DuckDBPyConnection, n_rows: int = 6) -> Iterator[FirstAnswer]:
    """Yield which features tell the two largest sources apart, and where the most telling feature of each fires."""
    sources = [row[0] for row in connection.execute(_LARGEST_SOURCES).fetchall()]
    if len(sources) == 2:
        table = ask(connection, "compare_sources", sources)
        shown = table.select(["feature_id", "rate_a", "rate_b", "log2_ratio"]).slice(0, n_rows)
        yield FirstAnswer("compare_sources", sources, shown)
        features = _most_telling(table)
    else:
        columns = ["feature_id", "n_tokens", "density", "mean_value", "max_value"]
        yield FirstAnswer("feature_summary", [], ask(connection, "feature_summary", [], n_rows).select(columns))
        features = [row[0] for row in connection.execute(_STRIKING).fetchall()]
    for feature in features:
        arguments = [str(feature), str(n_rows)]
        table = ask(connection, "top_tokens", arguments).select(["value", "source", "context"])
        yield FirstAnswer("top_tokens", arguments, table)


def _most_telling(comparison: pa.Table) -> list[int]:
    """Return one feature for each source: it fires there often, and much more often than in the other source."""
    rows = [row for row in comparison.to_pylist() if row["log2_ratio"] is not None]
    found = []
    for side, sign in (("n_tokens_a", 1), ("n_tokens_b", -1)):
        often = [row for row in rows if row[side] >= _FEWEST_TOKENS]
        if often:
            best = max(often, key=lambda row: sign * row["log2_ratio"] * math.log(row[side]))
            found.append(int(best["feature_id"]))
    return found
