"""Your own SQL: a statement, or a prompt."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from saeflow.cli.answers.reply import FormatOption, Limit, Output, Reply, write_words
from saeflow.cli.common import RunOption, StoreOption, connection_to, err, existing_store, print_note
from saeflow.runtime.errors import UserError

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
    from saeflow.query.ask import query as run_query

    reply = Reply(format, output, limit)
    if script:
        from saeflow.query.catalog import script_of_run

        return write_words(script_of_run(existing_store(store), run), output)
    with connection_to(store, run) as connection:

        def answer(statement: str) -> None:
            reply.write(lambda most: run_query(connection, statement, limit=most), 1000)

        if query is not None or not sys.stdin.isatty():
            return answer(query if query is not None else _standard_input())
        if output is not None:
            raise UserError(f"Which answer belongs in {output}? Give the query too: saeflow sql 'select …' -o {output}")
        _answer_prompt(answer)
    return None


def _answer_prompt(answer: Callable[[str], None]) -> None:
    """Answer statements as they are typed. An error ends only the statement."""
    for statement in typed_statements():
        try:
            answer(statement)
        except UserError as error:
            print_note(str(error), style="red")


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
