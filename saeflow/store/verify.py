"""Is everything published there, byte for byte? What to remove so that it is made again."""

from __future__ import annotations

import contextlib
import os
import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TypeAlias

import xxhash

from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.files import flush_tree, look, rename
from saeflow.store.lease import is_free
from saeflow.store.records import (
    KINDS,
    Damaged,
    PartRecord,
    read_checked,
    read_known,
    read_record,
    write_checked,
    write_record,
)
from saeflow.store.storage import Found
from saeflow.store.store import Store

Below: TypeAlias = Callable[[Path], Mapping[str, Found]]


@dataclass(frozen=True)
class Damage:
    """Something wrong: the artefact, the part (None: the artefact's own files), the file, and what is wrong with it."""

    artefact: Artefact
    part: PartRecord | None
    problem: str

    def __str__(self) -> str:
        where = f"{self.artefact.id}, part {self.part.index}" if self.part else self.artefact.id
        return f"{where}: {self.problem}"


def verify(store: Store, full: bool, share: tuple[int, int] | None = None) -> Iterator[Damage]:
    """Everything that is wrong in a store.

    `share`, as (i, n), reads every byte of the i-th of n shares, which together are the whole, and the sizes of the
    rest.
    """
    for kind in KINDS:
        for folder in sorted(path for path in (store.root / kind).glob("?*-*") if path.is_dir()):
            if any((folder / name).exists() for name in ("artefact.json", "manifest.json", "cfg.json")):
                yield from damage(store.by_id(f"{kind}/{folder.name}"), full, share)


def share_of_day(n: int, day: date) -> tuple[int, int]:
    """The share of a store that is read on a day: on n days in a row all of it."""
    return day.toordinal() % n, n


def next_share(store: Store, n: int) -> tuple[int, int]:
    """The share of n that was not read for longest: the one after that which `note_share` was last told of."""
    if store.objects is not None:
        with contextlib.suppress(FileNotFoundError):
            store.objects.fetch(_shares(store), fresh=True)
    return int(read_known(_shares(store)).get(str(n), 0)) % n, n


def note_share(store: Store, share: tuple[int, int]) -> None:
    """Remember that a share has been read, so that the next is read whenever that is: on another day or not."""
    read = read_known(_shares(store)) | {"format_version": FORMAT_VERSION, str(share[1]): share[0] + 1}
    write_checked(_shares(store), read)
    store.send(_shares(store))


def _shares(store: Store) -> Path:
    return store.root / "tmp" / "verified.json"


def _falls_into(share: tuple[int, int] | None, name: str) -> bool:
    return share is not None and xxhash.xxh3_64_intdigest(name.encode()) % share[1] == share[0]


def mend_marker(store: Store) -> str | None:
    """Write store.json again where it cannot be read: it says nothing but the format. What was wrong, if anything."""
    try:
        read_checked(store.root / "store.json")
    except (Damaged, OSError) as error:
        write_checked(store.root / "store.json", {"format_version": FORMAT_VERSION})
        store.send(store.root / "store.json")
        return str(error).partition(" is missing")[0] + " was missing or damaged and is written again"
    return None


def damage(artefact: Artefact, full: bool, share: tuple[int, int] | None = None) -> Iterator[Damage]:
    """What is missing or of another size; `full` reads every byte, a share those of parts that fall into it."""
    own = full or _falls_into(share, artefact.id)
    yield from (Damage(artefact, None, problem) for problem in _own_problems(artefact, own))
    with contextlib.suppress(Damaged):  # said above
        generation = artefact.generation()
        parts = generation.parts if generation else ()
        reads = full or share is not None
        one_by_one = reads or artefact.objects is not None
        below = below_of(artefact) if reads else None

        def problems(part: PartRecord) -> tuple[PartRecord, list[str]]:
            return part, list(_part_problems(artefact, part, full or _falls_into(share, part.folder), below))

        for part, found in (map if one_by_one else look)(problems, parts):
            yield from (Damage(artefact, part, problem) for problem in found)


