"""What is said of errors of queries."""

from __future__ import annotations

import duckdb
import pytest

from saeflow.runtime.sql_errors import REPAIR, is_of_question, message, without_traceback

RAISED = (
    "Traceback (most recent call last):\n"
    '  File "pieces.py", line 91, in _found\n'
    '  File "pieces.py", line 92, in _fits\n'
    "saeflow.store.records.Damaged: s3://bucket/000.parquet is missing or damaged.\nMend it."
)


def test_an_error_raised_while_duckdb_read_a_file_is_said_without_its_traceback() -> None:
    said = "s3://bucket/000.parquet is missing or damaged.\nMend it."
    assert without_traceback(RAISED) == said
    assert without_traceback("Catalog Error: there is no such table") == "Catalog Error: there is no such table"
    assert message(OSError(RAISED)) == f"{said}\n{REPAIR}"


@pytest.mark.parametrize(
    ("sql", "is_refused", "said"),
    [
        ("select error('n is 0, but it must be 1')", True, "n is 0, but it must be 1"),
        ("select error('x.parquet is no such file')", False, f"x.parquet is no such file\n{REPAIR}"),
        ("select 'x'::integer", False, "Conversion Error: Could not convert string 'x' to INT32"),
    ],
)
def test_what_sql_refuses_is_said_in_its_own_words(sql: str, is_refused: bool, said: str) -> None:
    with pytest.raises(duckdb.Error) as raised:
        duckdb.sql(sql).fetchall()
    assert is_of_question(raised.value) == is_refused
    assert message(raised.value).startswith(said)
