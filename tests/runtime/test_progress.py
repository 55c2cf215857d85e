"""What a person sees on a terminal while a stage works."""

from __future__ import annotations

import io
import re
import time

import pytest

from saeflow.runtime.progress import Progress
from saeflow.runtime.terminal import Terminal


def last_line(width: int, stage: str, note: str) -> str:
    """Of a bar at half its way, without colours."""
    file = io.StringIO()
    progress = Progress(Terminal(file=file, width=width, force_terminal=True, color_system=None))
    with progress.bar(stage, 50_000_000, "tokens") as bar:
        for _ in range(3):
            bar.advance(8_000_000, note)
            time.sleep(0.01)
    lines = re.split(r"[\r\n]|\x1b\[[\d?]*\w", file.getvalue())
    return [line for line in lines if "48%" in line][-1]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("stage", ["train", "a stage of a long name"])
@pytest.mark.parametrize("note", ["", "unexplained 0.123, L0 32.0, dead 12345"])
def test_the_time_left_and_a_bar_are_seen_whatever_the_width(width: int, stage: str, note: str) -> None:
    line = last_line(width, stage, note)
    assert len(line.rstrip()) <= width
    assert re.search(r" \d:\d\d:\d\d\s*$", line)
    assert line.index("48%") - line.index("━") >= 10


def test_what_does_not_fit_beside_the_bar_goes_rate_first() -> None:
    note = "unexplained 0.123, L0 32.0, dead 120"
    assert re.search(rf"48% 24,000,000 tokens [\d,]+/s {note} ", last_line(200, "train", note))
    assert f"48% 24,000,000 tokens {note} " in last_line(100, "train", note)
    assert f"48% {note} " in last_line(80, "train", note)
    assert "48% 24,000,000 tokens 0:" in last_line(60, "train", note)
