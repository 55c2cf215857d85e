"""A panel of a page: a named question with its arguments, its rows, and the SQL that gives the same rows."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from saeflow.browser.connections import OpenedRun
from saeflow.query.ask import ask, resolve_names
from saeflow.query.outside.supply import supply
from saeflow.query.questions import Question, Value, find_question, parse_arguments
from saeflow.query.text_formats import for_python
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, human_bytes

MOST_ROWS = 1_000
"""Rows of a panel on a page."""

MOST_FEATURES = 50
"""Features of a panel that ranks them."""

MOST_IN_A_FILE = 200_000
"""Rows of a panel in JSON, CSV or Parquet."""

MOST_BYTES = 256 << 20
"""Bytes of a panel's rows as a table; as text they take several times as many."""

LONGEST_TEXT = 5_000
"""Characters of a text that the model reads for a page."""


@dataclass(frozen=True)
class Panel:
    """What a page asks: a question with its arguments. A macro of `templates/views.html` draws it: `view`."""

    name: str
    """The panel's name in the page's JSON, and its anchor in the page."""
    title: str
    question: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    view: str = "table"
    most_rows: int = MOST_ROWS
    about: str = ""
    """A sentence under the title."""
    if_none: str = "No rows."
    """The sentence instead of rows, if there are none: which command makes them."""

    def ask(self, opened: OpenedRun) -> Answer:
        """Answer the panel's question. Raises UserError for arguments that fit nothing."""
        question = find_question(self.question)
        values = resolve_names(opened.cursor, question, parse_arguments(question, self.arguments))
        if question.runs_model:
            _refuse_model_or_text(str(values["text"]), str(values["model"] or ""))
        if question.takes_select:
            _refuse_select(question, values)
        readings = supply(opened.store, opened.run, opened.cursor, question, values)
        table = ask(opened.cursor, self.question, values, self.most_rows + 1, readings, opened.run)
        refuse_large(table)
        return Answer(self, question, values, opened.run.schema, for_python(table))


@dataclass(frozen=True)
class Answer:
    """The rows of a panel."""

    panel: Panel
    question: Question
    values: Mapping[str, Value]
    schema: str
    whole: pa.Table = field(repr=False)
    """The rows, with one more than is shown if there are more."""
    words: Mapping[int, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    """What features of the rows look like in words: see `with_words`."""

    @property
    def table(self) -> pa.Table:
        return self.whole.slice(0, self.panel.most_rows)

    @property
    def has_more(self) -> bool:
        return len(self.whole) > self.panel.most_rows

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.table.to_pylist()
        return rows

    @property
    def sql(self) -> str:
        """The statement that gives these rows in any DuckDB shell with the store's catalog."""
        limit = f" limit {self.panel.most_rows}" if self.has_more else ""
        return f"{self.question.as_sql(self.values, self.schema)}{limit};"

    @property
    def link(self) -> str:
        """The address of the question's own page, with these arguments."""
        given = {
            p.name: self.values[p.name] for p in self.question.parameters if self.values[p.name] != p.default_value
        }
        return f"{address_of_run(self.schema)}/ask/{self.question.name}{as_query(given)}"

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.panel.title,
            "question": self.question.name,
            "arguments": {name: value for name, value in self.values.items() if value is not None},
            "sql": self.sql,
            "rows": self.rows,
            "has_more": self.has_more,
        }


def with_words(answers: Sequence[Answer], opened: OpenedRun) -> list[Answer]:
    """Return answers whose tables say beside each feature what it looks like, and the answer that says so."""
    names = ("feature_id", "other_id")
    features = sorted({row[name] for each in answers for row in each.rows for name in names if name in row})
    if not features:
        return list(answers)
    found = Panel(
        "words", "What the features fire on and push up", "feature_words", {"features": features}, "none"
    ).ask(opened)
    words = {row["feature_id"]: row for row in found.rows}
    return [*(replace(answer, words=words) for answer in answers), found]


def refuse_large(table: pa.Table, most: int = MOST_BYTES) -> None:
    if table.nbytes > most:
        raise UserError(
            f"The answer takes {human_bytes(table.nbytes)}; pages give at most {human_bytes(most)}.\n"
            "Ask for fewer rows, or in a terminal: saeflow ask"
        )


def _refuse_model_or_text(text: str, model: str) -> None:
    """A page waits for the model, and no address may have it looked for elsewhere than on this machine."""
    if len(text) > LONGEST_TEXT:
        raise UserError(f"The text is longer than {LONGEST_TEXT:,} characters. Ask in a terminal: saeflow ask.")
    if model and not Path(model).is_absolute():
        raise UserError(f"model is {brief(model)!r}, but on a page it must be the whole path of a folder, from / on.")


def _refuse_select(question: Question, values: Mapping[str, Value]) -> None:
    """A page takes no SQL: whoever can reach it could keep the machine busy."""
    if values["sql"]:
        raise UserError(f"A page runs no SQL. Give tokens, or ask in a terminal: saeflow ask {question.name} --sql …")


def address_of_run(schema: str) -> str:
    return f"/runs/{urllib.parse.quote(schema, safe='')}"


def address_of_token(schema: str, key: str, token_id: int | None, feature: int | None = None) -> str:
    """Return the address of a document's page, at this token or at the document's beginning."""
    place = "" if token_id is None else f"#t{token_id}"
    return f"{address_of_run(schema)}/doc{as_query({'key': key, 'feature': feature, 'at': token_id})}{place}"


def as_query(values: Mapping[str, object]) -> str:
    """Return values as the query of an address; lists as JSON would, without spaces."""
    given = {name: _word_in_address(value) for name, value in values.items() if value is not None}
    return f"?{urllib.parse.urlencode(given)}" if given else ""


def _word_in_address(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
