"""An artefact: begun, published, and guarded while it is published.

docs/built/publication.md draws the five guards (lease, hold, generation number, own work folder, watch on the folder)
with the fault that each is there for. None is redundant: take one out, and a test of tests/store/ fails.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import xxhash

from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.recipe.settings import Overlap
from saeflow.runtime.errors import UserError
from saeflow.store.files import checksum, flush_tree, make_folder, write_bytes
from saeflow.store.lease import Hold, hold_lease
from saeflow.store.links import remove
from saeflow.store.lists import Layout, generation_table, read_generation
from saeflow.store.parts import Parts
from saeflow.store.records import (
    ArtefactRecord,
    Damaged,
    FileRecord,
    Generation,
    Hidden,
    PartRecord,
    checked_text,
    damaged,
    file_record,
    file_records,
    write_provenance,
    write_record,
)


@dataclass(frozen=True)
class Publication(Parts):
    """An artefact's generations: lists of parts of which readers see one, switched in an instant by one writer."""

    overlap: Overlap = field(default="refuse", compare=False, repr=False)
    """What `writing` does if another run holds the lease."""

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the artefact's lease and clear what a killed run left behind.

        Raises UserError if another run has the lease, unless the store waits for others.
        """
        with hold_lease(self.slot, self.id, self.overlap) as lease:
            self.holds.append(Hold(lease, 0))
            try:
                self.read_again(lease.waited)
                remove(self.work)
                self.recover()
                self.holds[-1].number = self.current_number()
                yield
            finally:
                remove(self.own_work)
                with contextlib.suppress(OSError):
                    self.work.rmdir()  # unless another's work is in it
                self.holds.pop()

    def read_again(self, waited: bool) -> None:
        """See the records as they are now: in a bucket others may have published since this process began."""
        if waited:
            self.storage.pull()
        self.storage.pull_one(self.path)
        self.__dict__.pop("record", None)

    @contextlib.contextmanager
    def publishing(self) -> Iterator[str | None]:
        """Keep others from publishing inside the block. Raises UserError if somebody has since this run began.

        Gives the tag of the manifest, which `show` compares. It is taken before the generation is compared: a thread
        that brings a newer manifest in between is then noticed in one place or the other.
        """
        with self.holds[-1].lease.fence() if self.holds else self.slot.guard():
            tag = self._manifest_tag()
            if any(hold.number != self.current_number() for hold in self.holds[-1:]):
                raise self.overtaken()
            yield tag
            for hold in self.holds[-1:]:
                hold.number = self.current_number()

    def overtaken(self) -> UserError:
        return UserError(
            f"Another run has published {self.id} since this one began.\nNothing is lost; run the same command again."
        )

    def publish(
        self,
        parts: Iterable[PartRecord],
        provenance: dict[str, Any] | None = None,
        hidden: Mapping[int, tuple[Hidden, ...]] | None = None,
        clear: bool = True,
    ) -> Generation:
        """Show readers these parts from now on. Publishing the same list again changes nothing.

        `hidden` (default: what is hidden now) is switched in the same instant. `clear` removes folders that no list
        names: set it to False while others of this run make parts that are shown later. Raises UserError if the folder
        of a part that was not shown before is not there.
        """
        ordered = tuple(sorted(parts, key=lambda part: part.index))
        with self.publishing() as tag:
            current = self.generation()
            if hidden is None:
                hidden = current.hidden if current else {}
            if current is not None and (current.parts, current.hidden) == (ordered, hidden):
                return current
            if self.storage.has_locks:
                self._require_folders(ordered, current)
            fresh = Generation(current.number + 1 if current else 1, ordered, hidden)
            write_provenance(self.path, provenance or {})
            self.storage.send(self.path / "provenance.json")
            fresh = self._write_list(fresh)
            self.show(fresh.number, tag)
            if clear and self.storage.has_locks:  # else another machine may be about to publish them; `gc` waits for it
                with contextlib.suppress(Damaged):  # an earlier list: what it named is left to `gc`
                    for folder in self.unlisted_folders():  # left by killed runs: no reader can have them open
                        remove(folder)
            return fresh

    def _require_folders(self, parts: Sequence[PartRecord], current: Generation | None) -> None:
        shown = {part.folder for part in current.parts} if current else set()
        if lost := {part.folder for part in parts} - shown - self.part_folders():
            raise UserError(
                f"Part {min(lost)} of {self.id} is gone since it was made. "
                "Nothing was published; run the same command again."
            )

    def _write_list(self, generation: Generation) -> Generation:
        """Write a generation's list, under a number that nobody else has used."""
        if self.storage.put_new(self.list_path(generation.number), _list_bytes(generation)):
            return generation
        return self._write_list(replace(generation, number=generation.number + 1))

    def _manifest_tag(self) -> str | None:
        return self.storage.tag(self.path / "manifest.json")

    def show(self, number: int, tag: str | None = None) -> None:
        """Switch readers to a generation. `tag` is that of the manifest whose place the new one takes."""
        about = {"format_version": FORMAT_VERSION, "generation": number, "checksum": checksum(self.list_path(number))}
        self.storage.put_if_unchanged(self.path / "manifest.json", checked_text(about).encode(), tag)

    def recover(self) -> bool:
        """Make a lost or damaged list or manifest again, if what is left allows it.

        Return True if something was done.
        """
        tag = self._manifest_tag()
        with contextlib.suppress(Damaged):
            if self.generation() is not None or not self.numbers():
                return False
        try:
            number, wanted = self.manifest()
        except (Damaged, FileNotFoundError):
            newest = self.numbers()[-1]
            read_generation(self.list_path(newest), newest)  # an older one would show again what was forgotten since
            self.show(newest, tag)
        else:
            self._recover_list(number, wanted)
        return True

    def _recover_list(self, number: int, wanted: str) -> None:
        """Write a list from the records of the parts, if the bytes come out as the manifest says."""
        parts = {part.index: part for part in self.unlisted_parts(None)}
        found = Generation(number, tuple(parts[i] for i in sorted(parts)))
        lists = (_list_bytes(found, layout) for layout in get_args(Layout))
        content = next((each for each in lists if xxhash.xxh3_128_hexdigest(each) == wanted), None)
        if content is None:
            raise damaged(self.list_path(number))
        write_bytes(self.list_path(number), content)
        self.storage.send(self.list_path(number))


