"""Types of metadata: the narrowest that holds every value of a column exactly."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.corpus.metadata import ColumnType, read_as

A_AND_B = pa.struct({"a": pa.int64(), "b": pa.string()})
DATE = datetime.date(2024, 2, 29)


def column(values: list[Any], is_csv: bool) -> tuple[pa.DataType, list[Any]]:
    found = ColumnType(is_csv)
    for value in values:
        found.see(value)
    return found.type, pa.array([read_as(found.type, value) for value in values], found.type).to_pylist()


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (["1", "-7", None], pa.int64(), [1, -7, None]),
        (["1", "2.50"], pa.float64(), [1.0, 2.5]),
        (["1e-05", "0.1"], pa.float64(), [1e-05, 0.1]),
        (["true", "false"], pa.bool_(), [True, False]),
        (["True", "False"], pa.bool_(), [True, False]),
        (["2024-02-29"], pa.date32(), [DATE]),
        (["2024-02-29", "2023-02-29"], pa.string(), ["2024-02-29", "2023-02-29"]),
        (["007"], pa.string(), ["007"]),
        (["1e5"], pa.string(), ["1e5"]),
        (["+1"], pa.string(), ["+1"]),
        (["1", "x"], pa.string(), ["1", "x"]),
        (["9223372036854775808"], pa.string(), ["9223372036854775808"]),
        (["9007199254740993", "0.5"], pa.string(), ["9007199254740993", "0.5"]),
        (["0.1234567890123456789"], pa.string(), ["0.1234567890123456789"]),
        ([None, None], pa.string(), [None, None]),
    ],
)
def test_cells_of_csv_get_the_narrowest_type_that_is_exact(cells: list[Any], kind: Any, values: list[Any]) -> None:
    assert column(cells, True) == (kind, values)


@pytest.mark.parametrize(
    ("written", "kind", "values"),
    [
        ([1, None], pa.int64(), [1, None]),
        ([1, 1.5], pa.float64(), [1.0, 1.5]),
        (["1", "2"], pa.string(), ["1", "2"]),
        ([1, "x", True], pa.string(), ["1", "x", "true"]),
        (["2024-02-29"], pa.date32(), [DATE]),
        ([["sea"], ["whale", "ship"]], pa.list_(pa.string()), [["sea"], ["whale", "ship"]]),
        ([[1], [2.5]], pa.list_(pa.float64()), [[1.0], [2.5]]),
        ([{"a": 1}, {"b": "x"}], A_AND_B, [{"a": 1, "b": None}, {"a": None, "b": "x"}]),
        ([[1], "x"], pa.string(), ["[1]", "x"]),
        ([[1], ["x"]], pa.string(), ["[1]", '["x"]']),
        ([{}], pa.string(), ["{}"]),
        ([[]], pa.string(), ["[]"]),
        ([1 << 70], pa.string(), [str(1 << 70)]),
    ],
)  # fmt: skip
def test_values_of_json_get_the_narrowest_type_that_is_exact(written: list[Any], kind: Any, values: list[Any]) -> None:
    assert column(written, False) == (kind, values)


@given(values=st.lists(st.none() | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.text()))
def test_no_value_of_json_is_changed(values: list[Any]) -> None:
    kind, found = column(values, False)
    for value, read in zip(values, found, strict=True):
        if value is None or not pa.types.is_string(kind):
            assert (read if not isinstance(read, datetime.date) else read.isoformat()) == value
        else:
            assert read == (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


@given(values=st.lists(st.none() | st.integers().map(str) | st.floats(allow_nan=False).map(repr) | st.text(min_size=1)))
def test_no_cell_of_csv_is_changed(values: list[Any]) -> None:
    kind, found = column(values, True)
    for value, read in zip(values, found, strict=True):
        if value is not None and pa.types.is_floating(kind):
            assert read == float(value)
        elif value is not None:
            assert (json.dumps(read) if isinstance(read, bool) else str(read)).lower() == value.lower()
