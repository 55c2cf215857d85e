"""Who is writing an artefact: a lease that its owner renews, and that others may take once it is silent.

An owner of this machine whose process is gone is known at once, and one that runs is left alone. Any other one is
watched: where nothing changes for as long as the lease lasts, by the watcher's own monotonic clock, it is taken over.
So nobody's clock has to be right, and nothing is waited for after an ordinary crash. The lease is a courtesy that saves
work. What keeps a store right is that a generation is only switched by who holds the lease and finds the generation
that it began with (`artefact`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import psutil
from filelock import FileLock, Timeout

from saeflow.recipe.settings import Overlap
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, sanitise
from saeflow.store.files import json_text
from saeflow.store.storage import Objects

log = logging.getLogger(__name__)

SECONDS = 60.0
"""After so long without a sign of life the owner counts as gone; SAEFLOW_LEASE_SECONDS sets another number."""

BEATS = 6
"""Signs of life in that time."""

_MOST_SECONDS = 86_400
_PATIENCE = 5.0
"""Seconds that the release of a lease may take: without a network each try takes minutes."""
_ENDED = -1.0
"""In the place of the time when a process began."""


@dataclass(frozen=True)
class Owner:
    """What a lease says. `beat` grows with every sign of life; `machine` and `born` tell processes of one number
    apart."""

    token: str
    machine: str
    pid: int
    born: float
    about: str
    seconds: float
    beat: int = 0

    @classmethod
    def here(cls) -> Owner:
        pid = os.getpid()
        return cls(uuid.uuid4().hex[:12], _machine(), pid, _born(pid) or 0.0, _about(), lease_seconds())

    def is_here(self) -> bool:
        return self.machine == _machine()

    def is_gone(self) -> bool:
        """Is it known to have ended?"""
        found = _born(self.pid) if self.is_here() else None
        return found == _ENDED or found not in (None, self.born)

    def lives(self) -> bool:
        """Is it known to run, and not halted (SIGSTOP)?"""
        return self.is_here() and _born(self.pid) == self.born and not self._is_stopped()

    def _is_stopped(self) -> bool:
        with contextlib.suppress(psutil.Error):
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        return False


def lease_seconds() -> float:
    """Of this process's leases. Raises UserError where SAEFLOW_LEASE_SECONDS is none."""
    text = os.environ.get("SAEFLOW_LEASE_SECONDS") or str(SECONDS)
    with contextlib.suppress(ValueError):
        if 1 <= float(text) <= _MOST_SECONDS:
            return float(text)
    raise UserError(
        f"SAEFLOW_LEASE_SECONDS is {text!r}, but it must be a number of seconds from 1 to {_MOST_SECONDS:,}.\n"
        f"Set it so, or leave it out: then it is {SECONDS:.0f}."
    )


def _machine() -> str:
    """This boot of this machine, or container: where a process number means the same process."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _born(pid: int) -> float | None:
    """When a process began, in the kernel's own count where there is one, which no clock moves; `_ENDED` if it has
    ended, None where that cannot be known: of another user's process a system may hide all but its number."""
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


class Slot(Protocol):
    """Where a lease is kept. `tag` stands for the content that was seen."""

    @property
    def path(self) -> Path: ...

    def read(self) -> tuple[Owner | None, Any]:
        """The owner, None where there is none; and the tag."""
        ...

    def guard(self) -> contextlib.AbstractContextManager[None]:
        """Nobody else takes the lease inside, where that can be had."""
        ...

    def swap(self, owner: Owner | None, tag: Any) -> tuple[bool, Any]:
        """Write the owner, if it is still the one that `tag` stands for. Did it work, and the new tag."""
        ...

    def beat(self, owner: Owner, tag: Any) -> tuple[bool, Any]:
        """A sign of life of the owner who holds it. Did it work, and the new tag."""
        ...


