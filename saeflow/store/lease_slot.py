"""The place where a lease is kept: read, watched, and replaced only if nobody else was quicker."""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from saeflow.runtime.errors import UserError
from saeflow.store.owner import Owner


class Slot(ABC):
    """The place of one lease. A `tag` stands for the content that was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._watched: tuple[Any, float] | None = None
        """The tag that `watch` saw last, and since when, by this process's monotonic clock."""

    @abstractmethod
    def read(self) -> tuple[Owner | None, Any]:
        """Return the owner, None if nobody holds the lease, and the tag."""

    @abstractmethod
    def guard(self) -> contextlib.AbstractContextManager[None]:
        """Keep others from taking the lease inside the block, if the storage has locks."""

    @abstractmethod
    def swap(self, owner: Owner | None, tag: Any) -> tuple[bool, Any]:
        """Write the owner if the content is still the tag's. Return whether that was so, and the new tag."""

    @abstractmethod
    def beat(self, owner: Owner, tag: Any) -> tuple[bool, Any]:
        """Write a sign of life of the owner if it still holds the lease.

        Return whether that was so, and the new tag.
        """

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        path = self.path.with_suffix(".lock")
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
            content = self.path.read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            return None, None
        owner = Owner.parse(content)
        beat = ""
        with contextlib.suppress(OSError):
            beat = self._beats(owner.token).read_bytes().decode("utf-8", "replace") if owner else ""
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
        fresh.write_text(owner.text, "utf-8")
        os.replace(fresh, self.path)
        return owner.text, None

    def beat(self, owner: Owner, tag: Any) -> tuple[bool, Any]:
        """Write to a file of the owner's own, without the guard: a process that is suspended here holds nobody up."""
        found = self.read()[0]
        if found is None or found.token != owner.token:
            return False, None
        self._beats(owner.token).write_text(str(owner.beat), "utf-8")
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
