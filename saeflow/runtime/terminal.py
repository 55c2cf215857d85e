"""The one place that prints. A terminal obeys no text that comes through here: no escape code, no markup, no mark of
direction. `tests/system/test_terminal.py` finds any other way of printing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.text import Text

from saeflow.runtime.text import HOSTILE, harmless_lines

if TYPE_CHECKING:
    from rich.table import Column, Table

_WIDEST = 10_000
LONGEST_WORD = 100
"""Cells of the longest name, path or number that a table keeps on one line. Longer words are folded."""


class Terminal(Console):
    """Standard output, standard error or a file, as a person reads it. A reader that has gone stops no work."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False} | options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(harmless_lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control is None and HOSTILE.search(segment.text):
                segment = Segment(harmless_lines(segment.text), segment.style)
            yield segment

    def print_table(self, table: Table, may_go: Sequence[str] = ()) -> None:
        """Print a table without breaking a word, so that a name can be copied.

        If the table is too wide, columns of `may_go` are left out, the first ones first, and a line below says which.
        What still is too wide reaches beyond the edge.
        """
        left_out: list[str] = []
        while self.least_width(table) > self.width and len(left_out) < len(may_go):
            left_out.append(may_go[len(left_out)])
            kept = [column for column in table.columns if column.header != left_out[-1]]
            table.columns = [dataclasses.replace(column, _index=place) for place, column in enumerate(kept)]
        options = self.options.update(width=max(self.width, self.least_width(table)))
        lines = [Text.assemble(*((s.text, s.style or "") for s in line)) for line in self.render_lines(table, options)]
        for line in lines:
            line.rstrip()
        self.print(Text("\n").join(lines), soft_wrap=True)
        if left_out:
            self.print(f"No room for: {', '.join(left_out)}.", style="dim")

    def least_width(self, table: Table) -> int:
        """Return in how many cells the table can be printed without breaking a word."""
        for column in table.columns:
            column.min_width = self._least_width(column)
        return Measurement.get(self, self.options.update(width=_WIDEST), table).minimum

    def _least_width(self, column: Column) -> int:
        wide = self.options.update(width=_WIDEST)
        cells = [Measurement.get(self, wide, cell) for cell in (column.header, *column.cells)]
        return max(cell.maximum if column.no_wrap else min(cell.minimum, LONGEST_WORD) for cell in cells)

    def on_broken_pipe(self) -> None:
        _let_go(self.file.fileno())


def write_exactly(pieces: Iterable[bytes]) -> None:
    """Write to standard output what another program reads, byte by byte. Ends quietly if that program has ended."""
    sys.stdout.flush()
    try:
        sys.stdout.buffer.writelines(pieces)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        _let_go(sys.stdout.fileno())


def write_text(text: str, terminal: Terminal) -> None:
    """Write a text for another program to standard output; a person at a terminal sees it without what would act."""
    if sys.stdout.isatty():
        terminal.print(text, soft_wrap=True)
    else:
        write_exactly([text.encode() + b"\n"])


def _let_go(handle: int) -> None:
    """Lead a stream whose reader has gone to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, handle)
    os.close(nowhere)


def prepare_streams() -> None:
    """Open the standard streams that are closed, to nowhere. A letter that an encoding lacks becomes `?`."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


class _Printed(logging.Handler):
    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self.terminal.print(self.format(record), soft_wrap=True)


@contextlib.contextmanager
def printing_logs(terminal: Terminal) -> Iterator[None]:
    """Print warnings of the log, and Python's own, like any other text."""
    handler = _Printed(terminal)
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)