def _list_bytes(generation: Generation, layout: Layout = "columns") -> bytes:
    content = io.BytesIO()
    pq.write_table(generation_table(generation, layout), content)
    return content.getvalue()


@dataclass(frozen=True)
class Artefact(Publication):
    """An artefact of a store, which may not exist yet: what the stages read and publish."""

    def create(self, facts: dict[str, Any], inputs: Iterable[str] = (), files: Iterable[str] = ()) -> None:
        """Create the folder and its artefact.json, once. `files` lie in the folder already."""
        if self.exists():
            _ = self.record  # refuses a newer format
            return
        make_folder(self.path / "parts")
        paths = [self.path / name for name in files]
        record = self._described(facts, inputs, [file_record(self.path, path) for path in paths])
        with self.publishing():
            write_record(self.path / "artefact.json", record)
            self.storage.send(*paths)
            self.storage.send(self.path / "artefact.json")

    def _described(self, facts: dict[str, Any], inputs: Iterable[str], files: list[FileRecord]) -> ArtefactRecord:
        return ArtefactRecord(kind=self.kind, name=self.name, fp=self.fp, facts=facts, inputs=list(inputs), files=files)

    def add_files(self, names: Iterable[str]) -> None:
        """Name further files of the artefact's folder in its record; not in a record of an earlier format.

        `saeflow upgrade` writes those anew.
        """
        if self.record.format_version < FORMAT_VERSION:
            return
        paths = [self.path / name for name in names]
        fresh = [file_record(self.path, path) for path in paths]
        files = {file.name: file for file in (*self.record.files, *fresh)}
        self._describe_again(self.record.model_copy(update={"files": list(files.values())}), paths)

    def add_facts(self, facts: dict[str, Any]) -> None:
        """Add facts that are no part of the fingerprint to the record; not to a record of an earlier format."""
        if self.record.format_version == FORMAT_VERSION:
            self._describe_again(self.record.model_copy(update={"facts": self.record.facts | facts}))

    def take_format(self) -> None:
        """Write the record again in the format of this saeflow."""
        self._describe_again(self.record.model_copy(update={"format_version": FORMAT_VERSION}))

    def renew(self) -> None:
        """Write the record again as it is, so that this artefact is the newest of its name."""
        self._describe_again(self.record, force=True)

    def _describe_again(self, record: ArtefactRecord, paths: Sequence[Path] = (), force: bool = False) -> None:
        if record == self.record and not force:
            return
        with self.publishing():
            self.storage.send(*paths)
            write_record(self.path / "artefact.json", record)
            self.storage.send(self.path / "artefact.json")
            self.__dict__["record"] = record

    @contextlib.contextmanager
    def publish_folder(
        self, facts: dict[str, Any], inputs: Iterable[str], provenance: dict[str, Any]
    ) -> Iterator[Path]:
        """Give a folder that becomes the artefact in one rename: for artefacts without parts.

        Raises UserError if another run has published the artefact meanwhile.
        """
        folder = self.own_work / "whole"
        folder.mkdir(parents=True)
        yield folder
        files = file_records(folder)
        write_record(folder / "artefact.json", self._described(facts, inputs, files))
        write_provenance(folder, provenance)
        flush_tree(folder)
        with self.publishing():
            self.read_again(waited=False)
            if self.complete():
                raise self.overtaken()
            if self.path.exists() or self.storage.names_below(self.path):  # damaged, or left by a killed run
                self.require_lease()
                (self.set_aside if self.exists() else self.remove)(self.path)
            names = [*(file.name for file in files), "provenance.json"]
            if not self.storage.put_whole(folder, self.path, names, "artefact.json", self.require_lease):
                raise self.overtaken()
            self.__dict__.pop("record", None)


@contextlib.contextmanager
def writing_all(targets: Iterable[Artefact]) -> Iterator[None]:
    """Hold the leases of several artefacts, taken in one order, so that no two runs wait for one another."""
    ordered = sorted(targets, key=lambda each: each.id)
    for target in ordered:
        target.slot.watch()  # so that leases of a dead machine lapse at the same time, not one after the other
    with contextlib.ExitStack() as stack:
        for target in ordered:
            stack.enter_context(target.writing())
        yield
