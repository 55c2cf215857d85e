"""Errors of queries. DuckDB raises them, or Arrow does once rows are streamed."""

from __future__ import annotations

import re

import duckdb
import pyarrow as pa

from saeflow.runtime.text import brief

QUERY_ERRORS = (duckdb.Error, pa.ArrowException, OSError)


def is_of_system(error: Exception) -> bool:
    """True if the error comes from the system, e.g. a full disk.

    False for an error of DuckDB that Arrow passes on as an OSError without a number.
    """
    return isinstance(error, OSError) and error.errno is not None


def message(error: Exception, of_store: bool = True) -> str:
    """Return the message of an error, shortened: DuckDB quotes names and texts of any length.

    `of_store`: a damaged file may be the store's, so the message says how to repair it.
    """
    text = without_traceback(str(error)).removeprefix(_OF_SQL)
    lines = [brief(line, 160) for line in text[:10_000].splitlines()]
    said = brief("\n".join(lines[:10]), 800)
    if of_store and lacks_file(error):
        return f"{said}\n{_REPLACED}"
    return f"{said}\n{REPAIR}" if of_store and _IS_DAMAGE.search(said) else said


def is_of_question(error: Exception) -> bool:
    """True if the SQL refused what it was given, by `error('…')`: its message says all that a user needs."""
    said = str(error)
    return said.startswith(_OF_SQL) and not _IS_DAMAGE.search(said)


def lacks_file(error: Exception) -> bool:
    """True if a file is not there that is to be read; DuckDB may not look for others, and then forbids it."""
    return bool(_LACKS_FILE.search(str(error))) or isinstance(error, FileNotFoundError)


def without_traceback(text: str) -> str:
    """Return the message of an error that Python raised while DuckDB read a file: DuckDB quotes the whole traceback."""
    *_, last = _RAISED.split(text)
    return last


_OF_SQL = "Invalid Input Error: "
"""What DuckDB writes in front of the message of `error('…')`."""

_RAISED = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)+[\w.]+: ", re.MULTILINE)
_IS_DAMAGE = re.compile(r"magic bytes|too small|TProtocol|thrift|[Dd]ecompress|[Cc]orrupt|Variable-length|\.parquet")
"""What DuckDB says of a file that is not as it was written. It does not always name the file."""
_LACKS_FILE = re.compile(r"No files found|No such file|[Cc]annot (?:open|access) file|FileNotFoundError")
_REPLACED = (
    "Another command may have replaced the file: ask again. If it is missing then, too: `saeflow verify --full "
    "--repair`, then run the recipe again."
)
REPAIR = "If a file of the store is damaged: `saeflow verify --full --repair`, then run the recipe again."
