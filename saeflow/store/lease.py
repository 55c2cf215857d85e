"""A lease on an artefact: one process writes at a time, and a silent owner's lease may be taken.

An owner of this machine that has ended is recognised at once, and one that runs is left alone. Any other owner is
watched: if nothing changes for as long as the lease lasts, by the watcher's own monotonic clock, the watcher takes
over. So nobody's clock has to be right, and nobody waits after an ordinary crash. The lease saves work. `publishing`
keeps a store right.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from saeflow.recipe.settings import Overlap
from saeflow.runtime.errors import UserError
from saeflow.store.lease_slot import Owner, Slot

log = logging.getLogger(__name__)

BEATS = 6
"""Signs of life while a lease lasts."""


@dataclass
class Lease:
    """A lease that this process holds: a thread renews it until it is released or lost."""

    slot: Slot
    owner: Owner
    tag: Any
    what: str
    waited: bool = False
    """True if somebody else was at work before."""
    patience: float = 5.0
    """Seconds that the release may take: without a network each try takes minutes."""
    beaten: float = field(default_factory=time.monotonic)
    """When its last sign of life was begun."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Renew the lease from now on, in a thread of its own."""
        threading.Thread(target=self._beat, name="saeflow-lease", daemon=True).start()

    def _beat(self) -> None:
        while not self._over.wait(self.owner.seconds / BEATS):
            try:
                self.renew()
            except (OSError, UserError) as error:  # the disk or the network may come back
                log.warning("The lease of %s could not be renewed: %s", self.what, error)

    def renew(self) -> bool:
        """Give a sign of life. Return False once somebody else has taken the lease."""
        with self._lock:
            if self._over.is_set():
                return False
            began, owner = time.monotonic(), replace(self.owner, beat=self.owner.beat + 1)
            done, tag = self.slot.beat(owner, self.tag)
            if not done:
                found, now = self.slot.read()
                if self._lost(found):
                    self._over.set()
                elif found is None:  # removed, but nobody else's
                    done, tag = self.slot.swap(owner, now)
            if done:
                self.owner, self.tag, self.beaten = owner, tag, began
            return done

    def _lost(self, found: Owner | None) -> str:
        """Say who has the lease now; empty while this run has it.

        A lease that is gone after a silence is not taken back: somebody may have had it, published and ended.
        """
        if found is None and time.monotonic() - self.beaten > self.owner.seconds:
            return "another run may have taken over and ended"
        return f"{found.about} has taken over" if found and found.token != self.owner.token else ""

    def require(self) -> None:
        """Raises UserError if somebody else has the lease, or may have had it meanwhile."""
        if lost := self._lost(self.slot.read()[0]):
            self._over.set()
            raise UserError(
                f"{self.what}: this run was silent for more than {self.owner.seconds:.0f} s, and {lost}.\n"
                "Nothing is lost, and nothing of this run was published since. "
                "Run the same command again to see it finished."
            )

    @contextlib.contextmanager
    def fence(self) -> Iterator[None]:
        """Keep others from taking the lease inside the block. Raises UserError if somebody else has it already."""
        with self.slot.guard():
            self.require()
            yield

    def release(self) -> None:
        """Give the lease back. If the storage does not answer soon, leave the lease to lapse."""
        self._over.set()
        returning = threading.Thread(target=self._give_back, name="saeflow-release", daemon=True)
        returning.start()
        returning.join(self.patience)
        if returning.is_alive():
            log.warning("The lease of %s could not be given back in %.0f s: it lapses.", self.what, self.patience)

    def _give_back(self) -> None:
        try:
            with self._lock:
                self.slot.swap(None, self.tag)
        except (OSError, UserError) as error:
            log.warning("The lease of %s could not be given back: %s", self.what, error)


@dataclass
class Hold:
    """A lease, and the generation that its owner began with or has switched to since; 0 is none."""

    lease: Lease
    number: int


def acquire(
    slot: Slot, what: str, overlap: Overlap, sleep: Callable[[float], object] = time.sleep, owner: Owner | None = None
) -> Lease:
    """Take the lease, for this process or another `owner`. Raises UserError if it is taken and `overlap` is "refuse".

    An owner whose process cannot be asked is watched for as long as its lease lasts, whatever `overlap` says.
    """
    waited = False
    while True:
        tag, busy = _wait_until_free(slot, what, overlap, sleep)
        waited = waited or busy
        if lease := _take_lease(slot, owner or Owner.here(), tag, what, waited):
            return lease


def _wait_until_free(slot: Slot, what: str, overlap: Overlap, sleep: Callable[[float], object]) -> tuple[Any, bool]:
    """Return the tag of a lease that may be taken, and whether somebody was waited for."""
    first, waited = None, False
    while True:
        owner, tag, since = slot.watch()
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


def _take_lease(slot: Slot, owner: Owner, tag: Any, what: str, waited: bool) -> Lease | None:
    """Take the lease that had this tag; None if somebody else was quicker."""
    done, fresh = slot.swap(owner, tag)
    if not done:
        return None
    lease = Lease(slot, owner, fresh, what, waited)
    lease.start()
    return lease


def is_free(slot: Slot) -> bool:
    """True if nobody is at work.

    Takes nothing; watches an owner that cannot be asked for as long as its lease lasts.
    """
    try:
        _wait_until_free(slot, slot.path.stem.replace("-", "/", 1), "refuse", time.sleep)
    except UserError:
        return False
    return True


@contextlib.contextmanager
def hold_lease(slot: Slot, what: str, overlap: Overlap) -> Iterator[Lease]:
    """Hold the lease for the block. An error inside is explained by the loss of the lease, if it was lost."""
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
