"""Questions to a run: named ones from `sql/marts`, statements that only read, and the checks of `sql/checks`.

Values travel as prepared parameters; names are looked up among the files of `sql/`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from saeflow.query_errors import QUERY_ERRORS, is_of_system
from saeflow.runs import Run, connect, nearest, runs, script, sql_folder
from saeflow.sections import UserError

__all__ = ["Parameter", "Question", "Run", "ask", "check", "connect", "query", "questions", "runs", "script"]

_WRITES = re.compile(r"COPY|INSERT|UPDATE|DELETE|MERGE|CREATE|ATTACH|EXPORT|LOAD|SET\b|RESET|TRANSACTION")
_INT64 = 1 << 63


@dataclass(frozen=True)
class Parameter:
    """What a question asks for; `default` is None where a value must be given."""

    name: str
    type: str
    default: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.type}" + (f" = {self.default}" if self.default is not None else "")

    def parse(self, value: object) -> int | float | str | list[Any]:
        """`value`, mostly a word from the command line, as a value of this type; a list's items are set apart by commas."""
        if self.type.endswith("[]"):
            items = value if isinstance(value, (list, tuple)) else str(value).strip().strip("[]").split(",")
            return [Parameter(self.name, self.type[:-2]).parse(item) for item in items]
        try:
            match self.type:
                case "bigint":
                    number = int(str(value))
                    if not -_INT64 <= number < _INT64:
                        raise ValueError
                    return number
                case "double":
                    real = float(str(value))
                    if math.isnan(real):
                        raise ValueError
                    return real
                case _:
                    return str(value)
        except ValueError:
            kind = {"bigint": "a whole number", "double": "a number"}[self.type]
            raise UserError(f"{self.name} is {str(value)!r}, but it must be {kind} ({self.type}).") from None


@dataclass(frozen=True)
class Question:
    """A view or table macro of `sql/marts`, as its header describes it."""

    name: str
    answers: str
    example: str
    parameters: tuple[Parameter, ...]
    sql: str

    @property
    def usage(self) -> str:
        return " ".join([self.name, *(f"[{p}]" if p.default is not None else f"<{p}>" for p in self.parameters)])

    @property
    def is_macro(self) -> bool:
        return bool(re.search(rf"\bmacro\s+{self.name}\b", self.sql))


def questions() -> list[Question]:
    """The named questions: every view and table macro of `sql/marts`, by name."""
    return [_question(path.stem, path.read_text("utf-8")) for path in sorted((sql_folder() / "marts").glob("*.sql"))]


def find(question: str) -> Question:
    """The question of this name. Raises UserError."""
    known = {each.name: each for each in questions()}
    if question not in known:
        raise UserError(f"There is no question {question!r}. {nearest(question, known)}")
    return known[question]


def ask(
    connection: duckdb.DuckDBPyConnection,
    question: str,
    arguments: Mapping[str, object] | Sequence[object] = (),
    limit: int | None = None,
) -> pa.Table:
    """Answer a named question; arguments by position or by name, as values or as words to be parsed."""
    chosen = find(question)
    values: list[object] = list(named(chosen, arguments).values())
    call = f"({', '.join('?' * len(values))})" if chosen.is_macro else ""
    sql = f"select * from {chosen.name}{call}"
    if limit is not None:
        sql, values = f"{sql} limit ?", [*values, limit]
    return _fetch(connection, sql, values, chosen.name)


def named(question: Question, arguments: Mapping[str, object] | Sequence[object]) -> dict[str, object]:
    """Every parameter with its value, in order. Raises UserError for what is too many, missing or of another type."""
    names = [parameter.name for parameter in question.parameters]
    if not isinstance(arguments, Mapping):
        if len(arguments) > len(names):
            raise UserError(f"{question.name} takes {len(names)} arguments, not {len(arguments)}: {question.usage}")
        arguments = dict(zip(names, arguments, strict=False))
    for name in arguments:
        if name not in names:
            raise UserError(f"{question.name} has no parameter {name!r}. Ask it as: {question.usage}")
    values: dict[str, object] = {}
    for parameter in question.parameters:
        value = arguments.get(parameter.name, parameter.default)
        if value is None:
            raise UserError(f"{question.name} needs {parameter}. Ask it as: {question.usage}")
        values[parameter.name] = parameter.parse(value)
    return values


