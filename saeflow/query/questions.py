"""The named questions as the headers of `sql/marts` describe them, and words of a command line as their values."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from saeflow.query.relations import identifier, literal
from saeflow.query.runs import nearest, sql_folder
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief

Scalar = int | float | str
Value = Scalar | Sequence[Scalar] | None
Arguments = Mapping[str, object] | Sequence[object]

LONGEST = 100_000
"""Characters of one value."""

MOST = 1_000
"""Values of a list."""

_INT64 = 1 << 63
_KINDS = {
    "bigint": "a whole number",
    "double": "a number",
    "text": "text",
    "bigint[]": "whole numbers such as 3,7,12",
    "double[]": "numbers such as 0.5,1,0.2",
    "text[]": "texts",
}
GROUPS: dict[str, set[str | None]] = {
    "One feature": {"feature"},
    "Several features together": {"features"},
    "Tokens and text": {"token", "text"},
    "One source or run against another": {"a"},
    "Views, to select from": {None},
    "The run": set(),
}
"""What questions are asked about, by the name of their first parameter; the last holds the rest."""


@dataclass(frozen=True)
class Parameter:
    """What a question asks for; `default`, as SQL, is None where a value must be given."""

    name: str
    type: str
    default: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.type}" + (f" = {self.default}" if self.default is not None else "")

    @property
    def brief(self) -> str:
        return self.name.upper() if self.default is None else f"[{self.name.upper()} = {self.default}]"

    @property
    def unasked(self) -> Value:
        """The value where none is given."""
        word = self.default
        return None if word in (None, "null") else self.parse(_unquoted(word))

    def parse(self, value: object) -> Value:
        """`value`, mostly a word from the command line, as a value of this type. Raises UserError."""
        if isinstance(value, str) and len(value) > LONGEST:
            raise UserError(f"{self.name} has {len(value):,} characters; at most {LONGEST:,} are read.")
        try:
            one = self.type.removesuffix("[]")
            return _scalar(one, value) if one == self.type else [_scalar(one, each) for each in self._items(value)]
        except (ValueError, RecursionError):
            kind = _KINDS[self.type]
            raise UserError(f"{self.name} is {brief(str(value))!r}, but it must be {kind} ({self.type}).") from None

    def _items(self, value: object) -> list[object]:
        """A list may be written 3,7,12 or as JSON. An empty one asks for nothing, and is taken for a slip."""
        if isinstance(value, str):
            word = value.strip()
            found = json.loads(word) if word.startswith("[") else [each.strip() for each in word.split(",") if word]
        elif isinstance(value, Mapping | bytes) or not isinstance(value, Iterable):
            found = [value]
        else:
            found = list(value)
        if not found and self.default != "[]":
            raise UserError(f"{self.name} is an empty list; it must be {_KINDS[self.type]} ({self.type}).")
        if len(found) > MOST:
            raise UserError(f"{self.name} has {len(found):,} values; at most {MOST:,} are read.")
        return list(found)

    def spelled(self, value: Value) -> str:
        """The value as SQL."""
        typed = self.type in ("bigint", "text") or value is None
        return literal(value) if typed else f"{literal(value)}::{self.type}"


@dataclass(frozen=True)
class Question:
    """A view or table macro of `sql/marts`, as its header describes it."""

    name: str
    answers: str
    example: str
    parameters: tuple[Parameter, ...]
    sql: str = field(repr=False)
    grain: str = ""
    units: str = ""

    @property
    def usage(self) -> str:
        return " ".join([self.name, *(f"[{p}]" if p.default is not None else f"<{p}>" for p in self.parameters)])

    @property
    def brief(self) -> str:
        return " ".join([self.name, *(parameter.brief for parameter in self.parameters)])

    @property
    def group(self) -> str:
        """What it is asked about."""
        first = self.parameters[0].name if self.parameters else None
        return next((title for title, names in GROUPS.items() if first in names), list(GROUPS)[-1])

    @property
    def is_macro(self) -> bool:
        return bool(re.search(rf"\bmacro\s+{self.name}\b", self.sql))

    @property
    def command(self) -> str:
        """The example of the header as it is typed in a shell."""
        found = re.search(rf"\bfrom {self.name}\((.*)\)", self.example)
        words = [re.sub(r"^\w+ := ", "", word) for word in _split(found[1])] if found else []
        return shlex.join(["saeflow", "ask", self.name, *map(_as_word, words)])

    def spelled(self, values: Mapping[str, Value], schema: str) -> str:
        """The question as SQL with its values in it, for the run of a schema."""
        given = ", ".join(parameter.spelled(values[parameter.name]) for parameter in self.parameters)
        return f"select * from {identifier(schema)}.{self.name}" + (f"({given})" if self.is_macro else "")


def questions() -> list[Question]:
    """The named questions: every view and table macro of `sql/marts`, by name."""
    return list(_questions_in(sql_folder() / "marts"))


@cache
def _questions_in(folder: Path) -> tuple[Question, ...]:
    return tuple(_question(path.stem, path.read_text("utf-8")) for path in sorted(folder.glob("*.sql")))


def find(question: str) -> Question:
    """The question of this name. Raises UserError."""
    known = {each.name: each for each in questions()}
    if question not in known:
        raise UserError(f"There is no question {brief(question)!r}. {nearest(question, known)}")
    return known[question]


def named(question: Question, arguments: Arguments) -> dict[str, Value]:
    """Every parameter with its value, in order. Raises UserError for what is too many, missing or of another type."""
    names = [parameter.name for parameter in question.parameters]
    if not isinstance(arguments, Mapping):
        if len(arguments) > len(names):
            raise UserError(f"{question.name} takes {len(names)} arguments, not {len(arguments)}: {question.usage}")
        arguments = dict(zip(names, arguments, strict=False))
    for name in arguments:
        if name not in names:
            raise UserError(f"{question.name} has no parameter {brief(name)!r}. Ask it as: {question.usage}")
    values: dict[str, Value] = {}
    for parameter in question.parameters:
        value = arguments.get(parameter.name)
        if value is None and parameter.default is None:
            raise UserError(f"{question.name} needs {parameter}. Ask it as: {question.usage}")
        values[parameter.name] = parameter.unasked if value is None else parameter.parse(value)
    return values


def _scalar(type: str, value: object) -> Scalar:
    match type:
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
    text = str(value)
    text.encode()
    return text


def _question(name: str, sql: str) -> Question:
    said = _header(sql)
    parameters = [
        re.fullmatch(r"(\w+) (\w+(?:\[\])?)(?: = (.+))?", item) for item in _split(said.get("Parameters", ""))
    ]
    assert all(match and match[2] in _KINDS for match in parameters), f"the parameters of {name}.sql"
    return Question(
        name,
        said[""],
        said["Ask it"],
        tuple(Parameter(*match.groups()) for match in parameters if match),
        sql,
        said.get("Grain", ""),
        said.get("Units", ""),
    )


_LABEL = re.compile(r"(Grain|Reads|Units|Parameters|Ask it):\s*(.*)")


def _header(sql: str) -> dict[str, str]:
    """What the header says after each label, its lines joined; the sentence before the first empty line has none."""
    said: dict[str, str] = {}
    label: str | None = ""
    for line in sql.splitlines():
        if not line.startswith("--"):
            break
        text = line[2:].strip()
        if found := _LABEL.match(text):
            label, text = found.groups()
        elif not text:
            label = None
        if label is not None:
            said[label] = f"{said.get(label, '')} {text}".strip()
    return said


def _split(text: str) -> list[str]:
    """What stands between the commas that are in no brackets and no quotes."""
    pieces = re.findall(r"(?:\[[^\]]*\]|'(?:[^']|'')*'|[^,\[\]'])+", text)
    return [piece.strip() for piece in pieces if piece.strip()]


def _unquoted(sql: str) -> str:
    return sql[1:-1].replace("''", "'") if sql[:1] == sql[-1:] == "'" else sql


def _as_word(sql: str) -> str:
    return re.sub(r",\s+", ",", sql[1:-1]) if sql.startswith("[") else _unquoted(sql)
