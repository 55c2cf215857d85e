"""The `saeflow` command and its families of commands.

`saeflow --help` must stay quick, so the files of this package import only typer and rich. Everything else is imported
by the command that uses it. Nothing here needs Prefect.
"""

from __future__ import annotations

from typing import Annotated

import typer

from saeflow import __version__
from saeflow.cli.answers.ask import ask_commands
from saeflow.cli.answers.sql import sql_commands
from saeflow.cli.browse import browse_commands
from saeflow.cli.common import out, run_command_line
from saeflow.cli.doctor import doctor_commands
from saeflow.cli.label import label_commands
from saeflow.cli.meaning.annotate import annotate_commands
from saeflow.cli.meaning.compare import compare_commands
from saeflow.cli.meaning.effects import effect_commands
from saeflow.cli.meaning.explain import explain_commands
from saeflow.cli.meaning.probe import probe_commands
from saeflow.cli.run import run_commands
from saeflow.cli.serve import serve_commands
from saeflow.cli.store import store_commands
from saeflow.cli.synth import synth_commands

app = typer.Typer(
    name="saeflow",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Store activations once, train many sparse autoencoders, ask anything in SQL.\n\n"
    "Start with `saeflow init my.toml`, then `saeflow run my.toml`, then `saeflow ask`.",
)
for family in (
    run_commands, synth_commands, store_commands, ask_commands, sql_commands, doctor_commands, browse_commands,
    label_commands, annotate_commands, probe_commands, explain_commands, effect_commands, compare_commands,
    serve_commands,
):  # fmt: skip
    app.add_typer(family)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    pass


def main() -> None:
    """The `saeflow` command."""
    run_command_line(app, "saeflow")
