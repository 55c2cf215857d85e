"""Runs parts of the benchmark, each for a limited time, in a process that may die without ending the others.

After an error of CUDA such as an illegal address, no more work is possible in a process. So each part has processes of
its own. A process prints a JSON line for each row, and one before each task; if it dies or takes too long, the task it
was at has failed, and another process does the tasks after it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.benchmarks._gpu.measure import Card, Row

Task = Callable[[], Row | Sequence[Row]]
ROOT = Path(__file__).resolve().parents[3]


class Part(NamedTuple):
    """Some tasks that share what they work on."""

    name: str
    tasks: Callable[[Card], dict[str, Task]]
    seconds: float
    """What the part may take, if there is time for all."""
    is_quick: bool = True
    """True if `--quick` runs it."""

    def share_of(self, left: Sequence[Part], seconds: float) -> float:
        """Return the part's share of the seconds that it and the parts behind it have."""
        return seconds * self.seconds / sum(part.seconds for part in left)


def do_tasks(part: Part, card: Card, without: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Do the tasks that are not named, and yield what a process prints: {"begun": task}, then its rows."""
    for name, task in part.tasks(card).items():
        if name in without:
            continue
        yield {"begun": name}
        try:
            found = task()
        except Exception as error:  # whatever a part raises, the others are measured
            yield asdict(failed(name, f"{type(error).__name__}: {error}"))
            if _is_final(error):
                raise
        else:
            yield from map(asdict, [found] if isinstance(found, Row) else found)
        card.free()


def failed(name: str, why: str) -> Row:
    return Row(name, note=f"failed: {' '.join(why.split())[:300]}")


def _is_final(error: Exception) -> bool:
    """True if CUDA can do no more in this process."""
    is_full = isinstance(error, torch.OutOfMemoryError)
    return "CUDA error" in str(error) and not is_full


def rows_of(part: Part, command: Sequence[str], seconds: float) -> list[Row]:
    """Run a part in processes of their own until all tasks were begun or the time is over."""
    ends, begun, rows = time.monotonic() + seconds, list[str](), list[Row]()
    while True:
        n_before, done = len(begun), _listen(command, begun, rows, ends)
        if done:
            return rows
        at = begun[-1] if len(begun) > n_before else f"{part.name}, the tasks left"
        is_late = time.monotonic() >= ends
        if not (rows and rows[-1].name == at and rows[-1].note):
            rows.append(failed(at, f"not done in {seconds:.0f} s" if is_late else "the process died"))
        if is_late or len(begun) == n_before:
            return rows


def _listen(command: Sequence[str], begun: list[str], rows: list[Row], ends: float) -> bool:
    """Add what a process says to `begun` and `rows`; return True if it ended well."""
    words = [*command, "--without", json.dumps(begun)]
    lines: queue.Queue[str | None] = queue.Queue()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True) as process:
        reader = threading.Thread(target=_read, args=(process, lines))
        reader.start()
        try:
            while (line := lines.get(timeout=max(ends - time.monotonic(), 0.01))) is not None:
                _note(line, begun, rows)
            return process.wait() == 0
        except queue.Empty:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            reader.join()


def _note(line: str, begun: list[str], rows: list[Row]) -> None:
    said = json.loads(line) if line.startswith("{") else {}
    if "begun" in said:
        begun.append(said["begun"])
    elif "name" in said:
        rows.append(Row(**said))
        print(f"  {rows[-1].name}: {rows[-1].value} {rows[-1].unit} {rows[-1].note}", flush=True)


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def child(part: Part, card: Card, without: Sequence[str]) -> None:
    """Do what the process of a part does."""
    for said in do_tasks(part, card, without):
        print(json.dumps(said), flush=True)


def command_of(part: Part, is_toy: bool) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.gpu", "--part", part.name, *(["--dry"] if is_toy else [])]
