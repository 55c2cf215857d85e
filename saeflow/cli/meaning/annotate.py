"""Classes given to tokens, spans and documents: `saeflow annotate`."""

from __future__ import annotations

import typer

annotate_commands = typer.Typer()
