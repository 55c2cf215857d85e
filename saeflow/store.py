"""Artefacts on disk: immutable parts, their records, and generations switched atomically.

The bytes are specified in data/README.md. Everything is written under `tmp/`, flushed to the disk and
renamed into place, so that a kill or a power cut leaves either nothing or a finished part.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from filelock import FileLock, Timeout
from pydantic import BaseModel

from saeflow.config import FORMAT_VERSION, Recipe, UserError
from saeflow.disk import checksum, flush_tree, human_bytes, read_json, rename, replacing, write_json

Kind = Literal["tokens", "activations", "saes", "features"]
_Record = TypeVar("_Record", bound=BaseModel)
KINDS: tuple[Kind, ...] = ("tokens", "activations", "saes", "features")


class FileRecord(BaseModel, frozen=True):
    """One file of a part: path inside it, size, and the 128-bit xxh3 checksum of its bytes."""

    name: str
    n_bytes: int
    checksum: str


class PartRecord(BaseModel, frozen=True):
    """What part.json says: enough to find, count and verify the part without opening its arrays."""

    format_version: int = FORMAT_VERSION
    index: int
    counts: dict[str, int]
    files: list[FileRecord]

    @property
    def folder(self) -> str:
        """`<index>-<hash>`: equal content has an equal name."""
        facts = json.dumps([self.counts, [(f.name, f.checksum) for f in self.files]], sort_keys=True)
        return f"{self.index:06d}-{xxhash.xxh3_64_hexdigest(facts.encode())[:8]}"

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


class ArtefactRecord(BaseModel, frozen=True):
    """What artefact.json says: identity, the facts behind the fingerprint, and the artefacts read."""

    format_version: int = FORMAT_VERSION
    kind: Kind
    name: str
    fp: str
    facts: dict[str, Any]
    inputs: list[str] = []
    files: list[FileRecord] = []


@dataclass(frozen=True)
class Generation:
    """The list of parts that readers see, in index order."""

    number: int
    parts: tuple[PartRecord, ...]

    def total(self, count: str) -> int:
        return sum(part.counts.get(count, 0) for part in self.parts)


@dataclass(frozen=True)
class Job:
    """Work cut into parts: the indices still missing, and how to make one of them."""

    missing: list[int]
    work: Callable[[int], PartRecord]


@dataclass(frozen=True)
class Artefact:
    """A folder `<kind>/<name>-<fp>` of a store; it may not exist yet."""

    root: Path
    kind: Kind
    name: str
    fp: str
    made: dict[int, PartRecord] = field(default_factory=dict, compare=False, repr=False)
    """Parts that this object has finished, by index."""

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}-{self.fp}"

    @property
    def path(self) -> Path:
        return self.root / self.kind / f"{self.name}-{self.fp}"

    @cached_property
    def record(self) -> ArtefactRecord:
        return _read_record(self.path / "artefact.json", ArtefactRecord)

    def exists(self) -> bool:
        return (self.path / "artefact.json").is_file()

    @property
    def work(self) -> Path:
        """Folder for work in progress; emptied when the next writer starts."""
        return self.root / "tmp" / f"{self.kind}-{self.name}-{self.fp}"

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the artefact's lock and clear what a killed run left behind."""
        lock = self.root / "tmp" / "locks" / f"{self.kind}-{self.name}-{self.fp}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, timeout=0):
                shutil.rmtree(self.work, ignore_errors=True)
                yield
                shutil.rmtree(self.work, ignore_errors=True)
        except Timeout:
            raise UserError(
                f"Another run is writing {self.id}. Wait for it to end, then run the command again."
            ) from None

    def begin(self, facts: dict[str, Any], inputs: Iterable[str] = ()) -> None:
        """Create the folder and its artefact.json, once."""
        if self.exists():
            _ = self.record  # refuses a newer format
            return
        (self.path / "parts").mkdir(parents=True, exist_ok=True)
        record = ArtefactRecord(kind=self.kind, name=self.name, fp=self.fp, facts=facts, inputs=list(inputs))
        write_json(self.path / "artefact.json", record.model_dump(mode="json"))

    def part_path(self, part: PartRecord) -> Path:
        return self.path / "parts" / part.folder

    @contextlib.contextmanager
    def new_part(self, index: int, counts: dict[str, int]) -> Iterator[Path]:
        """A folder to fill; on a clean exit it becomes the part, checksummed and flushed to disk.

        `counts` may still be changed inside the block.
        """
        folder = self.work / f"{index:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        record = PartRecord(index=index, counts=dict(sorted(counts.items())), files=_file_records(folder))
        write_json(folder / "part.json", record.model_dump(mode="json"))
        flush_tree(folder)
        for stale in (self.path / "parts").glob(f"{index:06d}-*"):
            shutil.rmtree(stale)
        rename(folder, self.part_path(record))
        self.made[index] = record

    def parts(self) -> dict[int, PartRecord]:
        """Finished parts on disk whose files are all there in their full size."""
        found = {}
        for path in sorted((self.path / "parts").glob("*/part.json")):
            try:
                record = _read_record(path, PartRecord)
            except (Damaged, ValueError):  # the part is made again
                continue
            if not list(missing_files(path.parent, record.files)):
                found[record.index] = record
        return found

    def publish(self, parts: Iterable[PartRecord], provenance: dict[str, Any] | None = None) -> Generation:
        """Show readers these parts from now on; publishing the same list again changes nothing."""
        ordered = tuple(sorted(parts, key=lambda part: part.index))
        current = self.generation()
        if current is not None and current.parts == ordered:
            return current
        number = current.number + 1 if current else 1
        file = self.path / "generations" / f"{number:06d}.parquet"
        table = pa.table(
            {
                "part_index": [part.index for part in ordered],
                "folder": [part.folder for part in ordered],
                "n_bytes": pa.array([part.n_bytes for part in ordered], pa.int64()),
                "record": [part.model_dump_json() for part in ordered],
            }
        )
        with replacing(file) as temporary:
            pq.write_table(table, temporary)
        write_provenance(self.path, provenance or {})
        manifest = {"format_version": FORMAT_VERSION, "generation": number, "checksum": checksum(file)}
        write_json(self.path / "manifest.json", manifest)
        return Generation(number, ordered)

    def generation(self) -> Generation | None:
        """The published list of parts, or None while nothing is published."""
        path = self.path / "manifest.json"
        if not path.is_file():
            return None
        manifest = _read_checked(path)
        number = int(manifest["generation"])
        file = self.path / "generations" / f"{number:06d}.parquet"
        if not file.is_file() or checksum(file) != manifest["checksum"]:
            raise _damaged(file, path)
        records = pq.read_table(file, columns=["record"]).column("record").to_pylist()
        return Generation(number, tuple(PartRecord.model_validate_json(record) for record in records))

    def published(self) -> Generation:
        generation = self.generation()
        if generation is None:
            raise UserError(f"{self.id} is not finished. Run the stage that makes it: `saeflow run RECIPE`.")
        return generation

    @contextlib.contextmanager
    def whole(self, facts: dict[str, Any], inputs: Iterable[str], provenance: dict[str, Any]) -> Iterator[Path]:
        """A folder that becomes the artefact in one rename: for artefacts without parts."""
        folder = self.work / "whole"
        folder.mkdir(parents=True)
        yield folder
        files = _file_records(folder)
        record = ArtefactRecord(
            kind=self.kind, name=self.name, fp=self.fp, facts=facts, inputs=list(inputs), files=files
        )
        write_json(folder / "artefact.json", record.model_dump(mode="json"))
        write_provenance(folder, provenance)
        flush_tree(folder)
        if self.path.exists():  # damaged: the caller found files missing
            shutil.rmtree(self.path)
        rename(folder, self.path)

    def complete(self) -> bool:
        """Is an artefact without parts there, with all its files?"""
        return self.exists() and not list(missing_files(self.path, self.record.files))

    def damage(self, full: bool) -> Iterator[tuple[Path, str]]:
        """Each damaged folder and what is wrong with it; `full` reads every byte."""
        generation = self.generation()
        folders = [(self.path, self.record.files)]
        folders += [(self.part_path(part), part.files) for part in (generation.parts if generation else ())]
        for folder, files in folders:
            for problem in missing_files(folder, files, full):
                yield folder, problem


