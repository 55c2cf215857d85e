"""The named questions: their list, what each needs, and its answer, with an estimate before one that takes long."""

from __future__ import annotations

import contextlib
import itertools
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from saeflow.cli.answers.reply import FormatOption, Limit, Output, Reply, write_words
from saeflow.cli.common import RunOption, StoreOption, existing_store, out, print_line, print_note
from saeflow.runtime.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from saeflow.query.questions import Question
    from saeflow.store.store import Store


ask_commands = typer.Typer()


def _complete_question(incomplete: str) -> list[tuple[str, str]]:
    from saeflow.query.questions import questions

    return [(each.name, each.answers) for each in questions() if each.name.startswith(incomplete)]


class _AskCommand(TyperCommand):
    """Takes numbers below zero as values, not options. `-inf` would be read as `-i -n f`, so it is refused."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for word in itertools.takewhile(lambda word: word != "--", args):
            if re.fullmatch("-inf(inity)?", word, re.IGNORECASE):
                raise UserError(
                    f"{word} reads like an option. Write -- before it: saeflow ask tokens_where 12 -- {word}"
                )
        return super().parse_args(ctx, args)


@ask_commands.command("ask", cls=_AskCommand, context_settings={"ignore_unknown_options": True})
def ask_command(
    question: Annotated[
        str | None,
        typer.Argument(help="Name of a question; without one, all are listed.", autocompletion=_complete_question),
    ] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="The question's parameters, in order or as --name value; without them they are explained. "
            "3,7,12 is a list."
        ),
    ] = None,
    store: StoreOption = None,
    run: RunOption = None,
    show_sql: Annotated[
        bool,
        typer.Option(
            "--sql",
            help="Print the question as SQL for the duckdb shell instead of the answer. A question about tokens that "
            "you choose takes the select that follows.",
        ),
    ] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say after the answer, on standard error, what it cost: files, requests, bytes and seconds. As JSON "
            "if the answer is JSON.",
        ),
    ] = False,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Wait for the exact answer; print no estimate from a sample before it."),
    ] = False,
    format: FormatOption = None,
    limit: Limit = None,
    output: Output = None,
) -> None:
    """Ask a named question.

    Examples: `saeflow ask top_tokens 123 10`, `saeflow ask tokens_where 123 0.5 -f csv`
    """
    from saeflow.query.generations import again_if_replaced
    from saeflow.query.questions import find_question

    if question is None:
        return _list_questions()
    if show_sql and explain:
        raise UserError("--explain says what an answer cost, and --sql gives none. Leave one of them out.")
    chosen = find_question(question)
    given = _by_name(chosen, arguments or [])
    values = _parse_or_explain(chosen, given)
    reply, opened = Reply(format, output, limit), existing_store(store)
    asking = _Asking(opened, run, chosen, values, reply, "n" in given, show_sql, explain, exact)
    return again_if_replaced(opened, asking.answer)


@dataclass(frozen=True)
class _Asking:
    """A question with the values of its parameters, and how it is to be answered."""

    store: Store
    run: str | None
    question: Question
    values: dict[str, Any]
    reply: Reply
    says_how_many: bool
    show_sql: bool
    explain: bool
    exact: bool

    def answer(self) -> None:
        from saeflow.query.ask import as_statement, ask, names_read, resolve_names
        from saeflow.query.connection import connect_to_run
        from saeflow.query.files.cost import Cost, Spent, Watch
        from saeflow.query.outside.approximation import estimate_of, reads_for_estimate
        from saeflow.query.outside.supply import supply

        watch, spent, reply, name = Watch(), list[Spent](), self.reply, self.question.name
        whole = self.question.takes_select and self.values["sql"]  # a select may read any view
        names = names_read(self.question, self.values) | reads_for_estimate(name)
        current, connection = connect_to_run(self.store, self.run, names=None if whole else names)
        spent.append(watch.spent(self.store.storage))
        with contextlib.closing(connection):
            values = resolve_names(connection, self.question, self.values)
            if self.show_sql and not whole:
                return write_words(as_statement(connection, self.question, values, reply.limit), reply.output)
            readings = supply(self.store, current, connection, self.question, values)
            estimate = None
            if not self.exact and reply.is_watched:
                estimate = estimate_of(connection, self.question, values, readings)
            if estimate:
                again = partial(ask, connection, readings=readings, run=current)
                _show_estimate(reply, again, *estimate, self.says_how_many)
                watch.spent(self.store.storage)

            def find(most: int | None) -> pa.Table:
                table = ask(connection, name, values, most, readings, current)
                spent.append(watch.spent(self.store.storage))
                return table

            answer = reply.write(find, None if self.says_how_many else 20)
        if self.explain:
            cost = Cost.of(current, name, values, answer, *spent)
            print_note(cost.as_json() if reply.form in ("json", "jsonl") else str(cost))
        return None


def _show_estimate(
    reply: Reply, ask: Callable[..., pa.Table], question: str, values: Mapping[str, Any], says_how_many: bool
) -> None:
    from saeflow.query.questions import find_question

    takes_n = any(parameter.name == "n" for parameter in find_question(question).parameters)

    def find(most: int | None) -> pa.Table:
        wanted = {"n": most} if takes_n and most and not says_how_many else {}
        return ask(question, {**values, **wanted}, most)

    print_note(_ESTIMATE)
    reply.write(find, None if says_how_many else 20)
    print_note("The exact answer:")


_ESTIMATE = (
    "Approximate, from a sample of a 64th of the documents: of 100 samples, 95 have the true number between the ends "
    "shown. All values are counted next; Ctrl-C ends that."
)
_LIKE_AN_OPTION = "A text that begins with -- is given by its name: --text=--word."


def _by_name(question: Question, words: list[str]) -> dict[str, object]:
    """Return the typed words by parameter: `--name value` and `--name=value` say which, the others come in order."""
    from saeflow.query.questions import name_arguments

    names = {f"--{parameter.name}": parameter.name for parameter in question.parameters}
    in_order, named, waiting = list[object](), dict[str, object](), list(words)
    while waiting:
        word = waiting.pop(0)
        option, sign, value = word.partition("=")
        if option not in names and re.fullmatch("--[a-z_]+", option):
            known = ", ".join(names) or "none"
            raise UserError(f"{question.name} has no parameter {option}. It has: {known}.\n{_LIKE_AN_OPTION}")
        if option not in names or (not sign and not waiting):
            in_order.append(word)
        elif names[option] in named:
            raise UserError(f"{question.name} is given {option} twice.")
        else:
            named[names[option]] = value if sign else waiting.pop(0)
    return name_arguments(question, in_order, named)


def _parse_or_explain(question: Question, given: dict[str, object]) -> dict[str, Any]:
    """Return the values of the parameters. Explains the question if one that is needed was left out."""
    from saeflow.query.questions import parse_arguments

    try:
        return dict(parse_arguments(question, given))
    except UserError as error:
        if all(parameter.default is not None for parameter in question.parameters if parameter.name not in given):
            raise
        raise UserError(f"{error}\n\n{_explain_question(question)}") from None


def _explain_question(question: Question) -> str:
    """Return a question, its parameters and an example, in 80 columns."""
    width = max(len(str(parameter.name)) for parameter in question.parameters)
    rows = [
        f"  {each.name:{width}}  {each.type}{' (a list: 3,7,12)' * each.type.endswith('[]')}, "
        + ("needed" if each.default is None else f"{each.default} where not given")
        for each in question.parameters
    ]
    about = (f"Gives: {question.grain}", f"Units: {question.units}", f"Example: {question.command}")
    return "\n".join([_wrap(question.answers), *rows, *map(_wrap, about)])


def _wrap(text: str) -> str:
    return textwrap.fill(text, 79, subsequent_indent="  ", break_long_words=False)


def _list_questions() -> None:
    from saeflow.query.questions import GROUPS, questions

    known = questions()
    for title in GROUPS:
        mine = [question for question in known if question.group == title]
        for number, question in enumerate(mine):
            if number == 0:
                out.print(title, style="bold")
            print_line(f"  {question.brief}")
            out.print(textwrap.fill(question.answers, 74, initial_indent=" " * 6, subsequent_indent=" " * 6))
    out.print("\nsaeflow ask NAME explains one of them and its parameters.")