@dataclass(frozen=True)
class FileSlot:
    """A file; a lock of the operating system is held while it is compared and replaced."""

    path: Path

    @contextlib.contextmanager
    def guard(self, seconds: float = 60) -> Iterator[None]:
        """Nobody else is inside. Raises UserError where somebody stays so long."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        path = self.path.with_suffix(".lock")
        try:
            with FileLock(path, timeout=seconds):
                yield
        except Timeout:
            raise UserError(
                f"{path} has been locked for {seconds:.0f} s: some process was halted while it published.\n"
                "Let it go on (kill -CONT) or end it, then run the same command again."
            ) from None

    def read(self) -> tuple[Owner | None, Any]:
        try:
            content = self.path.read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            return None, None
        owner = _owner(content)
        beat = ""
        with contextlib.suppress(OSError):
            beat = self._beats(owner.token).read_bytes().decode("utf-8", "replace") if owner else ""
        return owner, (content, beat)

    def swap(self, owner: Owner | None, tag: Any) -> tuple[bool, Any]:
        with self.guard():
            if not _is_the_same(self.read()[1], tag):
                return False, None
            for left in self.path.parent.glob(f"{self.path.stem}.*.beat"):
                left.unlink(missing_ok=True)
            return True, self.put(owner)

    def put(self, owner: Owner | None) -> tuple[str, str | None] | None:
        """Write without asking; the caller holds the guard. A power cut may lose it: every owner is then gone, too."""
        if owner is None:
            self.path.unlink(missing_ok=True)
            return None
        fresh, content = self.path.with_suffix(".new"), _text(owner)
        fresh.write_text(content, "utf-8")
        os.replace(fresh, self.path)
        return content, None

    def beat(self, owner: Owner, tag: Any) -> tuple[bool, Any]:
        """In a file of the owner's own and without the guard: a process that is halted here holds nobody up."""
        found = self.read()[0]
        if found is None or found.token != owner.token:
            return False, None
        self._beats(owner.token).write_text(str(owner.beat), "utf-8")
        return True, tag

    def _beats(self, token: str) -> Path:
        return self.path.with_suffix(f".{token}.beat")


def _is_the_same(found: tuple[str, str] | None, tag: tuple[str, str | None] | None) -> bool:
    """Is a file what it was, with its sign of life? Its owner, who has read none, asks only whether it is its own."""
    if found is None or tag is None:
        return found is tag
    return found[0] == tag[0] and tag[1] in (None, found[1])


@dataclass(frozen=True)
class ObjectSlot:
    """An object, written with the condition that it is still the one that was read."""

    objects: Objects
    path: Path

    def guard(self) -> contextlib.AbstractContextManager[None]:
        """No lock: what is written inside is compared as it is written."""
        return contextlib.nullcontext()

    def read(self) -> tuple[Owner | None, Any]:
        found = self.objects.read_tagged(self.path)
        return (_owner(found[0].decode("utf-8", "replace")), found[1]) if found else (None, None)

    def swap(self, owner: Owner | None, tag: Any) -> tuple[bool, Any]:
        content = (_text(owner) if owner else "{}\n").encode()  # not deleted: that asks no condition
        fresh = self.objects.put_tagged(self.path, content, tag)
        return fresh is not None, fresh

    def beat(self, owner: Owner, tag: Any) -> tuple[bool, Any]:
        return self.swap(owner, tag)


def _text(owner: Owner) -> str:
    return json_text(vars(owner))


def _owner(content: str) -> Owner | None:
    """None where nobody owns it, or nonsense was written."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        found = Owner(**json.loads(content))
        about = sanitise(brief(str(found.about), 300))
        found = replace(found, about=about, seconds=float(found.seconds), pid=int(found.pid))
        if (
            re.fullmatch("[0-9a-z]{1,64}", found.token)
            and 0 < found.pid < 1 << 31
            and 0 < found.seconds <= _MOST_SECONDS
        ):
            return found
    return None


@dataclass
class Lease:
    """A lease that is held: renewed from a thread of its own until it is released or lost."""

    slot: Slot
    owner: Owner
    tag: Any
    what: str
    waited: bool = False
    """Was somebody else at work before?"""
    beaten: float = field(default_factory=time.monotonic)
    """When its last sign of life was begun."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        threading.Thread(target=self._beat, name="saeflow-lease", daemon=True).start()

    def _beat(self) -> None:
        while not self._over.wait(self.owner.seconds / BEATS):
            try:
                self.renew()
            except (OSError, UserError) as error:  # the disk or the network may come back
                log.warning("The lease of %s could not be renewed: %s", self.what, error)

    def renew(self) -> bool:
        """A sign of life. False once somebody else has taken the lease."""
        with self._lock:
            if self._over.is_set():
                return False
            began, owner = time.monotonic(), replace(self.owner, beat=self.owner.beat + 1)
            done, tag = self.slot.beat(owner, self.tag)
            if not done:
                found, seen = self.slot.read()
                if self._lost(found):
                    self._over.set()
                elif found is None:  # removed, but nobody else's
                    done, tag = self.slot.swap(owner, seen)
            if done:
                self.owner, self.tag, self.beaten = owner, tag, began
            return done

    def _lost(self, found: Owner | None) -> str:
        """What has become of the lease, in words; nothing while it is this run's. One that is gone after a silence is
        not taken back: somebody may have had it, published and ended."""
        if found is None and time.monotonic() - self.beaten > self.owner.seconds:
            return "another run may have taken over and ended"
        return f"{found.about} has taken over" if found and found.token != self.owner.token else ""

    def require(self) -> None:
        """Raises UserError where the lease is somebody else's now, or may have been meanwhile."""
        if lost := self._lost(self.slot.read()[0]):
            self._over.set()
            raise UserError(
                f"{self.what}: this run was silent for more than {self.owner.seconds:.0f} s, and {lost}.\n"
                "Nothing is lost, and nothing of this run was published since. Run the same command again to see it "
                "finished."
            )

    @contextlib.contextmanager
    def fence(self) -> Iterator[None]:
        """Around what readers see at once. Raises UserError where the lease is somebody else's now."""
        with self.slot.guard():
            self.require()
            yield

    def release(self) -> None:
        """Give it back. Where the store does not answer soon it is left as it is, and lapses."""
        self._over.set()
        returning = threading.Thread(target=self._give_back, name="saeflow-release", daemon=True)
        returning.start()
        returning.join(_PATIENCE)
        if returning.is_alive():
            log.warning("The lease of %s could not be given back in %.0f s: it lapses.", self.what, _PATIENCE)

    def _give_back(self) -> None:
        try:
            with self._lock:
                self.slot.swap(None, self.tag)
        except (OSError, UserError) as error:
            log.warning("The lease of %s could not be given back: %s", self.what, error)


