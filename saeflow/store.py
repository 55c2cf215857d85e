"""Artefacts on disk: immutable parts, their records, and generations switched atomically.

The bytes are specified in data/README.md. Everything is written under `tmp/`, flushed to the disk and
renamed into place, so that a kill or a power cut leaves either nothing or a finished part.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from saeflow.config import FORMAT_VERSION, Recipe, UserError
from saeflow.disk import (
    checksum,
    flush_tree,
    human_bytes,
    json_text,
    make_folder,
    read_json,
    rename,
    replacing,
    write_json,
)
from saeflow.objects import Objects, cache_folder, is_url

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
    inputs: dict[str, str] = {}
    """What the part was made from: the folder of the part read, by kind. Empty in format 1."""

    @property
    def folder(self) -> str:
        """`<index>-<hash>`: equal content has an equal name."""
        facts: list[Any] = [self.counts, [(f.name, f.checksum) for f in self.files]]
        if self.inputs:
            facts.append(self.inputs)
        return f"{self.index:06d}-{xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())[:8]}"

    def made_from(self, inputs: dict[str, str]) -> bool:
        """Is the part what these inputs give? Format 1 did not say; its parts follow from their index."""
        return self.inputs == inputs or (not self.inputs and not inputs.get("hidden"))

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


class Hidden(BaseModel, frozen=True):
    """A document that readers no longer see: forgotten, or replaced by a newer one of the same key."""

    document_id: int
    key_hash: str
    reason: Literal["forgotten", "replaced"]


@dataclass(frozen=True)
class Generation:
    """The list of parts that readers see, in index order, and the documents in them that they do not see."""

    number: int
    parts: tuple[PartRecord, ...]
    hidden: Mapping[int, tuple[Hidden, ...]] = field(default_factory=dict)
    """By index of the part; tokens only."""

    def hidden_digest(self, index: int) -> str:
        """Stands for what is hidden in a part; empty where nothing is."""
        ids = sorted(document.document_id for document in self.hidden.get(index, ()))
        return xxhash.xxh3_64_hexdigest(json.dumps(ids).encode())[:8] if ids else ""

    @property
    def hidden_ids(self) -> list[int]:
        return sorted(document.document_id for each in self.hidden.values() for document in each)

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
    objects: Objects | None = field(default=None, compare=False, repr=False)
    """The object store that the folder stands for, if it does."""
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
        return read_record(self.path / "artefact.json", ArtefactRecord)

    def exists(self) -> bool:
        return (self.path / "artefact.json").is_file()

    @property
    def work(self) -> Path:
        """Folder for work in progress; emptied when the next writer starts."""
        return self.root / "tmp" / f"{self.kind}-{self.name}-{self.fp}"

    @property
    def lock_path(self) -> Path:
        return self.root / "tmp" / "locks" / f"{self.kind}-{self.name}-{self.fp}.lock"

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the artefact's lock and clear what a killed run left behind."""
        self.lock_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.lock_path, timeout=0):
                shutil.rmtree(self.work, ignore_errors=True)
                self.recover()
                yield
                shutil.rmtree(self.work, ignore_errors=True)
        except Timeout:
            raise UserError(
                f"Another run is writing {self.id}. Wait for it to end, then run the command again."
            ) from None

    def begin(self, facts: dict[str, Any], inputs: Iterable[str] = (), files: Iterable[str] = ()) -> None:
        """Create the folder and its artefact.json, once; `files` lie in the folder already."""
        if self.exists():
            _ = self.record  # refuses a newer format
            return
        make_folder(self.path / "parts")
        record = ArtefactRecord(
            kind=self.kind, name=self.name, fp=self.fp, facts=facts, inputs=list(inputs),
            files=[_file_record(self.path, self.path / name) for name in files],
        )  # fmt: skip
        write_record(self.path / "artefact.json", record)
        self.send(*(self.path / name for name in files))
        self.send(self.path / "artefact.json")

    def send(self, *paths: Path) -> None:
        """Bring files of the artefact's own to the object store, where there is one."""
        if self.objects is not None:
            self.objects.send(paths)

    def remove(self, path: Path) -> None:
        """A file or folder of the artefact, wherever it is."""
        if self.objects is not None:
            self.objects.remove(path)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

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
        if self.objects is None or path.is_file():
            return path
        try:
            self.objects.fetch(path)
        except FileNotFoundError:
            return path  # its reader says what is missing
        wanted = [file.checksum for file in files if path.as_posix().endswith(f"/{file.name}")]
        if wanted and checksum(path) not in wanted:
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
        read again, by name.
        """
        folder = self.work / f"{index:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        files = _file_records(folder, checksums or {})
        record = PartRecord(index=index, counts=dict(sorted(counts.items())), files=files, inputs=inputs or {})
        write_record(folder / "part.json", record)
        self._keep(folder, record)
        self.made[index] = record

    def _keep(self, folder: Path, record: PartRecord) -> None:
        """Make a filled folder the part, in one rename or, in an object store, with its record written last."""
        target = self.part_path(record)
        if self.objects is None:
            flush_tree(folder)
            shutil.rmtree(target, ignore_errors=True)  # the same part, damaged
            rename(folder, target)
            return
        self.objects.send([folder / file.name for file in record.files], folder, target)
        self.objects.send([folder / "part.json"], folder, target)
        shutil.rmtree(target, ignore_errors=True)
        if self.kind == "tokens":  # small, and read by every later stage
            rename(folder, target)
        else:
            shutil.rmtree(folder)

    def parts(self, fits: Callable[[PartRecord], bool] = lambda record: True) -> dict[int, PartRecord]:
        """Finished parts on disk that fit and whose files are all there in their full size; published ones first."""
        generation = self.generation()
        found: dict[int, PartRecord] = {}
        for record in itertools.chain(generation.parts if generation else (), self._unlisted(generation)):
            if fits(record) and record.index not in found and not list(self._missing(record)):
                found[record.index] = record
        return found

    def _missing(self, part: PartRecord) -> Iterator[str]:
        yield from self.missing_files(self.part_path(part), part.files)
        if self._size(self.part_path(part) / "part.json") is None:
            yield f"{self.part_path(part) / 'part.json'} is missing"

    def missing_files(self, folder: Path, files: Iterable[FileRecord], full: bool = False) -> Iterator[str]:
        """What is wrong with the recorded files: missing, of another size, or (`full`) of other content."""
        for file in files:
            path = folder / file.name
            n_bytes = self._size(path)
            if n_bytes is None:
                yield f"{path} is missing"
            elif n_bytes != file.n_bytes:
                yield f"{path} has {n_bytes} bytes instead of {file.n_bytes}"
            elif full and (self.objects.checksum(path) if self.objects else checksum(path)) != file.checksum:
                yield f"{path} has changed since it was written"

    def _size(self, path: Path) -> int | None:
        """Bytes of a file of the artefact, None where it is missing."""
        if self.objects is not None:
            found = self.objects.listing(self.path).get(self.objects.key(path))
            return found.n_bytes if found else None
        return path.stat().st_size if path.is_file() else None

    def footprint(self, path: Path) -> tuple[int, float]:
        """Bytes of a file of the artefact, or of all below a folder, and when the newest was written (0: just now)."""
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
    ) -> Generation:
        """Show readers these parts from now on; publishing the same list again changes nothing.

        `hidden` (default: what is hidden now) goes with it, in the same instant.
        """
        ordered = tuple(sorted(parts, key=lambda part: part.index))
        current = self.generation()
        if hidden is None:
            hidden = current.hidden if current else {}
        if current is not None and (current.parts, current.hidden) == (ordered, hidden):
            return current
        fresh = Generation(current.number + 1 if current else 1, ordered, hidden)
        write_provenance(self.path, provenance or {})
        self.send(self.path / "provenance.json")
        fresh = self._write_list(fresh)
        self._show(fresh.number)
        if self.objects is None:  # another machine may be about to publish them; `gc` waits for it
            self._clear_unseen()
        return fresh

    def _write_list(self, generation: Generation) -> Generation:
        """Write a generation's list; in an object store under a number that nobody else has used."""
        with replacing(self.list_path(generation.number)) as temporary:
            pq.write_table(_listed(generation), temporary)
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
        listed = {part.folder for number in self.numbers() for part in self._read_list(number).parts}
        return sorted(self.path / "parts" / name for name in self.part_folders() - listed)

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
        return self._read_list(int(manifest["generation"]))

    def _read_list(self, number: int) -> Generation:
        try:
            rows = pq.read_table(self.list_path(number)).to_pylist()
            parts = tuple(PartRecord.model_validate_json(row["record"]) for row in rows)
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are among these
            raise damaged(self.list_path(number)) from error
        listed = ((part.index, row.get("hidden")) for part, row in zip(parts, rows, strict=True))
        hidden = {index: tuple(Hidden(**each) for each in documents) for index, documents in listed if documents}
        return Generation(number, parts, hidden)

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
        pq.write_table(_listed(Generation(number, tuple(parts[i] for i in sorted(parts)))), content)
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
        """A folder that becomes the artefact in one rename: for artefacts without parts."""
        folder = self.work / "whole"
        folder.mkdir(parents=True)
        yield folder
        files = _file_records(folder)
        record = ArtefactRecord(
            kind=self.kind, name=self.name, fp=self.fp, facts=facts, inputs=list(inputs), files=files
        )
        write_record(folder / "artefact.json", record)
        write_provenance(folder, provenance)
        flush_tree(folder)
        if self.path.exists():  # damaged: the caller found files missing
            self.remove(self.path)
        if self.objects is not None:
            names = [*(file.name for file in files), "provenance.json"]
            self.objects.send([folder / name for name in names], folder, self.path)
            self.objects.send([folder / "artefact.json"], folder, self.path)
        rename(folder, self.path)

    def complete(self) -> bool:
        """Is the artefact there, with all the files of its own?"""
        return self.exists() and not list(self.missing_files(self.path, self.record.files))

    def fetched(self) -> Path:
        """The folder of an artefact without parts, with all its files in it."""
        for file in self.record.files:
            self.own_file(file.name)
        return self.path


