"""Commands that answer: the named questions, your own SQL, and the state of the machine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from saeflow.command_line import RunOption, StoreOption, a_table, connection_to, err, open_store, out
from saeflow.config import UserError
from saeflow.store import store_path

commands = typer.Typer()


Format = Annotated[
    Literal["table", "csv", "json", "jsonl", "parquet"], typer.Option("--format", "-f", help="How to answer.")
]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows at most.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of the terminal.")]


@commands.command(context_settings={"ignore_unknown_options": True})
def ask(
    question: Annotated[str | None, typer.Argument(help="Name of a question; none lists them.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Its parameters, in order.")] = None,
    store: StoreOption = None,
    run: RunOption = None,
    format: Format = "table",
    limit: Limit = 20,
    output: Output = None,
) -> None:
    """Ask a named question. Examples: `saeflow ask top_tokens 123 10`, `saeflow ask tokens_where 123 0.5 -f csv`"""
    from saeflow import queries, terminal

    if question is None:
        return _list_questions()
    with connection_to(store, run) as connection:
        table = queries.ask(connection, question, arguments or [], limit)
    terminal.write(table, format, output, out)
    if format == "table" and output is None and len(table) == limit:
        err.print(f"The first {limit} rows; more with --limit.")
    return None


def _list_questions() -> None:
    from saeflow import queries

    table = a_table("question", "answers")
    for question in queries.questions():
        table.add_row(escape(question.usage), escape(question.answers))
    out.print(table)


@commands.command()
def sql(
    query: Annotated[str | None, typer.Argument(help="A select; none opens a prompt.")] = None,
    store: StoreOption = None,
    run: RunOption = None,
    script: Annotated[bool, typer.Option("--script", help="Print the run's SQL for the duckdb shell.")] = False,
    format: Format = "table",
    limit: Limit = 1000,
    output: Output = None,
) -> None:
    """Run your own read-only SQL. Example: `saeflow sql 'select count(*) from tokens'`"""
    from saeflow import queries, terminal

    if script:
        return typer.echo(queries.script(open_store(store), run))
    with connection_to(store, run) as connection:
        if query is not None or not sys.stdin.isatty():
            table = queries.query(connection, query if query is not None else sys.stdin.read(), limit=limit)
            return terminal.write(table, format, output, out)
        for typed in _prompt():
            try:
                terminal.write(queries.query(connection, typed, limit=limit), format, None, out)
            except UserError as error:
                err.print(str(error), markup=False, style="red")
    return None


def _prompt() -> Iterator[str]:
    """Statements typed by a person, each ended by a semicolon."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history)
    err.print("Type a select and end it with ; — Ctrl-D leaves.")
    typed = ""
    while True:
        try:
            typed += input("saeflow> " if not typed else "      -> ") + "\n"
        except EOFError:
            return
        if typed.rstrip().endswith(";"):
            yield typed
            typed = ""


@commands.command()
def doctor(store: StoreOption = None) -> None:
    """Report versions, processor, speeds and free disk. Example: `saeflow doctor`"""
    from saeflow import doctor as examination

    table = a_table("what", "here")
    for name, value in examination.facts(store_path(store)):
        table.add_row(name, value)
    out.print(table)
    for problem in examination.problems():
        out.print(problem, markup=False, style="yellow")
