"""The named questions, which the headers of `sql/marts` describe, and the arguments a command line gives them."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from saeflow.query.catalog import sql_folder
from saeflow.query.files.quoting import identifier, literal
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, did_you_mean

Scalar = int | float | str
Value = Scalar | Sequence[Scalar] | None
Arguments = Mapping[str, object] | Sequence[object]

LONGEST_VALUE = 100_000
"""Most characters of one value."""

MOST_LISTED = 1_000
"""Most values of a list."""

_INT64 = 1 << 63
_IN_WORDS = {
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
    "Tokens and text": {"token", "text", "document_key", "vocab", "annotation", "class"},
    "Tokens you choose": {"sql", "tokens"},
    "One source or run against another": {"a"},
    "A source, dates or parts": {"source"},
    "Views, to select from": {None},
    "The run": set(),
}
"""Groups of questions by the name of their first parameter; the last group holds the rest."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a question. `default` is SQL; None means that a value must be given."""

    name: str
    type: str
    default: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.type}" + (f" = {self.default}" if self.default is not None else "")

    @property
    def brief(self) -> str:
        return self.name.upper() if self.default is None else f"[{self.name.upper()} = {self.default}]"

    @property
    def default_value(self) -> Value:
        """The value if none is given."""
        word = self.default
        return None if word in (None, "null") else self.parse(_unquoted(word))

    def parse(self, value: object) -> Value:
        """Return a value of this type, mostly from a word of the command line. Raises UserError."""
        if isinstance(value, str) and len(value) > LONGEST_VALUE:
            raise UserError(f"{self.name} has {len(value):,} characters; at most {LONGEST_VALUE:,} are read.")
        try:
            one = self.type.removesuffix("[]")
            if one == self.type:
                found = _parse_scalar(one, value)
                if self.name == "n" and isinstance(found, int) and found < 0:
                    raise UserError(f"n is {found}, but it counts rows: it must be 0 or more.")
                return found
            return [_parse_scalar(one, item) for item in self._list_items(value)]
        except (ValueError, RecursionError):
            kind = _IN_WORDS[self.type]
            raise UserError(f"{self.name} is {brief(str(value))!r}, but it must be {kind} ({self.type}).") from None

    def _list_items(self, value: object) -> list[object]:
        """A list may be written 3,7,12 or as JSON. An empty list is refused, because it asks for nothing."""
        if isinstance(value, str):
            word = value.strip()
            found = json.loads(word) if word.startswith("[") else [each.strip() for each in word.split(",") if word]
        elif isinstance(value, Mapping | bytes) or not isinstance(value, Iterable):
            found = [value]
        else:
            found = list(value)
        if not found and self.default != "[]":
            raise UserError(f"{self.name} is an empty list; it must be {_IN_WORDS[self.type]} ({self.type}).")
        if len(found) > MOST_LISTED:
            raise UserError(f"{self.name} has {len(found):,} values; at most {MOST_LISTED:,} are read.")
        return list(found)

    def as_sql(self, value: Value) -> str:
        """Return the value as SQL."""
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
        """The question with as many of its parameters as fit a line of 80 columns."""
        shown = ""
        for word in (self.name, *(parameter.brief for parameter in self.parameters)):
            if len(shown) + len(word) > 73:
                return f"{shown} …"
            shown = f"{shown} {word}".strip()
        return shown

    @property
    def group(self) -> str:
        """The group it is listed under."""
        first = self.parameters[0].name if self.parameters else None
        return next((title for title, names in GROUPS.items() if first in names), list(GROUPS)[-1])

    @property
    def is_macro(self) -> bool:
        return bool(re.search(rf"\bmacro\s+{self.name}\b", self.sql))

    @property
    def runs_model(self) -> bool:
        """True if `saeflow.query.new_text` must run the model first: SQL alone knows only what is stored."""
        return "readings :=" in self.sql

    @property
    def takes_select(self) -> bool:
        """True if a select of the user chooses its tokens: `saeflow.query.outside.selection` runs it first."""
        return "chosen :=" in self.sql

    @property
    def compares_directions(self) -> bool:
        """True if it wants cosines between two runs: `saeflow.query.outside.directions` computes them first."""
        return "cosines :=" in self.sql

    @property
    def command(self) -> str:
        """The example of the header, as typed in a shell."""
        found = re.search(rf"\bfrom {self.name}\((.*)\)", self.example)
        given = [re.fullmatch(r"(?:(\w+) := )?(.*)", word) for word in _split_list(found[1])] if found else []
        words = ["saeflow", "ask", self.name]
        for each, parameter in zip(filter(None, given), self.parameters, strict=False):
            words += [f"--{each[1]}"] * (each[1] not in (None, parameter.name)) + [_example_word(each[2])]
        return shlex.join(words)

    def as_sql(self, values: Mapping[str, Value], schema: str) -> str:
        """Return the question as SQL with its values filled in, asked of the run in this schema."""
        given = ", ".join(parameter.as_sql(values[parameter.name]) for parameter in self.parameters)
        return f"select * from {identifier(schema)}.{self.name}" + (f"({given})" if self.is_macro else "")