@dataclass(frozen=True)
class Store:
    """A folder of artefacts, or one that stands for an object store."""

    root: Path
    objects: Objects | None = field(default=None, compare=False)

    @classmethod
    def at(cls, root: str | Path) -> Store:
        """The store of a folder or URL, with the records as they are now."""
        if not is_url(root):
            return cls(Path(root).absolute())
        objects = Objects(str(root).rstrip("/"), cache_folder(str(root).rstrip("/")))
        objects.pull()
        return cls(objects.root, objects)

    @property
    def name(self) -> str:
        """What `--store` calls it."""
        return self.objects.url if self.objects else str(self.root)

    @classmethod
    def create(cls, root: str | Path) -> Store:
        """Open for writing, making the folder if needed. Raises UserError where that cannot be."""
        store = cls.at(root)
        try:
            make_folder(store.root / "tmp")
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
            write_checked(marker, {"format_version": FORMAT_VERSION})
            store.send(marker)
        read_checked(marker)
        return store

    @classmethod
    def open(cls, root: str | Path) -> Store:
        """Open for reading. Raises UserError where there is no store, or one that cannot be read."""
        store = cls.find(root)
        read_checked(store.root / "store.json")
        return store

    @classmethod
    def find(cls, root: str | Path) -> Store:
        """A store whose marker may be damaged. Raises UserError where there is none."""
        store = cls.at(root)
        if not (store.root / "store.json").is_file() and not any((store.root / kind).is_dir() for kind in KINDS):
            raise UserError(
                f"No store at {store.name}. Name one with --store or SAEFLOW_STORE, or make one: `saeflow run RECIPE`."
            )
        return store

    def send(self, path: Path) -> None:
        if self.objects is not None:
            self.objects.send([path])

    def artefact(self, kind: Kind, name: str, fp: str) -> Artefact:
        return Artefact(self.root, kind, name, fp, self.objects)

    def by_id(self, id: str) -> Artefact:
        kind, _, folder = id.partition("/")
        name, _, fp = folder.rpartition("-")
        return Artefact(self.root, kind, name, fp, self.objects)  # type: ignore[arg-type]

    def artefacts(self, *kinds: Kind) -> list[Artefact]:
        """Existing artefacts, by kind and name, the newest last among equal names."""
        found = []
        for kind in kinds or KINDS:
            paths = sorted((self.root / kind).glob("*/artefact.json"), key=lambda p: (p.stat().st_mtime_ns, p))
            found += [self.by_id(f"{kind}/{path.parent.name}") for path in paths]
        return found

    def require_free(self, n_bytes: int, purpose: str) -> None:
        """Refuse to start work that the disk cannot hold. An object store tells nobody how much it holds."""
        if self.objects is not None:
            return
        free = shutil.disk_usage(self.root).free
        if n_bytes > free:
            raise UserError(
                f"{purpose} needs about {human_bytes(n_bytes)}, but {self.root} has {human_bytes(free)} free.\n"
                "Free some space, choose another disk with --store, or read fewer documents or sites."
            )


