"""Who holds a lease, and the place where it is kept: read, watched, and replaced only if nobody else was quicker."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, sanitise
from saeflow.store.files import json_text, make_folder
from saeflow.store.links import read_bytes, remove, require_owner, unlinked

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


class Slot(ABC):
    """The place of one lease. A `tag` stands for the content that was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._watched: tuple[Any, float] | None = None
        """The tag that `watch` saw last, and since when, by this process's monotonic clock."""

    @abstractmethod
    def read(self) -> tuple[Owner | None, Any]:
        """Return the owner, None if nobody holds the lease, and the tag."""

    def guard(self) -> contextlib.AbstractContextManager[None]:
        """Keep others from taking the lease inside the block, if the storage has locks."""
        return contextlib.nullcontext()

    @abstractmethod
    def swap(self, owner: Owner | None, tag: Any) -> tuple[bool, Any]:
        """Write the owner if the content is still the tag's. Return whether that was so, and the new tag."""

    def beat(self, owner: Owner, tag: Any) -> tuple[bool, Any]:
        """Write a sign of life of the owner if it still holds the lease. Return as `swap` does."""
        return self.swap(owner, tag)

    def watch(self) -> tuple[Owner | None, Any, float]:
        """Return the owner, the tag, and since when the content is known to be unchanged."""
        owner, tag = self.read()
        if self._watched is None or self._watched[0] != tag:
            self._watched = tag, time.monotonic()
        return owner, tag, self._watched[1]


class FileSlot(Slot):
    """A file. A lock of the operating system is held while it is compared and replaced."""

    @contextlib.contextmanager
    def guard(self, seconds: float = 60) -> Iterator[None]:
        """Keep everybody else out of the block. Raises UserError if somebody stays inside for so long."""
        make_folder(self.path.parent)
        require_owner(self.path)
        path = unlinked(self.path.with_suffix(".lock"))
        try:
            with FileLock(path, timeout=seconds):
                yield
        except Timeout:
            raise UserError(
                f"{path} has been locked for {seconds:.0f} s: some process was halted while it published.\n"
                "Let that process go on (kill -CONT) or end it, then run the same command again."
            ) from None

    def read(self) -> tuple[Owner | None, Any]:
        try:
            content = read_bytes(self.path).decode("utf-8", "replace")
        except FileNotFoundError:
            return None, None
        owner = Owner.parse(content)
        beat = ""
        with contextlib.suppress(OSError):
            beat = read_bytes(self._beats(owner.token)).decode("utf-8", "replace") if owner else ""
        return owner, (content, beat)

    def swap(self, owner: Owner | None, tag: Any) -> tuple[bool, Any]:
        with self.guard():
            if not _is_unchanged(self.read()[1], tag):
                return False, None
            for left in self.path.parent.glob(f"{self.path.stem}.*.beat"):
                left.unlink(missing_ok=True)
            return True, self.put(owner)

    def put(self, owner: Owner | None) -> tuple[str, str | None] | None:
        """Write without a comparison; the caller holds the guard.

        A power cut may lose it: every owner is then gone, too.
        """
        if owner is None:
            self.path.unlink(missing_ok=True)
            return None
        fresh = self.path.with_suffix(".new")
        remove(fresh)
        fresh.write_text(owner.text, "utf-8")
        os.replace(fresh, self.path)
        return owner.text, None

    def beat(self, owner: Owner, tag: Any) -> tuple[bool, Any]:
        """Write to a file of the owner's own, without the guard: a process that is suspended here holds nobody up."""
        found = self.read()[0]
        if found is None or found.token != owner.token:
            return False, None
        unlinked(self._beats(owner.token)).write_text(str(owner.beat), "utf-8")
        return True, tag

    def _beats(self, token: str) -> Path:
        return self.path.with_suffix(f".{token}.beat")


def _is_unchanged(found: tuple[str, str] | None, tag: tuple[str, str | None] | None) -> bool:
    """True if a lease and its sign of life are as they were.

    The owner, who has read no sign, compares the lease alone.
    """
    if found is None or tag is None:
        return found is tag
    return found[0] == tag[0] and tag[1] in (None, found[1])
