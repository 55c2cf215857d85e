"""What is said of errors of queries."""

from __future__ import annotations

from saeflow.runtime.sql_errors import REPAIR, message, without_traceback

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