@dataclass(frozen=True)
class Store:
    """A folder of artefacts."""

    root: Path

    @classmethod
    def create(cls, root: str | Path) -> Store:
        """Open for writing, making the folder if needed. Raises UserError where that cannot be."""
        store = cls(Path(root).absolute())
        try:
            (store.root / "tmp").mkdir(parents=True, exist_ok=True)
            probe = store.root / "tmp" / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"The store {store.root} cannot be written: {error.strerror}.\n"
                "Choose another folder with --store or SAEFLOW_STORE, or change its permissions."
            ) from error
        marker = store.root / "store.json"
        if not marker.exists():
            write_json(marker, {"format_version": FORMAT_VERSION})
        _read_checked(marker)
        return store

    @classmethod
    def open(cls, root: str | Path) -> Store:
        """Open for reading. Raises UserError where there is no store."""
        store = cls(Path(root).absolute())
        if not (store.root / "store.json").is_file():
            raise UserError(
                f"No store at {store.root}. Name one with --store or SAEFLOW_STORE, or make one: `saeflow run RECIPE`."
            )
        _read_checked(store.root / "store.json")
        return store

    def artefact(self, kind: Kind, name: str, fp: str) -> Artefact:
        return Artefact(self.root, kind, name, fp)

    def by_id(self, id: str) -> Artefact:
        kind, _, folder = id.partition("/")
        name, _, fp = folder.rpartition("-")
        return Artefact(self.root, kind, name, fp)  # type: ignore[arg-type]

    def artefacts(self, *kinds: Kind) -> list[Artefact]:
        """Existing artefacts, by kind and name, the newest last among equal names."""
        found = []
        for kind in kinds or KINDS:
            paths = sorted((self.root / kind).glob("*/artefact.json"), key=lambda p: (p.stat().st_mtime_ns, p))
            found += [self.by_id(f"{kind}/{path.parent.name}") for path in paths]
        return found

    def require_free(self, n_bytes: int, purpose: str) -> None:
        """Refuse to start work that the disk cannot hold."""
        free = shutil.disk_usage(self.root).free
        if n_bytes > free:
            raise UserError(
                f"{purpose} needs about {human_bytes(n_bytes)}, but {self.root} has {human_bytes(free)} free.\n"
                "Free some space, choose another disk with --store, or read fewer documents or sites."
            )