def store_path(option: str | None, recipe: Recipe | None = None) -> str:
    """Folder or URL: `--store`, then SAEFLOW_STORE, then the recipe, then data/store."""
    found = option or os.environ.get("SAEFLOW_STORE") or (recipe.store if recipe else None) or "data/store"
    return found.removeprefix("file://")


def note_provenance(folder: Path, facts: dict[str, Any]) -> None:
    """Add to provenance.json, where that is there."""
    with contextlib.suppress(OSError, ValueError):
        write_json(folder / "provenance.json", read_json(folder / "provenance.json") | facts)


def write_provenance(folder: Path, facts: dict[str, Any]) -> None:
    """When, where and with what: the one file in which two equal runs may differ."""
    packages = ["saeflow", "torch", "transformers", "zarr", "duckdb", "pyarrow", "numpy"]
    about = {"host": platform.node(), "written": time.time(), "versions": {p: _version(p) for p in packages}}
    write_json(folder / "provenance.json", about | facts)


def _version(package: str) -> str | None:
    with contextlib.suppress(Exception):
        return version(package)
    return None


def read_checked(path: Path) -> Any:
    """A JSON record; refused where its checksum is wrong or a newer saeflow wrote it."""
    try:
        text = path.read_bytes().decode("utf-8")
        data = json.loads(text)
        version_found = data.get("format_version", 1)
    except (ValueError, AttributeError) as error:
        raise damaged(path) from error
    if isinstance(version_found, int) and version_found > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version_found}; this saeflow reads up to {FORMAT_VERSION}.\n"
            "It was written by a newer saeflow: upgrade with `pip install --upgrade saeflow`."
        )
    if text != json_text(data) or data.pop("sum", None) != (_sum(data) if version_found != 1 else None):
        raise damaged(path)
    return data