def _own_problems(artefact: Artefact, full: bool) -> Iterator[str]:
    if not artefact.exists():
        yield f"{artefact.path / 'artefact.json'} is missing"
    try:
        yield from artefact.missing_files(artefact.path, artefact.record.files if artefact.exists() else [], full)
        if artefact.generation() is None and artefact.numbers():
            yield f"{artefact.path / 'manifest.json'} is missing"
        if (artefact.path / "quality.json").is_file():
            read_checked(artefact.path / "quality.json")
    except (Damaged, OSError) as error:
        yield str(error).partition(" is missing or damaged")[0] + " is missing or damaged"


def _part_problems(artefact: Artefact, part: PartRecord, full: bool, below: Below | None) -> Iterator[str]:
    folder = artefact.part_path(part)
    yield from artefact.missing_files(folder, part.files, full)
    if full:
        yield from (f"{folder / name} does not belong there" for name in _strangers(artefact, part, below))
    try:
        if artefact.objects is not None:
            if not full:  # one request a part would take long
                return
            artefact.objects.fetch(folder / "part.json", fresh=True)
        if not _holds(folder / "part.json", part):
            yield f"{folder / 'part.json'} is not the record that was published"
    except (Damaged, OSError):
        yield f"{folder / 'part.json'} is missing or damaged"


def _holds(path: Path, part: PartRecord) -> bool:
    """Is this the record in part.json? Nearly always its bytes are, and need not be read as JSON."""
    return path.read_bytes() == part.text.encode() or read_record(path, PartRecord) == part


def _strangers(artefact: Artefact, part: PartRecord, below: Below | None = None) -> list[str]:
    """Files in the folder of a part that are none of its own."""
    known = {file.name for file in part.files} | {"part.json"}
    folder = artefact.part_path(part)
    if below is None:
        return sorted(artefact.files_of(folder) - known)
    inside = f"{folder.relative_to(artefact.root).as_posix()}/"
    return sorted({key.removeprefix(inside) for key in below(folder)} - known)


def below_of(artefact: Artefact) -> Below | None:
    """What an object store lists at or below a path of the artefact, by key, found without a walk through all of its
    listing; None for a store on disk."""
    if artefact.objects is None:
        return None
    objects, listed = artefact.objects, artefact.objects.listing(artefact.path)
    keys = sorted(listed)

    def below(path: Path) -> dict[str, Found]:
        key = objects.key(path)
        inside = keys[bisect_left(keys, f"{key}/") : bisect_left(keys, f"{key}0")]  # 0 comes after /
        return {name: listed[name] for name in [key, *inside] if name in listed}

    return below


def mend(found: Iterable[Damage]) -> Iterator[str]:
    """Mend what can be mended at once, or remove it so that the next run makes it again; each place once. Says what was
    done, and ends with a UserError where something is left to do."""
    left = []
    for each in {(each.artefact, each.part and each.part.folder): each for each in found}.values():
        try:
            yield repair(each)
        except UserError as error:
            left.append(str(error))
    if left:
        raise UserError("\n".join(["Not everything could be mended; the rest is.", *dict.fromkeys(left)]))


def repair(found: Damage) -> str:
    """Mend one place. Raises UserError where that cannot be done, with what can be done instead."""
    artefact, part = found.artefact, found.part
    try:
        with artefact.writing():
            return _repair_part(artefact, part) if part is not None else _repair_own(artefact)
    except Damaged as error:
        raise _beyond_repair(artefact, error) from error


def _repair_own(artefact: Artefact) -> str:
    if artefact.kind == "saes":
        artefact.remove(artefact.path)
        return f"removed {artefact.path}"
    for path in _bad_files(artefact):
        artefact.remove(path)
    artefact.recover()
    return f"mended {artefact.path}, or removed what has to be made again"