def questions() -> list[Question]:
    """Return the named questions: every view and table macro of `sql/marts`, by name."""
    return list(_questions_in(sql_folder() / "marts"))


@cache
def _questions_in(folder: Path) -> tuple[Question, ...]:
    return tuple(read_question(path.stem, path.read_text("utf-8")) for path in sorted(folder.glob("*.sql")))


def find_question(name: str) -> Question:
    """Return the question of this name. Raises UserError."""
    known = {each.name: each for each in questions()}
    if name not in known:
        raise UserError(f"There is no question {brief(name)!r}. {did_you_mean(name, known)}")
    return known[name]


def parse_whole_numbers(name: str, words: str) -> list[int]:
    """Return numbers that are written as 3,17,99. `name` is what the error calls them. Raises UserError."""
    found = Parameter(name, "bigint[]").parse(words)
    assert isinstance(found, list)
    return [int(each) for each in found]


def parse_arguments(question: Question, arguments: Arguments) -> dict[str, Value]:
    """Return every parameter with its value, in order.

    Raises UserError if there are too many arguments, or if one is missing or of another type.
    """
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
        values[parameter.name] = parameter.default_value if value is None else parameter.parse(value)
    return values


def name_arguments(question: Question, arguments: Sequence[object], named: Mapping[str, object]) -> dict[str, object]:
    """Return arguments by the names of their parameters. Raises UserError if one is given twice or there are too many.

    Those without a name belong to the first parameters, in order.
    """
    names = [parameter.name for parameter in question.parameters]
    if len(arguments) > len(names):
        raise UserError(f"{question.name} takes {len(names)} arguments, not {len(arguments)}: {question.usage}")
    by_place = dict(zip(names, arguments, strict=False))
    for twice in by_place.keys() & named.keys():
        raise UserError(f"{question.name} is given {twice} twice. Ask it as: {question.usage}")
    return by_place | dict(named)


def _parse_scalar(type: str, value: object) -> Scalar:
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


def read_question(name: str, sql: str) -> Question:
    """Return the question that a file of `sql/marts` defines."""
    header = _labelled_lines(sql)
    parameters = [
        re.fullmatch(r"(\w+) (\w+(?:\[\])?)(?: = (.+))?", item) for item in _split_list(header.get("Parameters", ""))
    ]
    assert all(match and match[2] in _IN_WORDS for match in parameters), f"the parameters of {name}.sql"
    return Question(
        name,
        header[""],
        header["Ask it"],
        tuple(Parameter(*match.groups()) for match in parameters if match),
        sql,
        header.get("Grain", ""),
        header.get("Units", ""),
    )


_LABEL = re.compile(r"(Grain|Reads|Units|Parameters|Ask it):\s*(.*)")


def _labelled_lines(sql: str) -> dict[str, str]:
    """Return the header's text by label, lines joined. The sentence before the first empty line has the label ""."""
    found: dict[str, str] = {}
    label: str | None = ""
    for line in sql.splitlines():
        if not line.startswith("--"):
            break
        text = line[2:].strip()
        if labelled := _LABEL.match(text):
            label, text = labelled.groups()
        elif not text:
            label = None
        if label is not None:
            found[label] = f"{found.get(label, '')} {text}".strip()
    return found


def _split_list(text: str) -> list[str]:
    """Split at the commas that are inside no brackets and no quotes."""
    pieces = re.findall(r"(?:\[[^\]]*\]|'(?:[^']|'')*'|[^,\[\]'])+", text)
    return [piece.strip() for piece in pieces if piece.strip()]


def _unquoted(sql: str) -> str:
    return sql[1:-1].replace("''", "'") if sql[:1] == sql[-1:] == "'" else sql


def _example_word(sql: str) -> str:
    return re.sub(r",\s+", ",", sql[1:-1]) if sql.startswith("[") else _unquoted(sql)
