"""What changes in the model when a feature is changed: `saeflow effects`, `saeflow steer`."""

from __future__ import annotations

import typer

effect_commands = typer.Typer()
