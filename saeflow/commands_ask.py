"""Commands that answer: the named questions, your own SQL, and the state of the machine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from saeflow.command_line import RunOption, StoreOption, a_table, connection_to, err, open_store, out, require_place
from saeflow.harmless import harmless_lines, sanitise
from saeflow.sections import UserError
from saeflow.store import store_path

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from saeflow import queries

commands = typer.Typer()

Format = Literal["table", "csv", "json", "jsonl", "parquet"]
FormatOption = Annotated[
    Format | None, typer.Option("--format", "-f", help="How to answer; default: as the file's name ends, else a table.")
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
        from saeflow import terminal

        form = self.format or terminal.format_of(self.output)
        on_screen = form == "table" and self.output is None
        most = self.limit or (unasked if on_screen else None)
        table = find(most and most + 1)
        terminal.write(table.slice(0, most), form, self.output, out)
        if on_screen and most and len(table) > most:
            err.print(f"The first {most:,} rows. More: -n {10 * most}; all: -o FILE.csv", markup=False, soft_wrap=True)


@commands.command(context_settings={"ignore_unknown_options": True})
def ask(
    question: Annotated[str | None, typer.Argument(help="Name of a question; none lists them.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Its parameters, in order.")] = None,
    store: StoreOption = None,
    run: RunOption = None,
    format: FormatOption = None,
    limit: Limit = None,
    output: Output = None,
) -> None:
    """Ask a named question. Examples: `saeflow ask top_tokens 123 10`, `saeflow ask tokens_where 123 0.5 -f csv`"""
    from saeflow import queries

    if question is None:
        return _list_questions()
    given = arguments or []
    chosen = queries.find(question)
    values = queries.named(chosen, given)
    counted = "n" in list(values)[: len(given)]
    reply = Reply(format, output, limit)
    with connection_to(store, run) as connection:
        _refuse_unknown(connection, chosen, values)
        reply.give(lambda most: queries.ask(connection, question, given, most), None if counted else 20)
    return None


def _refuse_unknown(connection: duckdb.DuckDBPyConnection, question: queries.Question, values: dict[str, Any]) -> None:
    """A feature or a source that the run does not have is a slip of the finger, not an empty answer."""
    from saeflow import queries

    if "feature" in values:
        last = queries.query(connection, "select max(feature_id) from stg_feature_stats").column(0)[0].as_py()
        if last is not None and not 0 <= values["feature"] <= last:
            raise UserError(f"There is no feature {values['feature']}; features go from 0 to {last}.")
    if question.name == "compare_sources":
        sql = "select distinct source from stg_documents where source is not null order by source"
        sources = queries.query(connection, sql).column(0).to_pylist()
        for wrong in (source for source in values.values() if source not in sources):
            there = ", ".join(map(sanitise, sources[:_SOURCES_SAID]))
            more = f" … (saeflow sql '{sql}')" if len(sources) > _SOURCES_SAID else ""
            raise UserError(f"There is no source {wrong!r}. There are: {there}{more}")


_SOURCES_SAID = 20


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
    format: FormatOption = None,
    limit: Limit = None,
    output: Output = None,
) -> None:
    """Run your own read-only SQL. Example: `saeflow sql 'select count(*) from tokens'`"""
    from saeflow import queries

    reply = Reply(format, output, limit)
    if script:
        text = queries.script(open_store(store), run)
        return typer.echo(text) if output is None else _keep(output, text)
    with connection_to(store, run) as connection:

        def answer(typed: str) -> None:
            reply.give(lambda most: queries.query(connection, typed, limit=most), 1000)

        if query is not None or not sys.stdin.isatty():
            return answer(query if query is not None else sys.stdin.read())
        if output is not None:
            raise UserError(f"Which answer belongs in {output}? Give the query too: saeflow sql 'select …' -o {output}")
        for typed in _prompt():
            try:
                answer(typed)
            except UserError as error:
                err.print(harmless_lines(str(error)), markup=False, style="red")
    return None


def _keep(path: Path, text: str) -> None:
    path.write_text(text + "\n", "utf-8")


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
