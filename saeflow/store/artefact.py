"""Artefacts on disk: immutable parts, their records, and generations switched atomically.

The bytes are specified in data/README.md. Everything is written under `tmp/`, flushed to the disk and
renamed into place, so that a kill or a power cut leaves either nothing or a finished part.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import stat
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import xxhash

from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.recipe.settings import Overlap
from saeflow.runtime.errors import UserError
from saeflow.store.files import checksum, flush_tree, look, make_folder, remove, rename, replacing
from saeflow.store.lease import FileSlot, Lease, ObjectSlot, held, watch
from saeflow.store.records import (
    ArtefactRecord,
    Damaged,
    FileRecord,
    Generation,
    Hidden,
    Kind,
    PartRecord,
    checked_text,
    damaged,
    file_record,
    file_records,
    listed,
    listed_folders,
    read_checked,
    read_listed,
    read_record,
    write_checked,
    write_provenance,
    write_record,
)
from saeflow.store.storage import Objects


@dataclass(frozen=True)
class Job:
    """Work cut into parts: the indices still missing, and how to make them."""

    missing: list[int]
    make: Callable[[Sequence[int]], Iterator[PartRecord]]
    """Makes parts as it is iterated: one after the other here, or several at once on a cluster."""
    n_calls: int | None = None
    """Calls of `make` at once that keep the cluster busy; None where there is none."""


@dataclass
class Hold:
    """A lease, and the generation that its owner began with or has switched to since; 0 is none."""

    lease: Lease
    number: int


_HOLDS: dict[tuple[Path, str], list[Hold]] = {}
"""Leases that this process holds, by store and artefact."""


_READ: weakref.WeakValueDictionary[tuple[Path, str, int, str], Generation] = weakref.WeakValueDictionary()
"""Lists that some object of this process still holds: another object of the same artefact need not read them again."""


@dataclass(frozen=True)
class Artefact:
    """A folder `<kind>/<name>-<fp>` of a store; it may not exist yet."""

    root: Path
    kind: Kind
    name: str
    fp: str
    objects: Objects | None = field(default=None, compare=False, repr=False)
    """The object store that the folder stands for, if it does."""
    overlap: Overlap = field(default="refuse", compare=False, repr=False)
    """What `writing` does while somebody else is at it."""
    made: dict[int, PartRecord] = field(default_factory=dict, compare=False, repr=False)
    """Parts that this object has finished, by index."""
    shared: bool = field(default=False, compare=False)
    """May another process make the same part at the same time? Then each attempt has a folder of its own."""
    _lists: dict[tuple[int, str], Generation] = field(default_factory=dict, compare=False, repr=False)
    """The list that was read last, by its number and checksum: of 100,000 parts one takes seconds to read."""

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}-{self.fp}"

    @property
    def path(self) -> Path:
        return self.root / self.kind / f"{self.name}-{self.fp}"

    @cached_property
    def record(self) -> ArtefactRecord:
        return read_record(self.path / "artefact.json", ArtefactRecord)

    def exists(self) -> bool:
        return (self.path / "artefact.json").is_file()

    @property
    def work(self) -> Path:
        """Folder for work in progress; emptied when the next writer starts."""
        return self.root / "tmp" / f"{self.kind}-{self.name}-{self.fp}"

    @property
    def holds(self) -> list[Hold]:
        """The lease, while this process holds it."""
        return _HOLDS.setdefault((self.root, self.id), [])

    @property
    def own_work(self) -> Path:
        """What this writer alone fills, or its workers: one that was thought dead may wake up and write on in its
        own."""
        if self.holds:
            return self.work / self.holds[-1].lease.owner.token
        owner = self.slot.read()[0] if self.shared else None
        return self.work / (owner.token if owner else "free")

    @property
    def slot(self) -> FileSlot | ObjectSlot:
        """Where the lease is kept."""
        path = self.root / "tmp" / "locks" / f"{self.kind}-{self.name}-{self.fp}.lease"
        return FileSlot(path) if self.objects is None else ObjectSlot(self.objects, path)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the artefact's lease and clear what a killed run left behind. Raises UserError where another run has it,
        unless the store waits for others."""
        with held(self.slot, self.id, self.overlap) as lease:
            self.holds.append(Hold(lease, 0))
            try:
                self._read_anew(lease.waited)
                shutil.rmtree(self.work, ignore_errors=True)
                self.recover()
                self.holds[-1].number = self.current_number()
                yield
            finally:
                shutil.rmtree(self.own_work, ignore_errors=True)
                with contextlib.suppress(OSError):
                    self.work.rmdir()  # unless another's work is in it
                self.holds.pop()

    def _read_anew(self, waited: bool) -> None:
        """In an object store the records are those that this process saw when it began; others may have published."""
        if self.objects is not None:
            if waited:
                self.objects.pull()
            self.objects.pull_one(self.path)
        self.__dict__.pop("record", None)

    def require_lease(self) -> None:
        """Raises UserError where this run held the lease and was silent for so long that another has it now."""
        for hold in self.holds[-1:]:
            hold.lease.require()

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Around what readers see at once: nobody else publishes inside. Raises UserError where somebody has since this
        run began."""
        with self.holds[-1].lease.fence() if self.holds else self.slot.guard():
            if any(hold.number != self.current_number() for hold in self.holds[-1:]):
                raise self._overtaken()
            yield
            for hold in self.holds[-1:]:
                hold.number = self.current_number()

    def _overtaken(self) -> UserError:
        return UserError(
            f"Another run has published {self.id} since this one began.\nNothing is lost; run the same command again."
        )

    def current_number(self) -> int:
        """Of the generation that is published; 0 while none is."""
        path = self.path / "manifest.json"
        return int(read_checked(path)["generation"]) if path.is_file() else 0

    def begin(self, facts: dict[str, Any], inputs: Iterable[str] = (), files: Iterable[str] = ()) -> None:
        """Create the folder and its artefact.json, once; `files` lie in the folder already."""
        if self.exists():
            _ = self.record  # refuses a newer format
            return
        make_folder(self.path / "parts")
        record = ArtefactRecord(
            kind=self.kind, name=self.name, fp=self.fp, facts=facts, inputs=list(inputs),
            files=[file_record(self.path, self.path / name) for name in files],
        )  # fmt: skip
        with self.publishing():
            write_record(self.path / "artefact.json", record)
            self.send(*(self.path / name for name in files))
            self.send(self.path / "artefact.json")

    def attach(self, names: Iterable[str]) -> None:
        """Name further files of the artefact's own, which lie in its folder, in its record; not in one of an earlier
        format, which `upgrade` writes anew."""
        if self.record.format_version < FORMAT_VERSION:
            return
        files = {file.name: file for file in self.record.files}
        files |= {name: file_record(self.path, self.path / name) for name in names}
        record = self.record.model_copy(update={"files": list(files.values())})
        if record == self.record:
            return
        with self.publishing():
            self.send(*(self.path / name for name in names))
            write_record(self.path / "artefact.json", record)
            self.send(self.path / "artefact.json")
            self.__dict__["record"] = record

    def send(self, *paths: Path) -> None:
        """Bring files of the artefact's own to the object store, where there is one."""
        if self.objects is not None:
            self.objects.send(paths)

    def remove(self, path: Path) -> None:
        """A file or folder of the artefact, wherever it is. Raises UserError where a record or a link leads out of its
        folder."""
        inside = path.parent.resolve().is_relative_to(self.path.resolve()) and path.name != ".."
        if path != self.path and not inside:
            raise UserError(
                f"{path} lies outside of {self.path}: it is left alone.\nA record or link was not written by saeflow."
            )
        if self.objects is not None:
            self.objects.remove(path)
        else:
            remove(path)

    def fitting(self, inputs: Mapping[int, dict[str, str]]) -> dict[int, PartRecord]:
        """Finished parts that were made from these inputs, by index."""
        return self.parts(lambda part: part.index in inputs and part.made_from(inputs[part.index]))

    def part_path(self, part: PartRecord) -> Path:
        return self.path / "parts" / part.folder

    def part_file(self, part: PartRecord, name: str) -> Path:
        """A file of a part, to be read. Raises Damaged where the object store gives another one than was written."""
        return self._fetched(self.part_path(part) / name, part.files)

    def location(self, path: Path) -> str:
        """Where a file of the artefact is, as anybody can name it: its path or URL."""
        return f"{self.objects.url}/{self.objects.key(path)}" if self.objects else str(path)

    def own_file(self, name: str) -> Path:
        """A file beside the parts, to be read."""
        path = self.path / name
        return self._fetched(path, self.record.files) if self.objects is not None else path

    def _fetched(self, path: Path, files: Iterable[FileRecord]) -> Path:
        """A file, brought here if it is not: a power cut may have left it shorter than its record says."""
        if self.objects is None:
            return path
        known = [file for file in files if path.as_posix().endswith(f"/{file.name}")]
        if path.is_file() and (not known or path.stat().st_size in [file.n_bytes for file in known]):
            return path
        try:
            self.objects.fetch(path, fresh=True)
        except FileNotFoundError:
            return path  # its reader says what is missing
        if known and checksum(path) not in [file.checksum for file in known]:
            path.unlink()
            raise damaged(path)
        return path

    @contextlib.contextmanager
    def new_part(
        self, index: int, counts: dict[str, int], inputs: dict[str, str] | None = None,
        checksums: Mapping[str, str] | None = None,
    ) -> Iterator[Path]:  # fmt: skip
        """A folder to fill; on a clean exit it becomes the part, checksummed and flushed to disk.

        `counts` may still be changed inside the block, and `checksums` be filled: those of files that need not be
        read again, by name. Raises UserError where one of them, or the folder, is gone.
        """
        self.require_lease()
        folder = self.own_work / (f"{index:06d}-{uuid.uuid4().hex[:8]}" if self.shared else f"{index:06d}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            with _staying(folder) as stayed:
                yield folder
                files = file_records(folder, checksums or {})
                if not stayed() or not {file.name for file in files}.issuperset(checksums or ()):
                    self.require_lease()  # the next owner clears away what it finds
                    raise UserError(
                        f"{self.id}: the work folder {folder} was removed while part {index} was written into it.\n"
                        "Nothing of that part is published. Run the same command again, and leave tmp/ alone while "
                        "it works."
                    )
        except BaseException:
            if self.shared:  # nobody else knows this folder
                shutil.rmtree(folder, ignore_errors=True)
            raise
        record = PartRecord(index=index, counts=dict(sorted(counts.items())), files=files, inputs=inputs or {})
        write_record(folder / "part.json", record)
        self._keep(folder, record)
        self.made[index] = record

    def _keep(self, folder: Path, record: PartRecord) -> None:
        """Make a filled folder the part, in one rename or, in an object store, with its record written last."""
        target = self.part_path(record)
        self.require_lease()
        if self.objects is None:
            flush_tree(folder)
            _put_in_place(folder, target, lambda: not list(self.missing_files(target, record.files, full=True)))
            return
        self.objects.send([folder / file.name for file in record.files], folder, target)
        self.objects.send([folder / "part.json"], folder, target)
        shutil.rmtree(target, ignore_errors=True)
        if self.kind == "tokens":  # small, and read by every later stage
            rename(folder, target)
        else:
            shutil.rmtree(folder)

    def look_again(self) -> None:
        """What other machines have finished is to be seen from now on."""
        if self.objects is not None:
            self.objects.list_again()
        with contextlib.suppress(FileNotFoundError):
            os.scandir(self.path.parent).close()  # a network file system asks its server when a folder is opened

    def parts(self, fits: Callable[[PartRecord], bool] = lambda record: True) -> dict[int, PartRecord]:
        """Finished parts on disk that fit and whose files are all there in their full size; published ones first."""
        generation = self.generation()
        found: dict[int, PartRecord] = {}
        every = itertools.chain(generation.parts if generation else (), self._unlisted(generation))
        for record, whole in self._looked_at(record for record in every if fits(record)):
            if whole:
                found.setdefault(record.index, record)
        return found

    def _looked_at(self, records: Iterable[PartRecord]) -> Iterator[tuple[PartRecord, bool]]:
        """Parts, and whether their files are all there."""
        if self.objects is not None:
            self.objects.listing(self.path)
        return look(lambda record: (record, not any(self._missing(record))), records)

    def _missing(self, part: PartRecord) -> Iterator[str]:
        folder = self.part_path(part)
        yield from self.missing_files(folder, part.files)
        if self._size(f"{folder}/part.json") is None:
            yield f"{folder}/part.json is missing"

    def missing_files(self, folder: Path, files: Iterable[FileRecord], full: bool = False) -> Iterator[str]:
        """What is wrong with the recorded files: missing, of another size, or (`full`) of other content."""
        for file in files:
            path = f"{folder}/{file.name}"
            n_bytes = self._size(path)
            if n_bytes is None:
                yield f"{path} is missing"
            elif n_bytes != file.n_bytes:
                yield f"{path} has {n_bytes} bytes instead of {file.n_bytes}"
            elif full and self._checksum(Path(path)) != file.checksum:
                yield f"{path} has changed since it was written"

    def _size(self, path: str) -> int | None:
        """Bytes of a file of the artefact, None where it is missing. One call of the system: a store has millions."""
        if self.objects is not None:
            found = self.objects.listing(self.path).get(self.objects.key(Path(path)))
            return found.n_bytes if found else None
        try:
            about = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return about.st_size if stat.S_ISREG(about.st_mode) else None

    def _checksum(self, path: Path) -> str:
        return self.objects.checksum(path) if self.objects is not None else checksum(path)

    def footprint(self, path: Path) -> tuple[int, float]:
        """Bytes of a file of the artefact, or of all below a folder, and when the newest was written."""
        if self.objects is not None:
            key = self.objects.key(path)
            found = [each for name, each in self.objects.listing(self.path).items() if f"{name}/".startswith(f"{key}/")]
            return sum(each.n_bytes for each in found), max((each.written for each in found), default=0.0)
        inside = [path, *path.rglob("*")]
        return sum(each.stat().st_size for each in inside if each.is_file()), path.stat().st_mtime

    def files_of(self, folder: Path) -> set[str]:
        """Names of all files below a folder of the artefact."""
        if self.objects is not None:
            inside = self.objects.key(folder) + "/"
            return {key.removeprefix(inside) for key in self.objects.listing(self.path) if key.startswith(inside)}
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    def _unlisted(self, generation: Generation | None) -> Iterator[PartRecord]:
        """Parts on disk that are not published: work of a run that was killed."""
        listed = {part.folder for part in generation.parts} if generation else set()
        for folder in sorted(self.part_folders() - listed):
            with contextlib.suppress(Damaged, ValueError, OSError):  # such a part is made again
                record = read_record(self._fetched(self.path / "parts" / folder / "part.json", ()), PartRecord)
                if record.folder == folder:
                    yield record

    def part_folders(self) -> set[str]:
        """Names of the folders in parts/, finished or not, listed or not."""
        if self.objects is not None:
            return {name.partition("/")[0] for name in self.files_of(self.path / "parts")}
        with contextlib.suppress(FileNotFoundError):
            return {entry.name for entry in os.scandir(self.path / "parts")}
        return set()

    def publish(
        self,
        parts: Iterable[PartRecord],
        provenance: dict[str, Any] | None = None,
        hidden: Mapping[int, tuple[Hidden, ...]] | None = None,
        clear: bool = True,
    ) -> Generation:
        """Show readers these parts from now on; publishing the same list again changes nothing.

        `hidden` (default: what is hidden now) goes with it, in the same instant. `clear` removes folders that no list
        names: not while others of this run make parts that are shown later. Raises UserError where the folder of a part
        that was not shown before is not there.
        """
        ordered = tuple(sorted(parts, key=lambda part: part.index))
        with self.publishing():
            current = self.generation()
            if hidden is None:
                hidden = current.hidden if current else {}
            if current is not None and (current.parts, current.hidden) == (ordered, hidden):
                return current
            if self.objects is None:
                self._require_there(ordered, current)
            fresh = Generation(current.number + 1 if current else 1, ordered, hidden)
            write_provenance(self.path, provenance or {})
            self.send(self.path / "provenance.json")
            fresh = self._write_list(fresh)
            self._show(fresh.number)
            if clear and self.objects is None:  # another machine may be about to publish them; `gc` waits for it
                self._clear_unseen()
            return fresh

    def _require_there(self, parts: Sequence[PartRecord], current: Generation | None) -> None:
        shown = {part.folder for part in current.parts} if current else set()
        if lost := {part.folder for part in parts} - shown - self.part_folders():
            raise UserError(
                f"Part {min(lost)} of {self.id} is gone since it was made. Nothing was published; run the same "
                "command again."
            )

    def _write_list(self, generation: Generation) -> Generation:
        """Write a generation's list; in an object store under a number that nobody else has used."""
        with replacing(self.list_path(generation.number)) as temporary:
            pq.write_table(listed(generation), temporary)
        if self.objects is None or self.objects.create(self.list_path(generation.number)):
            return generation
        return self._write_list(replace(generation, number=generation.number + 1))

    def list_path(self, number: int) -> Path:
        return self.path / "generations" / f"{number:06d}.parquet"

    def _show(self, number: int) -> None:
        """Switch readers to a generation."""
        file = self.list_path(number)
        about = {"format_version": FORMAT_VERSION, "generation": number, "checksum": checksum(file)}
        if self.objects is not None:
            self.objects.switch(self.path / "manifest.json", checked_text(about).encode())
        write_checked(self.path / "manifest.json", about)

    def _clear_unseen(self) -> None:
        """Remove parts that no generation lists: leftovers of killed runs, which no reader can have open."""
        for folder in self.unlisted_folders():
            shutil.rmtree(folder, ignore_errors=True)

    def unlisted_folders(self) -> list[Path]:
        """Folders in parts/ that no generation on disk lists."""
        left = self.part_folders()
        for number in reversed(self.numbers()):  # the newest names nearly all: the others are mostly not read
            if left:
                left -= set(listed_folders(self.list_path(number)))
        return sorted(self.path / "parts" / name for name in left)

    def numbers(self) -> list[int]:
        """Generations whose lists are still on disk."""
        return sorted(int(path.stem) for path in (self.path / "generations").glob("[0-9]*.parquet"))

    def generation(self, number: int | None = None) -> Generation | None:
        """The published list of parts, or None while nothing is published; or an earlier one by its number."""
        path = self.path / "manifest.json"
        if number is not None:
            return self._read_list(number)
        if not path.is_file():
            return None
        manifest = read_checked(path)
        file = self.list_path(int(manifest["generation"]))
        if self.objects is not None and not (file.is_file() and checksum(file) == manifest["checksum"]):
            with contextlib.suppress(FileNotFoundError):
                self.objects.fetch(file, fresh=True)
        if not file.is_file() or checksum(file) != manifest["checksum"]:
            raise damaged(file)
        known = int(manifest["generation"]), str(manifest["checksum"])
        if known not in self._lists:
            self._lists.clear()
            shared = _READ.get((self.root, self.id, *known)) or self._read_list(known[0])
            self._lists[known] = _READ[self.root, self.id, *known] = shared
        return self._lists[known]

    def _read_list(self, number: int) -> Generation:
        return read_listed(self.list_path(number), number)

    def recover(self) -> bool:
        """Make a lost or damaged list or manifest again, if what is left allows it. True if something was done."""
        with contextlib.suppress(Damaged):
            if self.generation() is not None or not self.numbers():
                return False
        try:
            manifest = read_checked(self.path / "manifest.json")
        except (Damaged, OSError):
            newest = self.numbers()[-1]
            self._read_list(newest)  # an older one would show again what was forgotten since
            self._show(newest)
        else:
            self._recover_list(int(manifest["generation"]), str(manifest["checksum"]))
        return True

    def _recover_list(self, number: int, wanted: str) -> None:
        """From the records of the parts; right only if the bytes come out as the manifest says."""
        parts = {part.index: part for part in self._unlisted(None)}
        content = io.BytesIO()
        pq.write_table(listed(Generation(number, tuple(parts[i] for i in sorted(parts)))), content)
        if xxhash.xxh3_128_hexdigest(content.getvalue()) != wanted:
            raise damaged(self.list_path(number))
        with replacing(self.list_path(number)) as temporary:
            temporary.write_bytes(content.getvalue())
        self.send(self.list_path(number))

    def published(self) -> Generation:
        generation = self.generation()
        if generation is None:
            raise UserError(f"{self.id} is not finished. Run the stage that makes it: `saeflow run RECIPE`.")
        return generation

    @contextlib.contextmanager
    def whole(self, facts: dict[str, Any], inputs: Iterable[str], provenance: dict[str, Any]) -> Iterator[Path]:
        """A folder that becomes the artefact in one rename: for artefacts without parts.

        Raises UserError where another run has published it meanwhile.
        """
        folder = self.own_work / "whole"
        folder.mkdir(parents=True)
        yield folder
        files = file_records(folder)
        record = ArtefactRecord(
            kind=self.kind, name=self.name, fp=self.fp, facts=facts, inputs=list(inputs), files=files
        )
        write_record(folder / "artefact.json", record)
        write_provenance(folder, provenance)
        flush_tree(folder)
        with self.publishing():
            self._read_anew(waited=False)
            if self.complete():
                raise self._overtaken()
            if self.path.exists():  # damaged: the caller found files missing
                self.remove(self.path)
            if self.objects is not None:
                names = [*(file.name for file in files), "provenance.json"]
                self.objects.send([folder / name for name in names], folder, self.path)
                if not self.objects.create(self.path / "artefact.json", folder / "artefact.json"):
                    raise self._overtaken()
                shutil.rmtree(self.path, ignore_errors=True)
            rename(folder, self.path)

    def complete(self) -> bool:
        """Is the artefact there, with all the files of its own?"""
        return self.exists() and not list(self.missing_files(self.path, self.record.files))

    def fetched(self) -> Path:
        """The folder of an artefact without parts, with all its files in it."""
        for file in self.record.files:
            self.own_file(file.name)
        return self.path


@contextlib.contextmanager
def writing_all(targets: Iterable[Artefact]) -> Iterator[None]:
    """Hold the leases of several artefacts; taken in one order, so that no two runs wait for one another."""
    ordered = sorted(targets, key=lambda each: each.id)
    for target in ordered:
        watch(target.slot)
    with contextlib.ExitStack() as stack:
        for target in ordered:
            stack.enter_context(target.writing())
        yield


@contextlib.contextmanager
def _staying(folder: Path) -> Iterator[Callable[[], bool]]:
    """Is it the same folder still? One that was removed and made again is another."""
    handle = os.open(folder, os.O_RDONLY)  # as long as it is open, no other one gets its number
    try:
        yield lambda: folder.is_dir() and os.path.samestat(os.fstat(handle), folder.stat())
    finally:
        os.close(handle)


def _put_in_place(folder: Path, target: Path, is_whole: Callable[[], bool]) -> None:
    """A finished folder under the name that its content gives it. What is there already is equal, or damaged."""
    if target.exists() and is_whole():
        shutil.rmtree(folder)
        return
    shutil.rmtree(target, ignore_errors=True)
    try:
        rename(folder, target)
    except OSError:  # another attempt at the same part was quicker
        if not is_whole():
            raise
        shutil.rmtree(folder)
