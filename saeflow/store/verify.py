"""Find what is missing or changed in a store, byte for byte, and move it aside so that the next run makes it again.

Only bytes that were read and found different, or that are gone, are damage. What the system refuses to read (a
permission, too many open files, a lost server) is said and left alone.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import xxhash

from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.files import map_lookups
from saeflow.store.links import read_in
from saeflow.store.lists import with_files
from saeflow.store.records import (
    FORGOTTEN,
    KINDS,
    WHOLE_KINDS,
    Damaged,
    ForgottenRecord,
    PartRecord,
    Unreadable,
    is_refusal,
    read_checked,
    read_or_empty,
    read_record,
    unreadable,
    write_checked,
    write_record,
)
from saeflow.store.store import Store


@dataclass(frozen=True)
class Damage:
    """Something wrong with a file of an artefact: of one part, or (None) of the artefact's own."""

    artefact: Artefact
    part: PartRecord | None
    problem: str
    refused: bool = False
    """True if the system refused to read: nobody knows whether something is wrong."""

    def __str__(self) -> str:
        where = f"{self.artefact.id}, part {self.part.index}" if self.part else self.artefact.id
        return f"{where}: {self.problem}"


def verify(store: Store, full: bool, share: tuple[int, int] | None = None) -> Iterator[Damage]:
    """Yield everything that is wrong in a store.

    `share`, as (i, n), reads every byte of the i-th of n shares, which together are the whole, and the sizes of the
    rest. Raises Damaged if the list of forgotten documents is damaged.
    """
    with contextlib.suppress(FileNotFoundError):
        read_record(store.storage.fetch(store.root / FORGOTTEN), ForgottenRecord)
    for kind in KINDS:
        for name in sorted(fnmatch.filter(store.storage.names_here(store.root / kind), "?*-*")):
            artefact = store.by_id(f"{kind}/{name}")
            if _has_records(artefact):
                yield from find_damage(artefact, full, share)


def _has_records(artefact: Artefact) -> bool:
    with contextlib.suppress(OSError):  # `find_damage` says why
        return bool(artefact.storage.names_here(artefact.path) & {"artefact.json", "manifest.json", "cfg.json"})
    return True


def share_of_day(n: int, day: date) -> tuple[int, int]:
    """Return the share of a store that is read on a day: n days in a row read all of it."""
    return day.toordinal() % n, n


def next_share(store: Store, n: int) -> tuple[int, int]:
    """Return the share of n that was not read for longest: the one after that which `note_share` was last told of."""
    with contextlib.suppress(FileNotFoundError):
        store.storage.fetch(_shares(store), fresh=True)
    return int(read_or_empty(_shares(store)).get(str(n), 0)) % n, n


def note_share(store: Store, share: tuple[int, int]) -> None:
    """Remember that a share has been read, so that the next is read whenever that is: on another day or not."""
    read = read_or_empty(_shares(store)) | {"format_version": FORMAT_VERSION, str(share[1]): share[0] + 1}
    write_checked(_shares(store), read)
    store.storage.send(_shares(store))


def _shares(store: Store) -> Path:
    return store.root / "tmp" / "verified.json"


def _falls_into(share: tuple[int, int] | None, name: str) -> bool:
    return share is not None and xxhash.xxh3_64_intdigest(name.encode()) % share[1] == share[0]


def repair_marker(store: Store) -> str | None:
    """Write store.json again if it cannot be read: it says nothing but the format.

    Return what was wrong, if anything.
    """
    try:
        read_checked(store.root / "store.json")
    except (Damaged, FileNotFoundError) as error:
        write_checked(store.root / "store.json", {"format_version": FORMAT_VERSION})
        store.storage.send(store.root / "store.json")
        return str(error).partition(" is missing")[0] + " was missing or damaged and is written again"
    return None


def repair_forgotten(store: Store) -> str | None:
    """Move a damaged list of forgotten documents aside. Return what was done, if anything."""
    path = store.root / FORGOTTEN
    try:
        read_checked(store.storage.fetch(path))
    except FileNotFoundError:
        return None
    except Damaged:
        target = store.storage.set_aside(path)
        return (
            f"moved {path} to {target}. Documents stay forgotten by their keys where they were stored. Bring the list "
            "back from a backup, or forget them again, so that their texts stay away, too"
        )
    return None