def write_checked(path: Path, data: dict[str, Any]) -> None:
    """A JSON record with its own checksum, `sum`."""
    with replacing(path) as temporary:
        temporary.write_text(checked_text(data), "utf-8")


def checked_text(data: dict[str, Any]) -> str:
    return json_text(data | {"sum": _sum(data)})


def _sum(data: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json_text(data).encode())


def read_record(path: Path, model: type[_Record]) -> _Record:
    try:
        return model.model_validate(read_checked(path))
    except ValidationError as error:
        raise damaged(path) from error


def write_record(path: Path, record: BaseModel) -> None:
    write_checked(path, record.model_dump(mode="json"))


class Damaged(UserError):
    """Something of the store that cannot be read."""


def damaged(what: Path) -> Damaged:
    return Damaged(
        f"{what} is missing or damaged. Mend it with `saeflow verify --full --repair`, then run the recipe again: "
        "finished parts are kept."
    )


def _listed(generation: Generation) -> pa.Table:
    """The table of a generation: one row a part."""
    parts = generation.parts
    hidden = [[each.model_dump() for each in generation.hidden.get(part.index, ())] for part in parts]
    document = pa.struct([("document_id", pa.int64()), ("key_hash", pa.string()), ("reason", pa.string())])
    return pa.table(
        {
            "part_index": [part.index for part in parts],
            "folder": [part.folder for part in parts],
            "n_bytes": pa.array([part.n_bytes for part in parts], pa.int64()),
            "record": [part.model_dump_json() for part in parts],
            "hidden": pa.array(hidden, pa.list_(document)),
        }
    )


def _file_records(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> list[FileRecord]:
    return [_file_record(folder, path, known) for path in sorted(folder.rglob("*")) if path.is_file()]


def _file_record(folder: Path, path: Path, known: Mapping[str, str] = MappingProxyType({})) -> FileRecord:
    name = path.relative_to(folder).as_posix()
    return FileRecord(name=name, n_bytes=path.stat().st_size, checksum=known.get(name) or checksum(path))
