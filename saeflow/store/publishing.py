"""What readers see of an artefact, and the five guards of a publication. docs/built/publication.md draws them.

lease            `lease`, held by `writing`. Without it two runs do the same work, and each clears the other's folder.
hold             `Storage.holds`: the lease, and the generation that its owner began with. `require_lease` asks for it
                 before a part is put in place, `publishing` before a switch. Without it a run that was halted past its
                 lease goes on for hours, and overwrites its successor.
generation       `publishing` compares the published number with the hold's, under the lock of the lease. Without it a
number           run publishes over another that took the lease, published and ended meanwhile. In a bucket, which has
                 no lock, the list gets a number that nobody used, and the manifest is put only if unchanged. An SAE
                 has no manifest: `publish_folder` never replaces one that is whole.
own work folder  `own_work`, named by the lease's token. Without it a halted run wakes up and writes into the part that
                 its successor makes; the watch sees nothing, for the folder is the same.
watch            `new_part` holds the folder open, and compares it and the names of its files at the end. Without it a
                 part lacks the files written before somebody cleared tmp/.

None is redundant: take one out, and a test of tests/store/test_lease.py or test_store.py fails.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow.parquet as pq
import xxhash

from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.recipe.settings import Overlap
from saeflow.runtime.errors import UserError
from saeflow.store.files import checksum, replacing
from saeflow.store.lease import Hold, hold_lease
from saeflow.store.parts import Parts
from saeflow.store.records import (
    Damaged,
    Generation,
    Hidden,
    PartRecord,
    checked_text,
    damaged,
    generation_table,
    read_checked,
    read_generation,
    write_provenance,
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
                shutil.rmtree(self.work, ignore_errors=True)
                self.recover()
                self.holds[-1].number = self.current_number()
                yield
            finally:
                shutil.rmtree(self.own_work, ignore_errors=True)
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
    def publishing(self) -> Iterator[None]:
        """Keep others from publishing inside the block. Raises UserError if somebody has since this run began."""
        with self.holds[-1].lease.fence() if self.holds else self.slot.guard():
            if any(hold.number != self.current_number() for hold in self.holds[-1:]):
                raise self.overtaken()
            yield
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
        with self.publishing():
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
            self.show(fresh.number)
            if clear and self.storage.has_locks:  # else another machine may be about to publish them; `gc` waits for it
                self._clear_unlisted()
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
        with replacing(self.list_path(generation.number)) as temporary:
            pq.write_table(generation_table(generation), temporary)
        if self.storage.put_new(self.list_path(generation.number)):
            return generation
        return self._write_list(replace(generation, number=generation.number + 1))

    def show(self, number: int) -> None:
        """Switch readers to a generation."""
        about = {"format_version": FORMAT_VERSION, "generation": number, "checksum": checksum(self.list_path(number))}
        self.storage.put_if_unchanged(self.path / "manifest.json", checked_text(about).encode())

    def _clear_unlisted(self) -> None:
        """Remove parts that no generation lists: leftovers of killed runs, which no reader can have open."""
        for folder in self.unlisted_folders():
            shutil.rmtree(folder, ignore_errors=True)

    def recover(self) -> bool:
        """Make a lost or damaged list or manifest again, if what is left allows it.

        Return True if something was done.
        """
        with contextlib.suppress(Damaged):
            if self.generation() is not None or not self.numbers():
                return False
        try:
            manifest = read_checked(self.path / "manifest.json")
        except (Damaged, OSError):
            newest = self.numbers()[-1]
            read_generation(self.list_path(newest), newest)  # an older one would show again what was forgotten since
            self.show(newest)
        else:
            self._recover_list(int(manifest["generation"]), str(manifest["checksum"]))
        return True

    def _recover_list(self, number: int, wanted: str) -> None:
        """Write a list from the records of the parts, if the bytes come out as the manifest says."""
        parts = {part.index: part for part in self.unlisted_parts(None)}
        content = io.BytesIO()
        pq.write_table(generation_table(Generation(number, tuple(parts[i] for i in sorted(parts)))), content)
        if xxhash.xxh3_128_hexdigest(content.getvalue()) != wanted:
            raise damaged(self.list_path(number))
        with replacing(self.list_path(number)) as temporary:
            temporary.write_bytes(content.getvalue())
        self.storage.send(self.list_path(number))
