"""Questions from Python: `saeflow.open` gives a run whose answers are Arrow tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType

import duckdb
import pyarrow as pa

from saeflow.query import ask as queries
from saeflow.query.questions import Question
from saeflow.query.runs import Run
from saeflow.query.runs import open_run as opened_run
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store, store_path


class OpenRun:
    """A run of a store, to be asked. Close it, or use it in a `with` block.

    Answers are `pyarrow.Table`s, with no Python object for a row. Those of `sql` are in DuckDB's own memory; those of
    named questions it copies once inside itself, as planning a short statement twice takes longer. `.to_pandas()` and
    `polars.from_arrow(table)` go on from there. Use it from one thread at a time.
    """

    def __init__(self, store: Store, run: Run, connection: duckdb.DuckDBPyConnection) -> None:
        self.store, self._run, self._connection = store, run, connection

    @property
    def name(self) -> str:
        """What the run is called in SQL: its schema."""
        return self._run.schema

    @property
    def n_features(self) -> int | None:
        return self._run.shape.get("n_features")

    @property
    def n_tokens(self) -> int | None:
        return self._run.n_tokens

    def ask(self, question: str, *arguments: object, limit: int | None = None, **named: object) -> pa.Table:
        """Answer a named question; its parameters by position, by name, or both. Lists are Python lists.

            run.ask("top_tokens", feature=12, n=5)
            run.ask("tokens_where", 12, 0.5)

        Raises UserError for a question, parameter, feature, source or run that is not there.
        """
        asked = queries.find(question)
        values = queries.named(asked, _joined(asked, arguments, named))
        return queries.ask(self._connection, question, queries.resolved(self._connection, asked, values), limit)

    def sql(self, statement: str, parameters: Sequence[object] = (), limit: int | None = None) -> pa.Table:
        """Run one statement that only reads; each `?` in it is one of the parameters. Raises UserError."""
        return queries.query(self._connection, statement, parameters, limit)

    def questions(self) -> list[Question]:
        """What can be asked: names, parameters, and what each answers."""
        return queries.questions()

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> OpenRun:
        return self

    def __exit__(
        self, type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        counts = [f"{n:,} {what}" for n, what in ((self.n_features, "features"), (self.n_tokens, "tokens")) if n]
        return f"<saeflow run {self.name!r} of {self.store.name!r}{': ' if counts else ''}{', '.join(counts)}>"


def open_run(
    store: str | os.PathLike[str] | None = None,
    run: str | None = None,
    *,
    memory_limit: str | None = None,
    threads: int | None = None,
) -> OpenRun:
    """The run of this name in a store (folder or URL), by default the newest; without a store SAEFLOW_STORE, else
    data/store.

    `memory_limit` ("2GB") and `threads` are DuckDB's. Raises UserError where there is no such store or run.
    """
    opened = Store.open(store_path(None if store is None else os.fspath(store)))
    return OpenRun(opened, *opened_run(opened, run, memory_limit, threads))


def _joined(question: Question, arguments: Sequence[object], named: dict[str, object]) -> dict[str, object]:
    names = [parameter.name for parameter in question.parameters]
    if len(arguments) > len(names):
        raise UserError(f"{question.name} takes {len(names)} arguments, not {len(arguments)}: {question.usage}")
    by_place = dict(zip(names, arguments, strict=False))
    for twice in by_place.keys() & named.keys():
        raise UserError(f"{question.name} is given {twice} twice. Ask it as: {question.usage}")
    return by_place | named