def find_damage(artefact: Artefact, full: bool, share: tuple[int, int] | None = None) -> Iterator[Damage]:
    """Yield what is missing or of another size. `full` reads every byte, a share those of parts that fall into it."""
    own = full or _falls_into(share, artefact.id)
    yield from _noted(artefact, None, _own_problems(artefact, own))
    with contextlib.suppress(Damaged, Unreadable, OSError):  # said above
        generation = artefact.generation()
        parts = generation.parts if generation else ()
        read = {part.folder for part in parts if full or _falls_into(share, part.folder)}
        yield from _find_missing(artefact, [part for part in parts if part.folder not in read])
        for part in (part for part in parts if part.folder in read):
            yield from list(_noted(artefact, part, _part_problems(artefact, with_files(part), True)))


def _find_missing(artefact: Artefact, parts: Sequence[PartRecord]) -> Iterator[Damage]:
    """Yield what is missing or of another size in these parts, and records that are others."""
    folder = f"{artefact.path}/parts"
    looked = zip(parts, artefact.storage.confirmed(folder, parts), artefact.storage.written(folder, parts), strict=True)

    def problems(some: list[tuple[PartRecord, bool, bool]]) -> list[Iterable[Damage]]:
        found = ((part, _part_problems(artefact, with_files(part), False, known)) for part, known, _ in some)
        return [list(_noted(artefact, part, each)) for part, each in found]

    doubtful = (each for each in looked if not (each[1] and each[2]))
    yield from itertools.chain.from_iterable(map_lookups(problems, doubtful))


def _noted(artefact: Artefact, part: PartRecord | None, problems: Iterator[str]) -> Iterator[Damage]:
    """Yield these problems, and what ended the look at them if the system did not let it end well."""
    try:
        yield from (Damage(artefact, part, problem) for problem in problems)
    except Damaged as error:  # the list names files that no part has
        yield Damage(artefact, part, str(error))
    except (Unreadable, OSError) as error:
        what = getattr(error, "filename", None) or artefact.path
        said = error if isinstance(error, UserError) else unreadable(what, error)
        yield Damage(artefact, part, str(said) if is_refusal(error) else f"{what} is missing", is_refusal(error))


def _own_problems(artefact: Artefact, full: bool) -> Iterator[str]:
    if not artefact.exists():
        yield f"{artefact.path / 'artefact.json'} is missing"
    try:
        yield from artefact.missing_files(artefact.path, artefact.record.files if artefact.exists() else [], full)
        if artefact.generation() is None and artefact.numbers():
            yield f"{artefact.path / 'manifest.json'} is missing"
        if (artefact.path / "quality.json").is_file():
            read_checked(artefact.path / "quality.json")
    except (Damaged, FileNotFoundError) as error:
        yield str(error).partition(" is missing or damaged")[0] + " is missing or damaged"


def _part_problems(artefact: Artefact, part: PartRecord, full: bool, has_files: bool = False) -> Iterator[str]:
    """`has_files`: the files were found in their sizes just now."""
    folder, files = artefact.part_path(part), part.files
    if not has_files:
        yield from artefact.missing_files(folder, files, full)
    if full:
        yield from (f"{folder / name} does not belong there" for name in _strangers(artefact, part))
    elif artefact.storage.asks_a_server:  # one request a part would take long
        return
    try:
        artefact.storage.fetch(folder / "part.json", fresh=True) if artefact.storage.asks_a_server else None
        record = folder / "part.json"
        # nearly always its bytes are equal, and need not be read as JSON
        is_equal = part.is_written_as(read_in(str(folder), "part.json"))
        if not is_equal and not _is_record_of(part, read_record(record, PartRecord)):
            yield f"{record} is not the record that was published"
    except (Damaged, FileNotFoundError):
        yield f"{folder / 'part.json'} is missing or damaged"


def _is_record_of(part: PartRecord, found: PartRecord) -> bool:
    """True if both say the same; an upgrade that was killed leaves them in different formats."""
    return replace(found, format_version=part.format_version) == part


