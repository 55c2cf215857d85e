"""What an artefact is, where its files lie, which of its parts are finished, and how a new one is made.

A part is written under tmp/, checksummed, flushed, and renamed into place (in a bucket: sent with its record last). So
a part that is there is finished.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from saeflow.runtime.errors import UserError
from saeflow.store.files import checksum, map_lookups
from saeflow.store.lease import Hold
from saeflow.store.lease_slot import Slot
from saeflow.store.links import is_file, remove
from saeflow.store.lists import read_generation, read_part_folders
from saeflow.store.records import (
    ArtefactRecord,
    Damaged,
    FileRecord,
    Generation,
    Kind,
    PartRecord,
    damaged,
    file_records,
    read_checked,
    read_record,
    write_record,
)
from saeflow.store.storage.folder import Storage


@dataclass(frozen=True)
class Identity:
    """A folder `<kind>/<name>-<fp>` of a store. It may not exist yet."""

    storage: Storage = field(repr=False)
    kind: Kind
    name: str
    fp: str

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}-{self.fp}"

    @cached_property
    def path(self) -> Path:
        return self.storage.root / self.kind / f"{self.name}-{self.fp}"

    @property
    def work(self) -> Path:
        """Folder for work in progress. The next writer empties it."""
        return self.storage.root / "tmp" / f"{self.kind}-{self.name}-{self.fp}"

    @property
    def slot(self) -> Slot:
        """The place of the artefact's lease."""
        return self.storage.slot(f"{self.kind}-{self.name}-{self.fp}")

    @property
    def holds(self) -> list[Hold]:
        """The lease, while this process holds it."""
        return self.storage.holds[self.id]

    @cached_property
    def record(self) -> ArtefactRecord:
        return read_record(self.path / "artefact.json", ArtefactRecord)

    def fact(self, name: str) -> Any:
        """Return one of the record's facts. Raises Damaged if the record lacks it."""
        if name not in self.record.facts:
            raise damaged(self.path / "artefact.json")
        return self.record.facts[name]

    def exists(self) -> bool:
        return is_file(self.path / "artefact.json")

    def complete(self) -> bool:
        """True if the artefact is there with all the files of its own."""
        return self.exists() and not list(self.missing_files(self.path, self.record.files))

    def part_path(self, part: PartRecord) -> Path:
        return self.path / "parts" / part.folder

    def part_file(self, part: PartRecord, name: str) -> Path:
        """Return the path of a part's file, to be read.

        Raises Damaged if a bucket gives another file than was written.
        """
        return self.storage.fetch_recorded(self.part_path(part) / name, lambda: part.files)

    def own_file(self, name: str) -> Path:
        """Return the path of a file beside the parts, to be read. Raises Damaged as `part_file` does."""
        return self.storage.fetch_recorded(self.path / name, lambda: self.record.files)

    def fetched(self) -> Path:
        """Return the folder of an artefact without parts, with all its files in it."""
        for file in self.record.files:
            self.own_file(file.name)
        return self.path

    def missing_files(self, folder: Path, files: Iterable[FileRecord], full: bool = False) -> Iterator[str]:
        """Yield what is wrong with the recorded files: missing, of another size, or (`full`) of other content."""
        files = list(files)
        sizes = self.storage.sizes(str(folder), [file.name for file in files])
        for file, n_bytes in zip(files, sizes, strict=True):
            path = f"{folder}/{file.name}"
            if n_bytes is None:
                yield f"{path} is missing"
            elif n_bytes != file.n_bytes:
                yield f"{path} has {n_bytes} bytes instead of {file.n_bytes}"
            elif full and self.storage.checksum(Path(path)) != file.checksum:
                yield f"{path} has changed since it was written"

    def look_once(self, look: Callable[[], None]) -> None:
        """Look at the published files; `look` raises if one is missing. A bucket is looked at once a machine."""
        records = (self.path / name for name in ("artefact.json", "manifest.json"))
        self.storage.look_once(" ".join([self.id, *(checksum(each) for each in records if is_file(each))]), look)

    def set_aside(self, path: Path) -> Path | None:
        """Move a file or folder of the artefact into the store's `damaged/`. Return its new place, None if it is gone.

        Raises UserError as `remove` does.
        """
        self._require_inside(path)
        return self.storage.set_aside(path)

    def remove(self, path: Path) -> None:
        """Remove a file or folder of the artefact. Raises UserError if a record or a link leads out of its folder."""
        self._require_inside(path)
        self.storage.remove(path)

    def _require_inside(self, path: Path) -> None:
        inside = path.parent.resolve().is_relative_to(self.path.resolve()) and path.name != ".."
        if path != self.path and not inside:
            raise UserError(
                f"{path} lies outside of {self.path}: it is left alone.\nA record or link was not written by saeflow."
            )


