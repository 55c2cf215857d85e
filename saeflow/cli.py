"""The `saeflow` command. Needs no Prefect; heavy modules are loaded by the commands that use them."""

from __future__ import annotations

from typing import Annotated

import typer

from saeflow import (
    __version__,
    command_line,
    commands_ask,
    commands_label,
    commands_run,
    commands_serve,
    commands_store,
    commands_synth,
)
from saeflow.command_line import out

app = typer.Typer(
    name="saeflow",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Store activations once, train many sparse autoencoders, ask anything in SQL.\n\n"
    "Start with `saeflow init my.toml`, then `saeflow run my.toml`, then `saeflow ask`.",
)
for each in (commands_run, commands_synth, commands_store, commands_ask, commands_label, commands_serve):
    app.add_typer(each.commands)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    pass


def main() -> None:
    """The `saeflow` command."""
    command_line.main(app, "saeflow")
