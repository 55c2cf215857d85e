"""Commands that answer: the named questions, your own SQL, and the state of the machine."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from saeflow.cli.common import RunOption, StoreOption, a_table, connection_to, err, open_store, out, require_place
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import harmless_lines
from saeflow.store.store import store_path

if TYPE_CHECKING:
    import pyarrow as pa

    from saeflow.query import ask as queries

commands = typer.Typer()

Format = Literal["table", "csv", "json", "jsonl", "parquet"]
FormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        "-f",
        help="How to answer; default: as the file's name ends, else a table. In CSV a text that begins with = + - @, "
        "a tab or a line break gets a ' in front, so that no spreadsheet runs it that is told that the separator is "
        "the comma; numbers stay as they are.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", "-n", min=1, help="Rows at most; default: all, but only the first in a terminal."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of the terminal.")]


@dataclass(frozen=True)
class Reply:
    """How an answer is given: in which format, where, and how much of it."""

    format: Format | None
    output: Path | None
    limit: int | None

    def __post_init__(self) -> None:
        if self.output is not None:
            require_place(self.output)
        elif self.format == "parquet" and sys.stdout.isatty():
            raise UserError("Parquet is not for a terminal. Write it to a file: -o answer.parquet")

    def give(self, find: Callable[[int | None], pa.Table], unasked: int | None) -> None:
        """Find so many rows and write them. Only a table on the screen is cut `unasked`, and says so."""
        from saeflow.cli import render

        form = self.format or render.format_of(self.output)
        on_screen = form == "table" and self.output is None
        most = self.limit or (unasked if on_screen else None)
        table = find(most and most + 1)
        render.write(table.slice(0, most), form, self.output, out)
        if on_screen and most and len(table) > most:
            err.print(f"The first {most:,} rows. More: -n {10 * most}; all: -o FILE.csv", markup=False, soft_wrap=True)


def _question_names(incomplete: str) -> list[tuple[str, str]]:
    from saeflow.query import ask as queries

    return [(each.name, each.answers) for each in queries.questions() if each.name.startswith(incomplete)]


class _Ask(TyperCommand):
    """Numbers below zero are values, and no options; `-inf` would be read as `-i -n f`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for word in itertools.takewhile(lambda word: word != "--", args):
            if re.fullmatch("-inf(inity)?", word, re.IGNORECASE):
                raise UserError(
                    f"{word} reads like an option. Write -- before it: saeflow ask tokens_where 12 -- {word}"
                )
        return super().parse_args(ctx, args)


@commands.command(cls=_Ask, context_settings={"ignore_unknown_options": True})
def ask(
    question: Annotated[
        str | None, typer.Argument(help="Name of a question; none lists them.", autocompletion=_question_names)
    ] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="Its parameters, in order; without them they are explained. 3,7,12 is a list."),
    ] = None,
    store: StoreOption = None,
    run: RunOption = None,
    show_sql: Annotated[
        bool, typer.Option("--sql", help="Print the question as SQL for the duckdb shell instead of the answer.")
    ] = False,
    format: FormatOption = None,
    limit: Limit = None,
    output: Output = None,
) -> None:
    """Ask a named question. Examples: `saeflow ask top_tokens 123 10`, `saeflow ask tokens_where 123 0.5 -f csv`"""
    from saeflow.query import ask as queries

    if question is None:
        return _list_questions()
    given = arguments or []
    chosen = queries.find(question)
    values = _values(chosen, given)
    counted = "n" in list(values)[: len(given)]
    reply = Reply(format, output, limit)
    with connection_to(store, run) as connection:
        values = queries.resolved(connection, chosen, values)
        if show_sql:
            text = queries.spelled(connection, chosen, values, limit)
            return typer.echo(text) if output is None else _keep(output, text)
        reply.give(lambda most: queries.ask(connection, question, values, most), None if counted else 20)
    return None


def _values(question: queries.Question, given: list[str]) -> dict[str, Any]:
    from saeflow.query import ask as queries

    try:
        return dict(queries.named(question, given))
    except UserError as error:
        if all(parameter.default is not None for parameter in question.parameters[len(given) :]):
            raise
        raise UserError(f"{error}\n\n{_explained(question)}") from None


