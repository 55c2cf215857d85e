"""An artefact: its identity, its parts, its publication, and the ways in which one is begun and finished.

The bytes are specified in data/README.md. Everything is written under `tmp/`, flushed to the disk and renamed into
place, so that a kill or a power cut leaves either nothing or a finished part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.store.files import flush_tree, make_folder
from saeflow.store.publishing import Publication
from saeflow.store.records import (
    ArtefactRecord,
    FileRecord,
    file_record,
    file_records,
    write_provenance,
    write_record,
)


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
        record = self.record.model_copy(update={"files": list(files.values())})
        if record == self.record:
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
                self.remove(self.path)
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
