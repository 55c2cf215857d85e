"""Remove what nobody reads any more: replaced generations and annotations, unlisted parts, leftovers of killed runs."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from saeflow.runtime.errors import UserError, first_line
from saeflow.store.artefact import Artefact
from saeflow.store.lease import hold_lease
from saeflow.store.lists import read_part_folders
from saeflow.store.records import BESIDE, KINDS, Generation
from saeflow.store.storage.folder import DAMAGED
from saeflow.store.store import Store, adds_tables, owner_of

ABANDONED_SECONDS = 30 * 86_400.0
"""A checkpoint of an SAE that is not published stays for so long after it was last written: somebody may be on
holiday. After an append it is of another SAE than the next training makes, and it takes twelve bytes a weight."""

_PASSING_SECONDS = 3_600.0
"""Files by which runs try the store live for a moment; no run that is still looking at one has it for an hour."""

_WORK = re.compile(rf"({'|'.join(KINDS)})-(.+-[0-9a-f]{{8}})(\.checkpoint|\.documents)?")


@dataclass(frozen=True)
class Garbage:
    """A file or folder that no reader can reach any more, and for how many seconds it has been so."""

    path: Path
    why: str
    n_bytes: int
    seconds: float = math.inf


@dataclass
class Collected:
    """What was found, or removed; bytes that must wait for the grace period; and what was left alone, and why."""

    garbage: list[Garbage] = field(default_factory=list)
    n_bytes_kept: int = 0
    left_alone: list[str] = field(default_factory=list)
    n_bytes_aside: int = 0
    """What repair moved into `damaged/`; only a person removes it."""

    @property
    def n_bytes(self) -> int:
        return sum(each.n_bytes for each in self.garbage)


def collect_garbage(store: Store, grace_seconds: float, remove: bool) -> Collected:
    """Find, and `remove`, what nobody has been able to reach for the grace period.

    To remove, the artefact's lease is held from the look at its manifest to the end, and an artefact that is being
    written is left alone. To list, nothing is written and nobody waited for.
    """
    store.storage.list_again()
    done, left, replaced = Collected(), store.storage.work.names(), _replaced_artefacts(store)
    remove_work = store.storage.remove if remove else None
    works = [store.by_id(f"{found[1]}/{found[2]}") for name in sorted(left) if (found := _WORK.fullmatch(name))]
    for artefact in dict.fromkeys([*store.artefacts(), *works]):
        try:
            with hold_lease(artefact.slot, artefact.id, "refuse") if remove else _require_no_writer(artefact):
                _collect_aged(
                    done, _replaced_files(artefact, grace_seconds), grace_seconds, artefact.remove if remove else None
                )
                _collect_aged(done, _left_work(artefact, left), grace_seconds, remove_work)
                if artefact in replaced:  # it may have become the newest again since
                    still = _replaced_artefacts(store).get(artefact, [])
                    _collect_aged(done, iter(still), grace_seconds, artefact.remove if remove else None)
        except (UserError, OSError) as error:
            done.left_alone.append(first_line(error))
    _collect_aged(done, _left_tests(store, left), grace_seconds, remove_work)
    done.n_bytes_aside = store.storage.work.footprint(store.root / DAMAGED)[0]
    return done


def _collect_aged(
    done: Collected, found: Iterator[Garbage], grace_seconds: float, remove: Callable[[Path], object] | None
) -> None:
    for each in list(found):  # removing changes what the rest is found by
        if each.seconds < grace_seconds:
            done.n_bytes_kept += each.n_bytes
            continue
        if remove is not None:
            remove(each.path)
        done.garbage.append(each)


@contextlib.contextmanager
def _require_no_writer(artefact: Artefact) -> Iterator[None]:
    """Raises UserError if somebody may be writing the artefact. Takes no lease, and watches nobody."""
    owner = artefact.slot.read()[0]
    if owner is not None and not owner.is_gone():
        raise UserError(f"Another run may be writing {artefact.id}: {owner.about}.")
    yield


def _replaced_artefacts(store: Store) -> dict[Artefact, list[Garbage]]:
    """Return annotations, probes and effects that nobody reads: a newer one of the name exists, or their owner is gone.

    The owner is the run or the tokens that they belong to. Two owners may have artefacts of one name: both stay.
    """
    found: dict[Artefact, list[Garbage]] = {}
    newer: dict[tuple[str, str, str | None], list[Artefact]] = {}
    for artefact in reversed(store.artefacts(*BESIDE)):
        with contextlib.suppress(UserError, OSError):  # `verify` says what is wrong
            owner = owner_of(artefact)
            if owner is not None and not store.storage.names_here(store.by_id(owner).path):
                found[artefact] = [_whole(artefact, f"{owner}, to which it belongs, is gone", math.inf)]
            elif artefact.complete():
                shown = newer.setdefault((artefact.kind, artefact.name, owner), [])
                if adds_tables(artefact, shown):
                    shown.append(artefact)
                else:
                    age = time.time() - store.storage.footprint(shown[0].path / "artefact.json")[1]
                    found[artefact] = [_whole(artefact, f"readers see {shown[0].id}", max(age, 0.0))]
    return found


def _whole(artefact: Artefact, why: str, seconds: float) -> Garbage:
    return Garbage(artefact.path, why, artefact.storage.footprint(artefact.path)[0], seconds)


def _replaced_files(artefact: Artefact, grace_seconds: float) -> Iterator[Garbage]:
    """Yield lists older than the one that readers see, and parts that it does not name.

    A part that no list names is garbage only if it is older than that list: an append that was killed goes on with its
    own.
    """
    current = _read_again(artefact)
    if current is None:
        return
    weigh, now = artefact.storage.footprint, time.time()
    numbers = [number for number in artefact.numbers() if number <= current.number]
    shown, replaced = weigh(artefact.list_path(current.number))[1], math.inf
    ages: dict[str, float] = {}
    for number in reversed(numbers):
        path, age = artefact.list_path(number), max(now - replaced, 0.0)
        n_bytes, written = weigh(path)
        replaced = min(replaced, written)
        if number == current.number:
            continue
        if age < grace_seconds:  # somebody may still be reading it
            ages |= {folder: age for folder in read_part_folders(path) if folder not in ages}
        yield Garbage(path, f"list of generation {number}; readers see {current.number}", n_bytes, age)
    for folder in sorted(artefact.part_folders() - {part.folder for part in current.parts}):
        path = artefact.path / "parts" / folder
        n_bytes, written = weigh(path)
        if folder in ages or written < shown:
            yield Garbage(path, "part that no generation lists", n_bytes, ages.get(folder, max(now - written, 0.0)))


def _read_again(artefact: Artefact) -> Generation | None:
    """Return what readers see at this moment: another machine may have published since the records were read."""
    try:
        artefact.storage.fetch(artefact.path / "manifest.json", fresh=True)
    except FileNotFoundError:
        return None
    return artefact.generation()


def _left_work(artefact: Artefact, left: set[str]) -> Iterator[Garbage]:
    """Yield work of runs that were killed; a checkpoint only if its SAE is published, or nobody has gone on with it."""
    if artefact.work.name in left:
        yield Garbage(artefact.work, "left by a run that was killed", artefact.storage.work.footprint(artefact.work)[0])
    documents = artefact.work.with_name(f"{artefact.work.name}.documents")
    if documents.name in left and not artefact.exists():
        yield Garbage(documents, "hashes of documents that are gone", artefact.storage.work.footprint(documents)[0])
    checkpoints = artefact.work.with_name(f"{artefact.work.name}.checkpoint")
    if checkpoints.name in left:
        n_bytes, written = artefact.storage.work.footprint(checkpoints)
        age = time.time() - written
        if artefact.complete():
            yield Garbage(checkpoints, "checkpoint of an SAE that is published", n_bytes)
        elif age >= ABANDONED_SECONDS:
            yield Garbage(
                checkpoints, f"checkpoint with which nobody has gone on for {age / 86_400:.0f} days", n_bytes, age
            )


def _left_tests(store: Store, left: set[str]) -> Iterator[Garbage]:
    """Yield files by which a killed run asked whether the store can be written, or whether workers see it."""
    for name in sorted(name for name in left if name.startswith(("cluster-", ".writable-"))):
        n_bytes, written = store.storage.work.footprint(store.root / "tmp" / name)
        if time.time() - written >= _PASSING_SECONDS:
            yield Garbage(store.root / "tmp" / name, "left by a run that was killed", n_bytes)