def _strangers(artefact: Artefact, part: PartRecord) -> list[str]:
    """Return the files in the folder of a part that are none of its own."""
    known = {file.name for file in part.files} | {"part.json"}
    return sorted(artefact.storage.names_below(artefact.part_path(part)) - known)


def repair_all(found: Iterable[Damage]) -> Iterator[str]:
    """Mend each place once, or move aside what is wrong so that the next run makes it again. Yield what was done.

    A mended list shows parts that nobody could look at before: they are read and mended, too. Raises UserError at the
    end if something is left to do.
    """
    left, places = [], deque(_one_a_place(found))
    while places:
        each = places.popleft()
        try:
            yield repair(each)
        except UserError as error:
            left.append(str(error))
        else:
            if each.part is None:
                places += [more for more in _one_a_place(find_damage(each.artefact, full=True)) if more.part]
    if left:
        raise UserError("\n".join(["Not everything could be mended; the rest is.", *dict.fromkeys(left)]))


def _one_a_place(found: Iterable[Damage]) -> list[Damage]:
    """Return one damage of each place; one that the system refused to read stands for its place."""
    ordered = sorted(found, key=lambda each: each.refused)
    return list({(each.artefact, each.part and each.part.folder): each for each in ordered}.values())


def repair(found: Damage) -> str:
    """Look at one place again, mend it and say how. Raises UserError, with what can be done instead, if it cannot.

    What cannot be read is left as it is.
    """
    artefact, part = found.artefact, found.part
    if found.refused:
        raise UserError(f"{artefact.id} is left as it is. {found.problem}")
    try:
        with artefact.writing():
            return _repair_part(artefact, part) if part is not None else _repair_own(artefact)
    except Damaged as error:
        raise _beyond_repair(artefact, error) from error
    except OSError as error:
        if isinstance(error, UserError):
            raise
        what = f"{os.strerror(error.errno or 0)} at {error.filename or artefact.path}"
        raise UserError(f"{artefact.id} is left as it is: {what}. Run this as one who may write there.") from error


def _repair_own(artefact: Artefact) -> str:
    if not list(_own_problems(artefact, full=True)):
        return f"{artefact.path} is whole by now"
    whole = artefact.kind in WHOLE_KINDS
    bad = [artefact.path] if whole else list(_bad_files(artefact))
    moved = [_moved_aside(artefact, path) for path in bad]
    mended = not whole and artefact.recover()
    return "; ".join([*moved, *([f"mended {artefact.path}"] if mended or not moved else [])])


def _moved_aside(artefact: Artefact, path: Path) -> str:
    target = artefact.set_aside(path)
    return f"moved {path} to {artefact.storage.location(target)}" if target else f"{path} is gone"


def _repair_part(artefact: Artefact, part: PartRecord) -> str:
    folder = artefact.part_path(part)
    if list(artefact.missing_files(folder, part.files, full=True)):
        return _moved_aside(artefact, folder)
    if not list(_part_problems(artefact, part, full=True)):
        return f"{folder} is whole by now"
    strangers = [_moved_aside(artefact, folder / name) for name in _strangers(artefact, part)]
    write_record(folder / "part.json", part)
    artefact.storage.send(folder / "part.json")
    return "; ".join(strangers) or f"wrote {folder / 'part.json'} again"


def _beyond_repair(artefact: Artefact, error: Damaged) -> UserError:
    """Return the error for what follows from nothing that is left, with the price of making all of it again."""
    what = str(error).partition(" is missing or damaged")[0]
    return UserError(
        f"{what} is damaged, and nothing that is left says what was in it.\nBring it back from a backup. Or remove "
        f"{artefact.storage.location(artefact.path)}: the next run makes all of it again from what it reads."
    )


def _bad_files(artefact: Artefact) -> Iterator[Path]:
    """Yield the artefact's own files that have to be made again."""
    for name in ("artefact.json", "quality.json"):
        with contextlib.suppress(FileNotFoundError):
            try:
                read_checked(artefact.path / name)
            except Damaged:
                yield artefact.path / name
    with contextlib.suppress(Damaged, FileNotFoundError):
        for file in artefact.record.files:
            if list(artefact.missing_files(artefact.path, [file], full=True)):
                yield artefact.path / file.name
