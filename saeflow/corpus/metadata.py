"""Types of metadata columns of CSV and JSON files: found from all of their values, never from a sample."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

import pyarrow as pa

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,18})")
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+(e[-+][0-9]+)?|-?[1-9]e[-+][0-9]+")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_ARROW_TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "date": pa.date32(), "text": pa.string()}
"""Types of single values, in the order in which they are preferred."""
LARGEST_EXACT = 1 << 53
"""Every integer up to this one is a float64."""
_MOST_FIELDS = 100
"""Objects with more keys than this in all rows together are stored as JSON text, not as one struct."""
_DEEPEST = 8
"""Lists and objects within one another more often than this are stored as JSON text: readers take ever longer."""


class ColumnType:
    """The narrowest type that holds every value of a column exactly; text holds any."""

    def __init__(self, is_csv: bool) -> None:
        self.is_csv = is_csv
        self.possible = {*_ARROW_TYPES, "nested"}
        self.nested: pa.DataType = pa.null()
        self.has_long_nested = False
        self.is_empty = True

    def see(self, value: Any) -> None:
        """Take note of a value: None, a bool, a number, a text, or what JSON makes of a list or an object."""
        if value is None:
            return
        self.is_empty = False
        if len(self.possible) > 1:
            self.possible &= self._kinds_of(value)
        if "nested" in self.possible:
            self._see_nested(value)

    def _kinds_of(self, value: Any) -> set[str]:
        if isinstance(value, str):
            return self._kinds_of_text(value)
        if isinstance(value, list | dict):
            return {"nested", "text"}
        if isinstance(value, int) and not isinstance(value, bool):
            return {"text"} | _kinds_of_integer(value)
        return {"bool" if isinstance(value, bool) else "float", "text"}

    def _kinds_of_text(self, value: str) -> set[str]:
        if _DATE.fullmatch(value) and _is_date(value):
            return {"date", "text"}
        if self.is_csv and value in ("true", "false", "True", "False"):
            return {"bool", "text"}
        if self.is_csv and _INTEGER.fullmatch(value):
            return {"text"} | _kinds_of_integer(int(value))
        if self.is_csv and _DECIMAL.fullmatch(value) and is_exact(value):
            return {"float", "text"}
        return {"text"}

    def _see_nested(self, value: Any) -> None:
        try:
            types = [pa.schema([("x", each)]) for each in (self.nested, pa.infer_type([value]))]
            self.nested = pa.unify_schemas(types, promote_options="permissive").field("x").type
            whole = [abs(each) for each in _leaves(value) if isinstance(each, int)]
            self.has_long_nested |= max(whole, default=0) > LARGEST_EXACT
            if max(whole, default=0).bit_length() > 63:
                self.possible = {"text"}
        except (pa.ArrowException, OverflowError):
            self.possible = {"text"}

    @property
    def type(self) -> pa.DataType:
        if self.is_empty:
            return pa.string()
        if "nested" in self.possible:
            is_rounded = self.has_long_nested and "double" in str(self.nested)
            return self.nested if _is_storable(self.nested) and not is_rounded else pa.string()
        return next(_ARROW_TYPES[kind] for kind in _ARROW_TYPES if kind in self.possible)


def read_as(kind: pa.DataType, value: Any) -> Any:
    """Return a value that a column has seen, as a Python value of the column's type."""
    if value is None or pa.types.is_nested(kind):
        return value
    if pa.types.is_string(kind):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if pa.types.is_boolean(kind):
        return value if isinstance(value, bool) else value.lower() == "true"
    if pa.types.is_date(kind):
        return datetime.date.fromisoformat(value)
    return int(value) if pa.types.is_integer(kind) else float(value)


def is_exact(text: str) -> bool:
    """True if a float64 has the same value as the number that is written."""
    try:
        return Decimal(text) == Decimal(repr(float(text)))
    except InvalidOperation:  # an exponent of many digits
        return False


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the single values in lists and objects."""
    if isinstance(value, list | dict):
        for each in value if isinstance(value, list) else value.values():
            yield from _leaves(each)
    else:
        yield value


def _kinds_of_integer(value: int) -> set[str]:
    kinds = {"int"} if -(1 << 63) <= value < 1 << 63 else set()
    return kinds | ({"float"} if abs(value) <= LARGEST_EXACT else set())


def _is_date(value: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(value))
    except ValueError:
        return False


def _is_storable(kind: pa.DataType, depth: int = 0) -> bool:
    """True if Parquet and DuckDB hold this type: not too deep, no struct of nothing, of very many or of like names."""
    if pa.types.is_null(kind) or depth > _DEEPEST:
        return False
    inner = [kind.field(i) for i in range(kind.num_fields)]
    if (
        pa.types.is_struct(kind)
        and not 0 < len({field.name.casefold() for field in inner}) == len(inner) <= _MOST_FIELDS
    ):
        return False
    return all(_is_storable(field.type, depth + 1) for field in inner)
