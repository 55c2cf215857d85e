"""How an answer is given: in which format, where, and at most how many rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeflow.cli.common import Format, out, print_note, require_place, whole_file
from saeflow.runtime.errors import UserError
from saeflow.runtime.terminal import write_text

if TYPE_CHECKING:
    import pyarrow as pa

FormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        "-f",
        help="Format of the answer. Default: by the ending of the output file, else a table. "
        "In CSV, a text that begins with = + - @, a tab or a line break gets a ' in front, so that no spreadsheet "
        "takes it for a formula; set the spreadsheet's separator to the comma. Numbers stay as they are.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", "-n", min=1, max=10**12, help="Most rows. Default: all, but on a terminal only the first."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of the terminal.")]


@dataclass(frozen=True)
class Reply:
    """How an answer is given: in which format, where, and at most how many rows."""

    format: Format | None
    output: Path | None
    limit: int | None

    def __post_init__(self) -> None:
        if self.output is not None:
            require_place(self.output)
        elif self.format == "parquet" and sys.stdout.isatty():
            raise UserError("Parquet is not for a terminal. Write it to a file: -o answer.parquet")

    @property
    def form(self) -> Format:
        from saeflow.cli.answers import render

        return self.format or render.format_for(self.output)

    @property
    def is_table_on_screen(self) -> bool:
        return self.output is None and self.form == "table"

    @property
    def is_watched(self) -> bool:
        """True if a person sees the rows: then an estimate before them is of use, and no program reads it."""
        return self.is_table_on_screen and sys.stdout.isatty()

    def write(self, find: Callable[[int | None], pa.Table], default_limit: int | None) -> pa.Table:
        """Find the rows, write and return them.

        Only a table on the screen has the default limit; a note then says so.
        """
        from saeflow.cli.answers import render

        form, on_screen = self.form, self.is_table_on_screen
        most = self.limit or (default_limit if on_screen else None)
        table = find(most and most + 1)
        shown = table.slice(0, most)
        render.write_answer(shown, form, self.output, out)
        if on_screen and most and len(table) > most:
            print_note(f"The first {most:,} rows. More: -n {10 * most}; all: -o FILE.csv")
        return shown


def write_words(text: str, path: Path | None) -> None:
    """Write text to a file, or on the terminal."""
    if path is None:
        write_text(text, out)
    else:
        with whole_file(path) as temporary:
            temporary.write_text(text + "\n", "utf-8")
