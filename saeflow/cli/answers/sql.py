"""Your own SQL: a statement, or a prompt."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeflow.cli.answers.reply import FormatOption, Limit, Output, Reply, write_words
from saeflow.cli.common import RunOption, StoreOption, err, existing_store, print_note
from saeflow.runtime.errors import UserError

if TYPE_CHECKING:
    import duckdb

    from saeflow.store.store import Store

sql_commands = typer.Typer()


@sql_commands.command("sql")
def sql_command(
    query: Annotated[str | None, typer.Argument(help="A select; without one, a prompt opens.")] = None,
    store: StoreOption = None,
    run: RunOption = None,
    script: Annotated[bool, typer.Option("--script", help="Print the run's SQL for the duckdb shell.")] = False,
    format: FormatOption = None,
    limit: Limit = None,
    output: Output = None,
) -> None:
    """Run your own read-only SQL.

    Example: `saeflow sql 'select count(*) from tokens'`
    """
    from saeflow.query.generations import again_if_replaced

    reply = Reply(format, output, limit)
    if script:
        from saeflow.query.catalog import script_of_run

        return write_words(script_of_run(existing_store(store), run), output)
    opened = existing_store(store)
    if query is not None or not sys.stdin.isatty():
        statement = query if query is not None else _standard_input()
        return again_if_replaced(opened, partial(_answer_one, opened, run, reply, statement))
    if output is not None:
        raise UserError(f"Which answer belongs in {output}? Give the query too: saeflow sql 'select …' -o {output}")
    return _answer_prompt(opened, run, reply)


def _answer_one(store: Store, run: str | None, reply: Reply, statement: str) -> None:
    from saeflow.query.connection import connect

    with contextlib.closing(connect(store, run)) as connection:
        _answer(connection, reply, statement)


def _answer_prompt(store: Store, run: str | None, reply: Reply) -> None:
    """Answer statements as they are typed. An error ends only the statement."""
    from saeflow.query.connection import connect
    from saeflow.query.generations import generations, opened_at

    state = generations(store)
    with contextlib.closing(connect(store, run)) as connection:
        for statement in typed_statements():
            try:
                with opened_at(store, state):
                    _answer(connection, reply, statement)
            except UserError as error:
                print_note(str(error), style="red")


def _answer(connection: duckdb.DuckDBPyConnection, reply: Reply, statement: str) -> None:
    from saeflow.query.ask import query

    reply.write(lambda most: query(connection, statement, limit=most), 1000)


def _standard_input() -> str:
    """Return standard input, up to the greatest length of a statement."""
    from saeflow.query.ask import LONGEST_SQL

    try:
        return sys.stdin.read(LONGEST_SQL + 1)
    except UnicodeDecodeError:
        raise UserError("Standard input is not text in UTF-8.") from None


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
