"""Errors of queries. DuckDB raises them, or Arrow does once rows are streamed."""

from __future__ import annotations

import duckdb
import pyarrow as pa

from saeflow.runtime.text import brief

QUERY_ERRORS = (duckdb.Error, pa.ArrowException, OSError)


def is_of_system(error: Exception) -> bool:
    """True if the error comes from the system, e.g. a full disk.

    False for an error of DuckDB that Arrow passes on as an OSError without a number.
    """
    return isinstance(error, OSError) and error.errno is not None


def message(error: Exception) -> str:
    """Return the message of an error, shortened: DuckDB quotes names and texts of any length."""
    lines = [brief(line, 160) for line in str(error)[:10_000].splitlines()]
    return brief("\n".join(lines[:10]), 800)
