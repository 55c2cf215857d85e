"""Each feature against each class: `saeflow probe`."""

from __future__ import annotations

import typer

probe_commands = typer.Typer()
