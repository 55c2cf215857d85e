"""The prompt of `saeflow sql`: statements that a person types, with a history."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from saeflow.cli.common import err

SHORTHANDS = {
    ".tables": "select distinct table_name from duckdb_columns() where schema_name = current_schema() order by all",
    ".questions": "select distinct function_name as question, parameters from duckdb_functions() "
    "where schema_name = current_schema() and function_type = 'table_macro' order by all",
}
"""Words that may be typed instead of a statement, and the statements they stand for."""


def typed_statements() -> Iterator[str]:
    """Yield the statements that a person types, each ended by a semicolon, until Ctrl-D."""
    err.print("Type a select and end it with ; — .tables and .questions list what there is, Ctrl-D leaves.")
    with _history():
        typed = ""
        while True:
            try:
                typed += input("saeflow> " if not typed else "      -> ") + "\n"
            except EOFError:
                return
            if typed.rstrip().endswith(";") or typed.strip() in SHORTHANDS:
                yield SHORTHANDS.get(typed.strip(), typed.strip())
                typed = ""


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Enable arrow keys, and recall of what was typed in earlier sessions, if this Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "saeflow" / "history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(path)