_WATCHED: dict[Path, tuple[Any, float]] = {}
"""What each lease looked like when it was read last, and since when, by this process's monotonic clock."""


def watch(slot: Slot) -> tuple[Owner | None, Any, float]:
    """The owner, the tag, and since when it is known to be unchanged. Of many leases to be taken each is watched first,
    so that those of a dead machine lapse at the same time and not one after the other."""
    owner, tag = slot.read()
    if slot.path not in _WATCHED or _WATCHED[slot.path][0] != tag:
        _WATCHED[slot.path] = tag, time.monotonic()
    return owner, tag, _WATCHED[slot.path][1]


def acquire(slot: Slot, what: str, overlap: Overlap, sleep: Callable[[float], object] = time.sleep) -> Lease:
    """Take the lease. Raises UserError where somebody else has it and `overlap` is "refuse".

    An owner that cannot be asked is watched for as long as its lease lasts, whatever `overlap` says.
    """
    waited = False
    while True:
        tag, busy = _once_free(slot, what, overlap, sleep)
        waited = waited or busy
        if lease := _take(slot, tag, what, waited):
            return lease


def _once_free(slot: Slot, what: str, overlap: Overlap, sleep: Callable[[float], object]) -> tuple[Any, bool]:
    """The tag of a lease that may be taken, and was it waited for?"""
    first, waited = None, False
    while True:
        owner, tag, since = watch(slot)
        if owner is None:
            return tag, waited
        if owner.is_gone():
            log.warning("%s was left by %s, which has ended.", what, owner.about)
            return tag, waited
        lives = owner.lives()
        if not lives and time.monotonic() - since >= owner.seconds:
            log.warning("%s was left by %s, which is silent.", what, owner.about)
            return tag, True
        if overlap == "refuse" and (lives or (first is not None and tag != first)):
            raise UserError(
                f"Another run is writing {what}: {owner.about}.\n"
                'Wait for it to end, then run the command again; or set overlap = "wait" in the recipe.'
            )
        if not waited:
            doing = "waiting" if overlap == "wait" or lives else f"watching it for {owner.seconds:.0f} s"
            log.warning("%s is being written by %s, as its lease says: %s.", what, owner.about, doing)
        first, waited = first or tag, True
        sleep(min(1.0, owner.seconds / BEATS))


def _take(slot: Slot, tag: Any, what: str, waited: bool) -> Lease | None:
    mine = Owner.here()
    done, fresh = slot.swap(mine, tag)
    if not done:
        return None
    lease = Lease(slot, mine, fresh, what, waited)
    lease.start()
    return lease


def is_free(slot: Slot) -> bool:
    """Is nobody at work? Somebody of whom nothing is known is watched for as long as the lease lasts. Nothing is
    taken."""
    try:
        _once_free(slot, slot.path.stem.replace("-", "/", 1), "refuse", time.sleep)
    except UserError:
        return False
    return True


@contextlib.contextmanager
def held(slot: Slot, what: str, overlap: Overlap) -> Iterator[Lease]:
    """Hold the lease for the block. An error inside is explained by a loss of the lease, where there was one."""
    lease = acquire(slot, what, overlap)
    try:
        yield lease
    except UserError:
        raise
    except Exception as error:
        try:
            lease.require()
        except UserError as lost:
            raise lost from error
        raise
    finally:
        lease.release()