def store_path(option: str | None, recipe: Recipe | None = None) -> Path:
    """`--store`, then SAEFLOW_STORE, then the recipe, then data/store."""
    return Path(option or os.environ.get("SAEFLOW_STORE") or (recipe.store if recipe else None) or "data/store")


def missing_files(folder: Path, files: Iterable[FileRecord], full: bool = False) -> Iterator[str]:
    """What is wrong with the recorded files: missing, of another size, or (`full`) of other content."""
    for file in files:
        path = folder / file.name
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != file.n_bytes:
            yield f"{path} has {path.stat().st_size} bytes instead of {file.n_bytes}"
        elif full and checksum(path) != file.checksum:
            yield f"{path} has changed since it was written"


def write_provenance(folder: Path, facts: dict[str, Any]) -> None:
    """When, where and with what: the one file in which two equal runs may differ."""
    packages = ["saeflow", "torch", "transformers", "zarr", "duckdb", "pyarrow", "numpy"]
    about = {"host": platform.node(), "written": time.time(), "versions": {p: _version(p) for p in packages}}
    write_json(folder / "provenance.json", about | facts)


def _version(package: str) -> str | None:
    with contextlib.suppress(Exception):
        return version(package)
    return None


def _read_checked(path: Path) -> Any:
    try:
        data = read_json(path)
    except ValueError as error:
        raise _damaged(path, path) from error
    found = data.get("format_version", 0)
    if found > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {found}; this saeflow reads up to {FORMAT_VERSION}.\n"
            "It was written by a newer saeflow: upgrade with `pip install --upgrade saeflow`."
        )
    return data


class Damaged(UserError):
    """A record of the store that cannot be read."""


def _damaged(what: Path, remove: Path) -> Damaged:
    return Damaged(f"{what} is missing or damaged. Remove {remove} and run the recipe again: finished parts are kept.")


def _read_record(path: Path, model: type[_Record]) -> _Record:
    return model.model_validate(_read_checked(path))


def _file_records(folder: Path) -> list[FileRecord]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        FileRecord(name=path.relative_to(folder).as_posix(), n_bytes=path.stat().st_size, checksum=checksum(path))
        for path in paths
    ]