@dataclass(frozen=True)
class Parts(Identity):
    """An artefact's parts: published or not, finished or being made."""

    shared: bool = field(default=False, compare=False)
    """True if another process may make the same part at the same time: each attempt then has a folder of its own."""
    made: dict[int, PartRecord] = field(default_factory=dict, compare=False, repr=False)
    """Parts that this object has finished, by index."""
    _lists: dict[tuple[int, str], Generation] = field(default_factory=dict, compare=False, repr=False)
    """The list of parts that was read last, by its number and checksum."""

    def generation(self, number: int | None = None) -> Generation | None:
        """Return the published list of parts, or an earlier one by its number; None if nothing is published."""
        path = self.path / "manifest.json"
        if number is not None:
            return read_generation(self.list_path(number), number)
        if not path.is_file():
            return None
        number, wanted = self.manifest()
        file = self.list_path(number)
        if not _is_file_of(file, wanted):
            with contextlib.suppress(FileNotFoundError):
                self.storage.fetch(file, fresh=True)
            if not _is_file_of(file, wanted):
                raise damaged(file)
        return self._read_list_once(number, wanted)

    def manifest(self) -> tuple[int, str]:
        """Return the number of the published generation and the checksum of its list. Raises Damaged."""
        path = self.path / "manifest.json"
        found = read_checked(path)
        try:
            return int(found["generation"]), str(found["checksum"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path) from error

    def _read_list_once(self, number: int, digest: str) -> Generation:
        if (number, digest) not in self._lists:
            self._lists.clear()
            lists, key = self.storage.lists, (self.id, number, digest)
            known = lists.get(key)
            if known is None:
                known = lists[key] = read_generation(self.list_path(number), number)
            self._lists[number, digest] = known
        return self._lists[number, digest]

    def published(self) -> Generation:
        """Return the published list of parts. Raises UserError if nothing is published."""
        generation = self.generation()
        if generation is None:
            raise UserError(f"{self.id} is not finished. Run the stage that makes it: `saeflow run RECIPE`.")
        return generation

    def n_bytes(self) -> int:
        """Return the bytes of what readers see. Of a list of parts only the column of sizes is read."""
        own = sum(file.n_bytes for file in self.record.files)
        if not is_file(self.path / "manifest.json"):
            return own
        path = self.storage.fetch(self.list_path(self.manifest()[0]))
        return own + int(sum(pq.read_table(path, columns=["n_bytes"]).column(0).to_pylist()))

    def list_path(self, number: int) -> Path:
        return self.path / "generations" / f"{number:06d}.parquet"

    def numbers(self) -> list[int]:
        """Return the generations whose lists are still on disk."""
        names = self.storage.names_here(self.path / "generations")
        return sorted(int(name[:-8]) for name in names if name.endswith(".parquet") and name[:-8].isdecimal())

    def current_number(self) -> int:
        """Return the number of the published generation; 0 if nothing is published."""
        return self.manifest()[0] if is_file(self.path / "manifest.json") else 0

    def parts(self, fits: Callable[[PartRecord], bool] = lambda record: True) -> dict[int, PartRecord]:
        """Return the finished parts that fit and whose files are there in their full size; published ones first."""
        generation = self.generation()
        every = itertools.chain(generation.parts if generation else (), self.unlisted_parts(generation))
        found: dict[int, PartRecord] = {}
        for record in self._whole(list(filter(fits, every))):
            found.setdefault(record.index, record)
        return found

    def parts_from(self, inputs: Mapping[int, dict[str, str]]) -> dict[int, PartRecord]:
        """Return the finished parts that were made from these inputs, by index."""
        return self.parts(lambda part: part.index in inputs and part.made_from(inputs[part.index]))

    def _whole(self, parts: Sequence[PartRecord]) -> Iterator[PartRecord]:
        """Yield those of these parts whose files are there in their full size."""
        sure = self.storage.confirmed(f"{self.path}/parts", parts)
        doubtful = (part for part, known in zip(parts, sure, strict=True) if not known)
        found = map_lookups(lambda some: list(map(self._is_whole, some)), doubtful)
        return (part for part, known in zip(parts, sure, strict=True) if known or next(found))

    def _is_whole(self, part: PartRecord) -> bool:
        names, wanted = part.names_and_sizes
        *found, record = self.storage.sizes(f"{self.path}/parts/{part.folder}", [*names, "part.json"])
        return record is not None and found == wanted

    def unlisted_parts(self, generation: Generation | None) -> Iterator[PartRecord]:
        """Yield finished parts that a generation does not list: work of a run that was killed."""
        listed = {part.folder for part in generation.parts} if generation else set()
        for folder in sorted(self.part_folders() - listed):
            path = self.path / "parts" / folder / "part.json"
            with contextlib.suppress(Damaged, ValueError, FileNotFoundError, NotADirectoryError):  # it is made again
                record = read_record(self.storage.fetch_recorded(path, tuple), PartRecord)
                if record.folder == folder:
                    yield record

    def part_folders(self) -> set[str]:
        """Return the names of the folders in parts/, finished or not, listed or not."""
        return self.storage.names_in(self.path / "parts")

    def unlisted_folders(self) -> list[Path]:
        """Return the folders in parts/ that no generation on disk lists."""
        left = self.part_folders()
        for number in reversed(self.numbers()):  # the newest names nearly all: the others are mostly not read
            if left:
                left -= set(read_part_folders(self.list_path(number)))
        return sorted(self.path / "parts" / name for name in left)

    def look_again(self) -> None:
        """See from now on what other machines have finished."""
        self.storage.list_again()
        with contextlib.suppress(FileNotFoundError):
            os.scandir(self.path.parent).close()  # a network file system asks its server when a folder is opened

    @property
    def own_work(self) -> Path:
        """Work folder of this writer, or of its workers, alone: one that was thought dead may write on in its own."""
        if self.holds:
            return self.work / self.holds[-1].lease.owner.token
        owner = self.slot.read()[0] if self.shared else None
        return self.work / (owner.token if owner else "free")

    def require_lease(self) -> None:
        """Raises UserError if this run held the lease and was silent for so long that another run has it now."""
        for hold in self.holds[-1:]:
            hold.lease.require()

    @contextlib.contextmanager
    def new_part(
        self, index: int, counts: dict[str, int], inputs: dict[str, str] | None = None,
        checksums: Mapping[str, str] | None = None,
    ) -> Iterator[Path]:  # fmt: skip
        """Give a folder to fill; on a clean exit it becomes the part, checksummed and flushed to disk.

        `counts` may be changed inside the block. `checksums` may be filled there: those of files, by name, that need
        not be read again. Raises UserError if one of those files, or the folder, is gone.
        """
        self.require_lease()
        folder = self.own_work / (f"{index:06d}-{uuid.uuid4().hex[:8]}" if self.shared else f"{index:06d}")
        remove(folder)
        folder.mkdir(parents=True)
        try:
            with _watching(folder) as stayed:
                yield folder
                files = file_records(folder, checksums or {})
                if not stayed() or not {file.name for file in files}.issuperset(checksums or ()):
                    self.require_lease()  # the next owner clears away what it finds
                    raise UserError(
                        f"{self.id}: the work folder {folder} was removed while part {index} was written into it.\n"
                        "Nothing of that part is published. "
                        "Run the same command again, and leave tmp/ alone while it works."
                    )
        except BaseException:
            if self.shared:  # nobody else knows this folder
                remove(folder)
            raise
        record = PartRecord(index=index, counts=dict(sorted(counts.items())), files=files, inputs=inputs or {})
        write_record(folder / "part.json", record)
        self._put_in_place(folder, record)
        self.made[index] = record

    def _put_in_place(self, folder: Path, record: PartRecord) -> None:
        target = self.part_path(record)
        self.require_lease()
        self.storage.put_part(
            folder, target,
            names=[file.name for file in record.files],
            is_whole=lambda: not list(self.missing_files(target, record.files, full=True)),
            keep=self.kind == "tokens",  # small, and read by every later stage
        )  # fmt: skip


def _is_file_of(path: Path, digest: str) -> bool:
    return is_file(path) and checksum(path) == digest


@contextlib.contextmanager
def _watching(folder: Path) -> Iterator[Callable[[], bool]]:
    """Give a function that says whether a folder is the same still. One that was removed and made again is another."""
    handle = os.open(folder, os.O_RDONLY)  # as long as it is open, no other one gets its number
    try:
        yield lambda: folder.is_dir() and os.path.samestat(os.fstat(handle), folder.stat())
    finally:
        os.close(handle)