def _explained(question: queries.Question) -> str:
    """A question, its parameters and an example, in 80 columns."""
    width = max(len(str(parameter.name)) for parameter in question.parameters)
    rows = [
        f"  {each.name:{width}}  {each.type}{' (a list: 3,7,12)' * each.type.endswith('[]')}, "
        + ("needed" if each.default is None else f"{each.default} where not given")
        for each in question.parameters
    ]
    about = (f"Gives: {question.grain}", f"Units: {question.units}", f"Example: {question.command}")
    return "\n".join([_filled(question.answers), *rows, *map(_filled, about)])


def _filled(text: str) -> str:
    return textwrap.fill(text, 79, subsequent_indent="  ", break_long_words=False)


def _list_questions() -> None:
    from saeflow.query import ask as queries

    known = queries.questions()
    for title in queries.GROUPS:
        mine = [question for question in known if question.group == title]
        for number, question in enumerate(mine):
            if number == 0:
                out.print(title, style="bold", markup=False)
            out.print(f"  {question.brief}", markup=False, soft_wrap=True)
            out.print(
                textwrap.fill(question.answers, 74, initial_indent=" " * 6, subsequent_indent=" " * 6), markup=False
            )
    out.print("\nsaeflow ask NAME explains one of them and its parameters.", markup=False)


@commands.command()
def sql(
    query: Annotated[str | None, typer.Argument(help="A select; none opens a prompt.")] = None,
    store: StoreOption = None,
    run: RunOption = None,
    script: Annotated[bool, typer.Option("--script", help="Print the run's SQL for the duckdb shell.")] = False,
    format: FormatOption = None,
    limit: Limit = None,
    output: Output = None,
) -> None:
    """Run your own read-only SQL. Example: `saeflow sql 'select count(*) from tokens'`"""
    from saeflow.query import ask as queries

    reply = Reply(format, output, limit)
    if script:
        text = queries.script(open_store(store), run)
        return typer.echo(text) if output is None else _keep(output, text)
    with connection_to(store, run) as connection:

        def answer(typed: str) -> None:
            reply.give(lambda most: queries.query(connection, typed, limit=most), 1000)

        if query is not None or not sys.stdin.isatty():
            return answer(query if query is not None else _piped())
        if output is not None:
            raise UserError(f"Which answer belongs in {output}? Give the query too: saeflow sql 'select …' -o {output}")
        for typed in _prompt():
            try:
                answer(_IN_THE_PROMPT.get(typed, typed))
            except UserError as error:
                err.print(harmless_lines(str(error)), markup=False, style="red")
    return None


def _keep(path: Path, text: str) -> None:
    path.write_text(text + "\n", "utf-8")


def _piped() -> str:
    """Standard input, as far as a statement may be long."""
    from saeflow.query.ask import LONGEST_SQL

    try:
        return sys.stdin.read(LONGEST_SQL + 1)
    except UnicodeDecodeError:
        raise UserError("Standard input is not text in UTF-8.") from None


_IN_THE_PROMPT = {
    ".tables": "select distinct table_name from duckdb_columns() where schema_name = current_schema() order by all",
    ".questions": "select distinct function_name as question, parameters from duckdb_functions() "
    "where schema_name = current_schema() and function_type = 'table_macro' order by all",
}
"""What may be typed in the place of a statement."""


def _prompt() -> Iterator[str]:
    """Statements typed by a person, each ended by a semicolon, or one of the words above."""
    err.print("Type a select and end it with ; — .tables and .questions list what there is, Ctrl-D leaves.")
    with _history():
        typed = ""
        while True:
            try:
                typed += input("saeflow> " if not typed else "      -> ") + "\n"
            except EOFError:
                return
            if typed.rstrip().endswith(";") or typed.strip() in _IN_THE_PROMPT:
                yield typed.strip()
                typed = ""


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Arrow keys, and what was typed the last times, where this Python can."""
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


@commands.command()
def doctor(store: StoreOption = None) -> None:
    """Report versions, processor, speeds and free disk. Example: `saeflow doctor`"""
    from saeflow.cli import doctor as examination

    table = a_table("what", "here")
    for name, value in examination.facts(store_path(store)):
        table.add_row(name, value)
    out.print(table)
    for problem in examination.problems():
        out.print(problem, markup=False, style="yellow")
