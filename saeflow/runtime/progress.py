"""What a person sees while a stage works: bars on a terminal, plain lines elsewhere, and nothing with -q."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from saeflow.runtime.terminal import Terminal
from saeflow.runtime.text import harmless_lines

_PLAIN_SECONDS = 5.0
"""Seconds between two plain lines of one stage."""

_BESIDE_LINE = 27
"""Terminal columns for the bar (at least 10), the share (4), the time left (9) and the gaps between them."""


class Stopped(KeyboardInterrupt):
    """Stops work in a thread that no signal reaches."""


@dataclass
class Bar:
    """Counts the units of one stage."""

    stage: str
    total: int | None
    unit: str
    show: Callable[[Bar], None]
    done: int = 0
    before: int = 0
    note: str = ""
    stopping: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, n: int, note: str = "") -> None:
        """Count `n` more units. Raises Stopped if the work should stop."""
        if self.stopping.is_set():
            raise Stopped
        with self.lock:
            self.done += n
            self.note = note
            self.show(self)

    def resume_at(self, done: int) -> None:
        """Start from the units that an earlier run has done."""
        self.done = self.before = done

    @property
    def rate(self) -> float:
        return (self.done - self.before) / max(time.monotonic() - self.began, 1e-9)

    @property
    def line(self) -> str:
        share = f" of {self.total:,} ({self.done / self.total:.0%})" if self.total else ""
        note = f", {self.note}" if self.note else ""
        return f"{self.stage}: {self.done:,}{share} {self.unit}, {self.rate:,.0f}/s{self._left}{note}"

    @property
    def _left(self) -> str:
        if not self.total or not self.before < self.done < self.total:
            return ""
        return f", {timedelta(seconds=round((self.total - self.done) / self.rate))} left"

    def short_line(self, width: int) -> str:
        """Return the text beside a bar that fits: without the rate if space is short, then without the count."""
        count, rate = f"{self.done:,} {self.unit}", f"{self.rate:,.0f}/s"
        lines = (f"{count} {rate} {self.note}".rstrip(), f"{count} {self.note}".rstrip(), self.note, count)
        return next((line for line in lines if line and len(line) <= width), "")


Listener = Callable[[Bar], None]
"""Called with the bar whenever it advances, so it must be quick."""


@dataclass
class Progress:
    """Where stages report to. With `verbosity` -1 only errors show; 0 is normal; 1 adds detail."""

    console: Terminal = field(default_factory=lambda: Terminal(stderr=True))
    verbosity: int = 0
    listener: Listener | None = None
    log: Callable[[str], None] | None = None
    """Also called with every message, but not with the lines of a bar."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Once set, the next `advance` of any bar raises Stopped, in any thread."""

    def say(self, text: str, verbosity: int = 0) -> None:
        if self.verbosity >= verbosity:
            self._print(text)
            if self.log is not None:
                self.log(harmless_lines(text))

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def skip(self, stage: str, what: str) -> None:
        """Report that a stage has nothing to do."""
        self.say(f"{stage}: already done, {what}; nothing to do")

    @contextlib.contextmanager
    def bar(self, stage: str, total: int | None, unit: str) -> Iterator[Bar]:
        """Show a bar over `total` units. It ends with one line: how many units in how many seconds."""
        with self._display(stage, total) as show:
            bar = Bar(stage, total, unit, show, stopping=self.stopping)
            yield bar
        seconds = time.monotonic() - bar.began
        self.say(f"{stage}: {bar.done:,} {unit} in {seconds:.1f} s ({bar.rate:,.0f}/s)")
        self._tell(bar)

    def _tell(self, bar: Bar) -> None:
        if self.listener is not None:
            self.listener(bar)

    @contextlib.contextmanager
    def _display(self, stage: str, total: int | None) -> Iterator[Callable[[Bar], None]]:
        if self.verbosity < 0 or not self.console.is_terminal:
            yield self._plain()
            return
        columns = [
            TextColumn("{task.description:12}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        ]
        with RichProgress(*columns, console=self.console, transient=True) as display:
            task = display.add_task(stage, total=total, line="")

            def show(bar: Bar) -> None:
                line = bar.short_line(self.console.width - _BESIDE_LINE - max(12, len(stage)))
                display.update(task, completed=bar.done, line=line)
                self._tell(bar)

            yield show

    def _plain(self) -> Callable[[Bar], None]:
        last = time.monotonic()

        def show(bar: Bar) -> None:
            nonlocal last
            if self.verbosity >= 0 and time.monotonic() - last >= _PLAIN_SECONDS:
                last = time.monotonic()
                self._print(bar.line)
            self._tell(bar)

        return show
