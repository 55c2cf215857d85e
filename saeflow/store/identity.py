"""What an artefact is and where its files lie. Nothing here changes a file that readers see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from saeflow.runtime.errors import UserError
from saeflow.store.lease import Hold
from saeflow.store.lease_slot import Slot
from saeflow.store.records import ArtefactRecord, FileRecord, Kind, PartRecord, read_record
from saeflow.store.storage.interface import Storage


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

    @property
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

    def exists(self) -> bool:
        return (self.path / "artefact.json").is_file()

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
        for file in files:
            path = f"{folder}/{file.name}"
            n_bytes = self.storage.size(path)
            if n_bytes is None:
                yield f"{path} is missing"
            elif n_bytes != file.n_bytes:
                yield f"{path} has {n_bytes} bytes instead of {file.n_bytes}"
            elif full and self.storage.checksum(Path(path)) != file.checksum:
                yield f"{path} has changed since it was written"

    def remove(self, path: Path) -> None:
        """Remove a file or folder of the artefact. Raises UserError if a record or a link leads out of its folder."""
        inside = path.parent.resolve().is_relative_to(self.path.resolve()) and path.name != ".."
        if path != self.path and not inside:
            raise UserError(
                f"{path} lies outside of {self.path}: it is left alone.\nA record or link was not written by saeflow."
            )
        self.storage.remove(path)
