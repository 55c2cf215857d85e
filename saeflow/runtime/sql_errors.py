"""What a query raises: DuckDB itself, or, once rows are streamed, Arrow in its place."""

from __future__ import annotations

import duckdb
import pyarrow as pa

from saeflow.runtime.text import brief

QUERY_ERRORS = (duckdb.Error, pa.ArrowException, OSError)


def is_of_system(error: Exception) -> bool:
    """Is it the system's (a full disk), and not an error of DuckDB that Arrow hands on as an OSError without a
    number?"""
    return isinstance(error, OSError) and error.errno is not None


def message(error: Exception) -> str:
    """What went wrong, without most of what it quotes: DuckDB repeats names and texts of any length."""
    lines = [brief(line, 160) for line in str(error)[:10_000].splitlines()]
    return brief("\n".join(lines[:10]), 800)
