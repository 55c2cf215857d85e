"""Who holds a lease: a process, told apart from every other one that had its number."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, sanitise
from saeflow.store.files import json_text

SECONDS = 60.0
"""Seconds without a sign of life after which an owner counts as gone. SAEFLOW_LEASE_SECONDS sets another number."""

_MOST_SECONDS = 86_400
_ENDED = -1.0
"""Stands for the start time of a process that has ended."""


@dataclass(frozen=True)
class Owner:
    """The content of a lease. `beat` grows with every sign of life.

    `machine` and `born` tell the process apart from others that have, or had, the same number.
    """

    token: str
    machine: str
    pid: int
    born: float
    about: str
    seconds: float
    beat: int = 0

    @classmethod
    def here(cls) -> Owner:
        """Return an owner, with a fresh token, that stands for this process."""
        pid = os.getpid()
        return cls(uuid.uuid4().hex[:12], machine_name(), pid, start_time(pid) or 0.0, _about(), lease_seconds())

    @classmethod
    def parse(cls, content: str) -> Owner | None:
        """Return the owner that a lease names; None if nobody holds the lease or its content is no lease."""
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            found = cls(**json.loads(content))
            about = sanitise(brief(str(found.about), 300))
            found = replace(found, about=about, seconds=float(found.seconds), pid=int(found.pid))
            token_fits = re.fullmatch("[0-9a-z]{1,64}", found.token)
            if token_fits and 0 < found.pid < 1 << 31 and 0 < found.seconds <= _MOST_SECONDS:
                return found
        return None

    @property
    def text(self) -> str:
        """The lease as it is written."""
        return json_text(vars(self))

    def is_here(self) -> bool:
        """True if the owner is a process of this machine."""
        return self.machine == machine_name()

    def is_gone(self) -> bool:
        """True if the process is known to have ended."""
        found = start_time(self.pid) if self.is_here() else None
        return found == _ENDED or found not in (None, self.born)

    def lives(self) -> bool:
        """True if the process is known to run and is not suspended (SIGSTOP)."""
        return self.is_here() and start_time(self.pid) == self.born and not self._is_stopped()

    def _is_stopped(self) -> bool:
        with contextlib.suppress(psutil.Error):
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        return False


def lease_seconds() -> float:
    """Return how long leases of this process last. Raises UserError if SAEFLOW_LEASE_SECONDS is no such number."""
    text = os.environ.get("SAEFLOW_LEASE_SECONDS") or str(SECONDS)
    with contextlib.suppress(ValueError):
        if 1 <= float(text) <= _MOST_SECONDS:
            return float(text)
    raise UserError(
        f"SAEFLOW_LEASE_SECONDS is {text!r}, but it must be a number of seconds from 1 to {_MOST_SECONDS:,}.\n"
        f"Correct it, or leave it out: the default is {SECONDS:.0f}."
    )


def machine_name() -> str:
    """Return a name of this boot of this machine or container: within it a process number means one process."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def start_time(pid: int) -> float | None:
    """Return when a process began, by the kernel's own count if there is one, which no clock moves.

    `_ENDED` if it has ended. None if nobody can say: a system may hide all but the number of another user's process.
    """
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return _ENDED if fields[0] in (b"Z", b"X") else float(fields[19])
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return _ENDED if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return _ENDED
    except PermissionError:
        pass
    return None


def _about() -> str:
    command = " ".join([Path(sys.argv[0] or "python").name, *sys.argv[1:]])
    about = f"process {os.getpid()} on {platform.node()} ({command[:120]})"
    return about.encode("utf-8", "replace").decode()  # an argument need not be text