def query(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: Sequence[object] = (), limit: int | None = None
) -> pa.Table:
    """Run one statement that only reads; anything else is refused before it runs."""
    _refuse_writes(connection, sql, parameters)
    return _fetch(connection, sql, parameters, "The query", limit)


def check(connection: duckdb.DuckDBPyConnection, limit: int = 1000) -> list[tuple[str, pa.Table]]:
    """Each invariant of `sql/checks` with the rows that break it, at most `limit` of them; none is good."""
    paths = sorted((sql_folder() / "checks").glob("*.sql"))
    return [(path.stem, _fetch(connection, path.read_text("utf-8"), (), path.stem, limit)) for path in paths]


def _question(name: str, sql: str) -> Question:
    lines = [line[2:].strip() for line in sql.splitlines() if line.startswith("--")]
    answers = " ".join(lines[: lines.index("")])
    labelled = {label: text.strip() for label, _, text in (line.partition(":") for line in lines)}
    listed = re.split(r",\s*", labelled.get("Parameters", ""))
    parameters = [re.fullmatch(r"(\w+) ([\w\[\]]+)(?: = (.+))?", item) for item in listed if item]
    return Question(
        name, answers, labelled["Ask it"], tuple(Parameter(*match.groups()) for match in parameters if match), sql
    )


def _refuse_writes(connection: duckdb.DuckDBPyConnection, sql: str, parameters: Sequence[object]) -> None:
    """Type and plan must both be those of a read: `WITH x AS (COPY …) SELECT 1` is typed SELECT and writes."""
    refused = UserError("Only one statement that reads is run here: select, with, from, values, describe or explain.")
    try:
        statements = duckdb.extract_statements(sql)
        kinds = [statement.type for statement in statements]
        if kinds == [duckdb.StatementType.EXPLAIN]:
            explained = re.sub(r"^\s*explain\s+(analyze\s+)?", "", sql, flags=re.IGNORECASE)
            if explained == sql:
                raise refused
            return _refuse_writes(connection, explained, parameters)
        if kinds != [duckdb.StatementType.SELECT]:
            raise refused
        plan = connection.execute(f"explain (format json) {sql}", parameters or None).fetchall()
    except duckdb.Error as error:
        raise UserError(f"The query cannot be run.\n{error}") from error
    if any(_WRITES.match(name) for row in plan for name in _operators(row[-1])):
        raise refused
    return None


def _operators(plan: object) -> Iterator[str]:
    for node in json.loads(plan) if isinstance(plan, str) else plan if isinstance(plan, list) else ():
        yield node.get("name", "")
        yield from _operators(node.get("children", []))


def _fetch(
    connection: duckdb.DuckDBPyConnection,
    sql: str,
    parameters: Sequence[object],
    what: str,
    limit: int | None = None,
) -> pa.Table:
    try:
        reader = connection.sql(sql, params=parameters or None).to_arrow_reader()
        return _head(reader, limit)
    except QUERY_ERRORS as error:
        if is_of_system(error):
            raise
        raise UserError(f"{what} failed.\n{error}") from error


def _head(reader: pa.RecordBatchReader, limit: int | None) -> pa.Table:
    """The first rows of a stream, or all of it."""
    if limit is None:
        return reader.read_all()
    batches, n_rows = [], 0
    while n_rows < limit and (batch := next(reader, None)) is not None:
        batches.append(batch)
        n_rows += batch.num_rows
    return pa.Table.from_batches(batches, reader.schema).slice(0, limit)
