"""The `saeflow` command. Needs no Prefect; heavy modules are loaded by the commands that use them."""

from __future__ import annotations

from typing import Annotated

import typer

from saeflow import __version__
from saeflow.cli import ask, common, label, run, serve, store, synth
from saeflow.cli.common import out

app = typer.Typer(
    name="saeflow",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Store activations once, train many sparse autoencoders, ask anything in SQL.\n\n"
    "Start with `saeflow init my.toml`, then `saeflow run my.toml`, then `saeflow ask`.",
)
for each in (run, synth, store, ask, label, serve):
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
    common.main(app, "saeflow")
