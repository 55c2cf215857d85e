"""Fetch what a question needs beyond the run's files. Every way to ask calls this first."""

from __future__ import annotations

from collections.abc import Mapping

import duckdb
import pyarrow as pa

from saeflow.query.ask import Readings
from saeflow.query.new_text import read_if_needed
from saeflow.query.outside.directions import cosines_with
from saeflow.query.outside.selection import chosen_tokens
from saeflow.query.questions import Question, Value
from saeflow.query.runs import Run
from saeflow.store.store import Store


def supply(
    store: Store, run: Run, connection: duckdb.DuckDBPyConnection, question: Question, values: Mapping[str, Value]
) -> Readings | pa.Array | None:
    """Return the readings that `ask` takes for this question; None if it needs none. Raises UserError."""
    if question.takes_select:
        return chosen_tokens(connection, question.name, values)
    if question.compares_directions:
        return cosines_with(store, run, str(values["other_run"]), values["feature"])
    return read_if_needed(store, run, question, values)
