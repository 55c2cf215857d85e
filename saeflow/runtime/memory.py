"""How much memory and time a piece of work takes, and how much memory the machine has."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from saeflow.runtime.errors import UserError
from saeflow.runtime.text import human_bytes


@dataclass
class Usage:
    """Wall-clock seconds, and peak resident memory in bytes."""

    seconds: float = 0.0
    peak_bytes: int = 0


@contextlib.contextmanager
def measure_usage() -> Iterator[Usage]:
    """Measure the block. The result is filled in when it ends.

    If the system cannot reset the peak, it counts from the start of the process.
    """
    with contextlib.suppress(OSError):  # "5" resets the peak: man 5 proc, clear_refs
        Path("/proc/self/clear_refs").write_text("5")
    taken, began = Usage(), time.monotonic()
    yield taken
    taken.seconds, taken.peak_bytes = time.monotonic() - began, peak_bytes()


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def require_share_of_memory(needed: int, what: str, remedy: str, n_quarters: int = 2) -> None:
    """Raise UserError if more bytes are needed than some quarters of the machine's memory.

    `what` ends with the verb that comes before the bytes, e.g. "4 features and 2 classes take".
    """
    most = total_memory() * n_quarters // 4
    if needed > most:
        share = {2: "half", 3: "three quarters"}[n_quarters]
        raise UserError(
            f"{what} {human_bytes(needed)} of memory, but {share} of this machine's is {human_bytes(most)}.\n{remedy}"
        )


def total_memory() -> int:
    """Return the bytes of memory of this machine, or the limit of its control group."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(path).read_text()))
    return total