def _repair_part(artefact: Artefact, part: PartRecord) -> str:
    folder = artefact.part_path(part)
    if list(artefact.missing_files(folder, part.files, full=True)):
        artefact.remove(folder)
        return f"removed {folder}"
    strangers = [folder / name for name in _strangers(artefact, part)]
    for path in strangers:
        artefact.remove(path)
    write_record(folder / "part.json", part)
    artefact.send(folder / "part.json")
    return f"removed {', '.join(map(str, strangers))}" if strangers else f"wrote {folder / 'part.json'} again"


def _beyond_repair(artefact: Artefact, error: Damaged) -> UserError:
    """What is damaged follows from nothing that is left; that the run then makes all again has a price in tokens."""
    what = str(error).partition(" is missing or damaged")[0]
    again = "; documents that were forgotten come back with it: forget them again" if artefact.kind == "tokens" else ""
    return UserError(
        f"{what} is damaged, and nothing that is left says what was in it.\nBring it back from a backup. Or remove "
        f"{artefact.location(artefact.path)}: the next run makes all of it again from what it reads{again}."
    )


def _bad_files(artefact: Artefact) -> Iterator[Path]:
    """The artefact's own files that have to be made again."""
    for name in ("artefact.json", "quality.json"):
        with contextlib.suppress(FileNotFoundError):
            try:
                read_checked(artefact.path / name)
            except Damaged:
                yield artefact.path / name
    with contextlib.suppress(Damaged, OSError):
        for file in artefact.record.files:
            if list(artefact.missing_files(artefact.path, [file], full=True)):
                yield artefact.path / file.name


def at_work(artefact: Artefact) -> bool:
    """Is a run writing it?"""
    return not is_free(artefact.slot)


def upgrade(store: Store) -> list[str]:
    """Bring the records of a store to the format of this saeflow; says what was done, nothing where all is new."""
    done = []
    for artefact in store.artefacts():
        if artefact.record.format_version < FORMAT_VERSION:
            with artefact.writing():
                _upgrade(store, artefact)
            done.append(f"{artefact.id}: format {artefact.record.format_version} to {FORMAT_VERSION}")
    if read_checked(store.root / "store.json")["format_version"] < FORMAT_VERSION:
        write_checked(store.root / "store.json", {"format_version": FORMAT_VERSION})
        store.send(store.root / "store.json")
    return done or [f"{store.name} has format {FORMAT_VERSION} already"]


def _upgrade(store: Store, artefact: Artefact) -> None:
    """Parts learn what they were made from; format 1 had one generation, so the parts of now are the right ones."""
    generation = artefact.generation()
    if generation is not None:
        inputs = [store.by_id(name) for name in artefact.record.inputs if not name.startswith("saes/")]
        artefact.publish([_upgraded(artefact, part, inputs) for part in generation.parts])
    write_record(artefact.path / "artefact.json", artefact.record.model_copy(update={"format_version": FORMAT_VERSION}))


def _upgraded(artefact: Artefact, part: PartRecord, inputs: list[Artefact]) -> PartRecord:
    """The part under its new name, its files linked, not copied."""
    if part.format_version == FORMAT_VERSION:
        return part
    made_from = {each.kind: p.folder for each in inputs for p in each.published().parts if p.index == part.index}
    fresh = PartRecord(index=part.index, counts=part.counts, files=part.files, inputs=made_from)
    if fresh.folder == part.folder:
        write_record(artefact.part_path(part) / "part.json", fresh)
        return fresh
    folder = artefact.own_work / fresh.folder
    shutil.copytree(artefact.part_path(part), folder, copy_function=os.link)
    (folder / "part.json").unlink()
    write_record(folder / "part.json", fresh)
    flush_tree(folder)
    shutil.rmtree(artefact.part_path(fresh), ignore_errors=True)
    rename(folder, artefact.part_path(fresh))
    return fresh
