"""Explanations by rules or by a language model: `saeflow explain`."""

from __future__ import annotations

import typer

explain_commands = typer.Typer()
