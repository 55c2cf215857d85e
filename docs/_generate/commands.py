"""The reference of the commands: arguments, options and help, as the parser of `saeflow` knows them."""

from __future__ import annotations

import re
from typing import Any

import typer

from _generate import code, table
from saeflow.cli.app import app


def page() -> str:
    group: Any = typer.main.get_command(app)
    summary = [(f"[`{name}`](#{name})", plain(command.help).split(" Example")[0]) for name, command in named(group)]
    parts = [table(["command", "does"], summary), "## Options before the command\n\n" + _parameters(group, "saeflow")]
    return "\n\n".join(parts + [_command(name, command) for name, command in named(group)])


def named(group: Any) -> list[tuple[str, Any]]:
    """Commands in the order of `saeflow --help`."""
    return list(group.commands.items())


def _command(name: str, command: Any) -> str:
    context = command.make_context(f"saeflow {name}", [], resilient_parsing=True)
    usage = command.get_usage(context).removeprefix("Usage: ")
    parts = [f"## {name}", f"```text\n{usage}\n```", plain(command.help), _parameters(command, f"saeflow {name}")]
    return "\n\n".join(part for part in parts if part)


def _parameters(command: Any, name: str) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    rows = [(code(about[0]), plain(about[1])) for about in records if about]
    return table(["argument or option", "meaning"], rows)


def plain(text: str | None) -> str:
    """Help as one line of Markdown: what looks like a tag or a link is text."""
    line = re.sub(r"<(?=[\w|/])", "&lt;", " ".join((text or "").split()))
    return line.replace("[", "\\[")
