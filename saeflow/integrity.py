"""Is everything published there, byte for byte? What to remove so that it is made again, and what nobody reads any more."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import xxhash

from saeflow.artefact import Artefact
from saeflow.disk import flush_tree, look, rename
from saeflow.fingerprints import FORMAT_VERSION
from saeflow.lease import is_free
from saeflow.records import (
    KINDS,
    Damaged,
    PartRecord,
    listed_folders,
    read_checked,
    read_record,
    write_checked,
    write_record,
)
from saeflow.store import Store


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

    `share`, as (i, n), reads every byte of the i-th of n shares, which together are the whole, and the sizes of the rest.
    """
    for kind in KINDS:
        for folder in sorted(path for path in (store.root / kind).glob("*-*") if path.is_dir()):
            if any((folder / name).exists() for name in ("artefact.json", "manifest.json", "cfg.json")):
                yield from damage(store.by_id(f"{kind}/{folder.name}"), full, share)


def share_of_day(n: int, day: date) -> tuple[int, int]:
    """The share of a store that is read on a day: on n days in a row all of it."""
    return day.toordinal() % n, n


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

        def problems(part: PartRecord) -> tuple[PartRecord, list[str]]:
            return part, list(_part_problems(artefact, part, full or _falls_into(share, part.folder)))

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


def _part_problems(artefact: Artefact, part: PartRecord, full: bool) -> Iterator[str]:
    folder = artefact.part_path(part)
    yield from artefact.missing_files(folder, part.files, full)
    if full:
        yield from (f"{folder / name} does not belong there" for name in _strangers(artefact, part))
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


def _strangers(artefact: Artefact, part: PartRecord) -> list[str]:
    known = {file.name for file in part.files} | {"part.json"}
    return sorted(artefact.files_of(artefact.part_path(part)) - known)


def repair(found: Damage) -> str:
    """Mend what can be mended at once, or remove it so that the next run makes it again. Says what was done."""
    artefact, part = found.artefact, found.part
    with artefact.writing():
        if part is not None:
            return _repair_part(artefact, part)
        if artefact.kind == "saes":
            artefact.remove(artefact.path)
            return f"removed {artefact.path}"
        for path in _bad_files(artefact):
            artefact.remove(path)
        artefact.recover()
        return f"mended {artefact.path}, or removed what has to be made again"


def _repair_part(artefact: Artefact, part: PartRecord) -> str:
    folder = artefact.part_path(part)
    if not list(artefact.missing_files(folder, part.files, full=True)) and not _strangers(artefact, part):
        write_record(folder / "part.json", part)
        artefact.send(folder / "part.json")
        return f"wrote {folder / 'part.json'} again"
    artefact.remove(folder)
    return f"removed {folder}"


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


@dataclass(frozen=True)
class Garbage:
    """A file or folder that no reader can reach any more."""

    path: Path
    why: str
    n_bytes: int
    artefact: Artefact | None = None
    """None for work in progress, which is on this machine alone."""


def garbage(store: Store, grace_seconds: float) -> Iterator[Garbage]:
    """What no generation lists, lists that were replaced longer ago than the grace period, and forgotten work."""
    for artefact in store.artefacts():
        yield from _old_generations(artefact, grace_seconds)
    yield from _left_work(store)


def _old_generations(artefact: Artefact, grace_seconds: float) -> Iterator[Garbage]:
    current = artefact.generation()
    if current is None or not is_free(artefact.slot):
        return
    kept = {part.folder for part in current.parts}
    lists = {number: artefact.list_path(number) for number in artefact.numbers()}
    for number, path in lists.items():
        replaced = [lists[later].stat().st_mtime for later in lists if later > number]
        if number == current.number or (replaced and time.time() - min(replaced) < grace_seconds):
            kept |= set(listed_folders(path))
        else:
            why = f"list of generation {number}; readers see {current.number}"
            yield Garbage(path, why, path.stat().st_size, artefact)
    for path in (artefact.path / "parts" / name for name in sorted(artefact.part_folders() - kept)):
        n_bytes, written = artefact.footprint(path)
        if time.time() - written >= grace_seconds:
            yield Garbage(path, "part that no generation lists", n_bytes, artefact)


def _left_work(store: Store) -> Iterator[Garbage]:
    """Work in tmp/ whose artefact nobody is writing; checkpoints only where the SAE is published."""
    for path in sorted(path for path in (store.root / "tmp").glob("*-*") if path.is_dir()):
        name = path.name.removesuffix(".checkpoint")
        if path.name != name and not _finished(store, name):
            continue
        if is_free(store.by_id(name.replace("-", "/", 1)).slot):
            n_bytes = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
            yield Garbage(path, "left by a run that was killed", n_bytes)


def _finished(store: Store, name: str) -> bool:
    return any(sae.complete() for sae in store.artefacts("saes") if f"saes-{sae.name}-{sae.fp}" == name)


def at_work(artefact: Artefact) -> bool:
    """Is a run writing it?"""
    return not is_free(artefact.slot)


def remove(garbage: Garbage) -> None:
    if garbage.artefact is not None:
        garbage.artefact.remove(garbage.path)
    else:
        shutil.rmtree(garbage.path, ignore_errors=True)


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
