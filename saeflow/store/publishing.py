"""What readers see of an artefact, and the five guards that keep it right when several runs write at once.

lease              One writer at a time. Fault: two runs do the same work, or clear each other's work folder. A saving:
what
                   keeps the store right is below.
hold               The lease of this process with the generation number that it began with. Every object of the
artefact in
                   this process shares it, so a part is made, and a list switched, only by who still has the lease.
                   Fault: a run that was suspended past its lease wakes up and publishes over its successor.
generation number  Compared inside the fence, under the lock of the lease. Fault: another run has published and ended in
                   between, so the lease is free or taken back, and says nothing. In a bucket, which has no lock, the
                   manifest is replaced only if it has the tag that was read, and a list never gets a number that was
                   used. An SAE has no manifest: there the whole artefact plays this part, and is never replaced.
own work folder    tmp/<artefact>/<token of the lease>/. Fault: a writer that was thought dead wakes up and writes into
the
                   files of its successor.
watch on it        `new_part` compares the folder's number as it was made with what lies there at the end. Fault:
somebody
                   clears tmp/ while a part is written, so that the part would be published without its first files.

None can be left out. A lease alone is lost between the look and the switch; the number alone lets a run that has lost
the lease finish parts for hours and then refuses it; the number does not see files that are written into another's
part.
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
from saeflow.store.lease import Hold, held
from saeflow.store.parts import Parts
from saeflow.store.records import (
    Damaged,
    Generation,
    Hidden,
    PartRecord,
    checked_text,
    damaged,
    listed,
    read_checked,
    read_listed,
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
        with held(self.slot, self.id, self.overlap) as lease:
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
            pq.write_table(listed(generation), temporary)
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
            read_listed(self.list_path(newest), newest)  # an older one would show again what was forgotten since
            self.show(newest)
        else:
            self._recover_list(int(manifest["generation"]), str(manifest["checksum"]))
        return True

    def _recover_list(self, number: int, wanted: str) -> None:
        """Write a list from the records of the parts, if the bytes come out as the manifest says."""
        parts = {part.index: part for part in self.unlisted_parts(None)}
        content = io.BytesIO()
        pq.write_table(listed(Generation(number, tuple(parts[i] for i in sorted(parts)))), content)
        if xxhash.xxh3_128_hexdigest(content.getvalue()) != wanted:
            raise damaged(self.list_path(number))
        with replacing(self.list_path(number)) as temporary:
            temporary.write_bytes(content.getvalue())
        self.storage.send(self.list_path(number))
