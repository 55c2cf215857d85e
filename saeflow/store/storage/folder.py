"""What every storage of a store can do, and the folder. Nothing above `store/` knows which storage a store has.

Files are named by their path below `root`, a folder of this machine. A `Folder` keeps them there: on a local disk, or a
file system that several machines share. For a `Bucket` that folder stands for the objects: it holds the records, and
the tables that were asked for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

from saeflow.store.files import MANY, Bytes, FileBytes, checksum, flush_tree, rename, write_bytes
from saeflow.store.lease import Hold
from saeflow.store.lease_slot import FileSlot, Slot
from saeflow.store.links import Linked, is_file, is_folder, keep_inside, read_bytes, remove, sizes_below, unlinked
from saeflow.store.records import FileRecord, Generation, PartRecord
from saeflow.store.storage.traffic import Traffic, bytes_read_here
from saeflow.store.storage.work import Work

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


DAMAGED = "damaged"
"""Folder of a store for what repair has taken out. Nothing reads or removes it; a person may."""


class SmallFiles(ABC):
    """Files of a store that are replaced as a whole: records, lists of parts, and labels.

    A bucket has no locks, so it compares tags. A caller keeps the tag with the content that it read, because other
    threads of the process read the same file meanwhile.
    """

    @abstractmethod
    def read(self, path: Path) -> tuple[bytes, str | None]:
        """Return what a file holds now, and its tag. Raises FileNotFoundError."""

    def tag(self, path: Path) -> str | None:
        """Return the tag of a record as it is on this machine; None if the storage never had it so, or has no tags."""
        return None

    @abstractmethod
    def put_new(self, path: Path, content: bytes) -> bool:
        """Store a file. A bucket stores nothing and returns False if another file has the name."""

    @abstractmethod
    def put_if_unchanged(self, path: Path, content: bytes, tag: str | None) -> None:
        """Replace a file if it still has the tag that came with what was read; None: if there is no file.

        Raises UserError if somebody was quicker, or if the storage cannot compare.
        """


class Storage(SmallFiles):
    """The files of one store, as one process has opened it."""

    n_readers: ClassVar[int]
    """Files to read at once so that the storage is kept busy."""
    has_locks: ClassVar[bool]
    """True if nobody else publishes inside a slot's `guard`. Otherwise records are compared as they are replaced."""
    asks_a_server: ClassVar[bool]
    """True if a look into a small file is a request over the network."""
    n_query_threads: ClassVar[int | None] = None
    """Threads that DuckDB reads with; None for as many as there are processors."""
    duckdb_needs: ClassVar[tuple[str, ...]] = ()
    """Lines that say what a DuckDB shell needs before it reads the store's files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        keep_inside(root)
        self.holds: defaultdict[str, list[Hold]] = defaultdict(list)
        """Leases that this process holds, by artefact: every object of an artefact shares them."""
        self.lists: WeakValueDictionary[tuple[str, int, str], Generation] = WeakValueDictionary()
        """Lists of parts that are in use, by artefact, number and checksum: a long one takes seconds to read."""
        self.work = Work(root)
        self._slots: dict[Path, Slot] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and other.root == self.root

    def __hash__(self) -> int:
        return hash(self.root)

    @property
    def name(self) -> str:
        """What `--store` calls the store: its path or URL."""
        return str(self.root)

    def location(self, path: Path) -> str:
        """Return what anybody can call a file: its path or URL."""
        return str(path)

    def shell_name(self, path: Path) -> str:
        """Return what a shell on this machine calls a file."""
        return str(path)

    def pull(self) -> None:
        """Bring the records of every artefact here as they are now."""

    def pull_one(self, folder: Path) -> None:
        """Bring the records of one artefact, whose lease the caller holds, here; drop what a killed run never sent."""

    def list_again(self) -> None:
        """See from now on what other machines have written and removed."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Return the bytes of a file; None if it is missing. Cheap: a store has millions of files."""

    def sizes(self, folder: str, names: Sequence[str]) -> list[int | None]:
        """Return the bytes of each file below a folder; None if it is missing."""
        return [self.size(f"{folder}/{name}") for name in names]

    def confirmed(self, folder: str, parts: Sequence[PartRecord]) -> list[bool]:
        """Return True for parts below a folder that are there with their files; False for those to be looked at."""
        return [False] * len(parts)

    def written(self, folder: str, parts: Sequence[PartRecord]) -> list[bool]:
        """Return True for parts below a folder whose records have the bytes that were written, as `confirmed` does."""
        return [False] * len(parts)

    @abstractmethod
    def checksum(self, path: Path) -> str:
        """Return the xxh3_128 of a file as it is stored now."""

    @abstractmethod
    def footprint(self, path: Path) -> tuple[int, float]:
        """Return the bytes of a file, or of all below a folder, and when it was last written, in seconds since 1970."""

    @abstractmethod
    def names_below(self, folder: Path) -> set[str]:
        """Return the names of all files below a folder, relative to it."""

    @abstractmethod
    def versions(self, folder: Path) -> dict[str, object]:
        """Return for each file below a folder, by any name, something that changes with its content."""

    def names_in(self, folder: Path) -> set[str]:
        """Return the names of files and folders right below a folder."""
        return {name.partition("/")[0] for name in self.names_below(folder)}

    def names_here(self, folder: Path) -> set[str]:
        """Return the names right below a folder of this machine; none if it is missing. Raises OSError if refused."""
        try:
            return set(os.listdir(unlinked(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def free_bytes(self) -> int | None:
        """Return the free space; None if the storage tells nobody."""
        return None

    def fetch(self, path: Path, fresh: bool = False) -> Path:
        """Return the path of a file, after bringing it here if it is not, or anew. May raise FileNotFoundError."""
        return unlinked(path)

    def fetch_recorded(self, path: Path, files: Callable[[], Iterable[FileRecord]]) -> Path:
        """Return the path of a file that is here in the size that its record, among `files`, says.

        Raises Damaged if the storage gives another file than was recorded. A missing file is left to its reader.
        """
        return unlinked(path)

    @abstractmethod
    def open(self, path: Path) -> Bytes:
        """Open a file to read ranges of it. Raises FileNotFoundError."""

    @abstractmethod
    def zarr(self, path: Path) -> Any:
        """Return an array as zarr opens it."""

    @property
    def filesystem(self) -> Any:
        """The fsspec filesystem that reads the store's files by their locations; None for local files."""
        return None

    def register(self, connection: DuckDBPyConnection) -> None:
        """Let a DuckDB connection read the store's files by their locations."""

    def note_recorded(self, folder: Path, files: Iterable[FileRecord]) -> None:
        """Remember what published files in a folder hold, so that nobody has to ask the storage for it."""

    def look_once(self, what: str, look: Callable[[], None]) -> None:
        """Look at published files, which never change; `look` raises if something is wrong with them.

        `what` names them as they are now. A bucket is looked at once a machine, because a look lists it.
        """
        look()

    @abstractmethod
    def traffic(self) -> Traffic:
        """Return what was read since the storage was opened; of a folder: all files that this process has read."""

    def send(self, *paths: Path) -> None:
        """Store files that were written below `root`."""

    @abstractmethod
    def put_part(
        self, folder: Path, target: Path, names: Iterable[str], is_whole: Callable[[], bool], keep: bool
    ) -> None:
        """Make a filled work folder the part `target`, its record last. `is_whole`: asks whether an equal part is
        there.

        `keep`: the files are small and soon read again, so they stay on this machine.
        """

    @abstractmethod
    def copy_part(self, source: Path, target: Path, work: Path, record: str) -> None:
        """Make a part `target` with the files of `source`, which are not written again, and another record.

        `work` is a folder of work in progress that is not there yet.
        """

    @abstractmethod
    def put_whole(
        self, folder: Path, target: Path, names: Iterable[str], last: str, require_lease: Callable[[], None]
    ) -> bool:
        """Make a filled folder the artefact `target`, the file `last` after the others. Files of others are kept.

        Return False if another file has one of the names.
        """

    @abstractmethod
    def set_aside(self, path: Path) -> Path | None:
        """Move a file or folder into `damaged/`, where nothing removes it. Return its new place, None if it is gone."""

    def aside(self, path: Path) -> Path:
        """Return a place in `damaged/` that no other file has had."""
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        return self.root / DAMAGED / now / path.relative_to(self.root)

    @abstractmethod
    def remove(self, path: Path) -> None:
        """Remove a file or folder, wherever it is."""

    @abstractmethod
    def new_slot(self, path: Path) -> Slot:
        """Return a place for a lease."""

    def slot(self, name: str) -> Slot:
        """Return the place of the lease of this name: one object, which remembers since when the lease is unchanged."""
        path = self._lease_path(name)
        return self._slots.setdefault(path, self.new_slot(path))

    def locked(self, name: str, seconds: float = 60) -> contextlib.AbstractContextManager[None]:
        """Keep other processes of this machine out of the block. Raises UserError if one stays in it."""
        return FileSlot(self._lease_path(name)).guard(seconds)

    def _lease_path(self, name: str) -> Path:
        return self.root / "tmp" / "locks" / f"{name}.lease"


class Folder(Storage):
    """Files lie where their paths say. Others see what is written at once, so there is nothing to send or to pull."""

    n_readers = 2
    has_locks = True
    asks_a_server = False

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._at_first = Traffic({}, bytes_read_here())

    def traffic(self) -> Traffic:
        return Traffic({}, bytes_read_here()) - self._at_first

    def size(self, path: str) -> int | None:
        """A link is missing."""
        return os.lstat(path).st_size if is_file(path) else None

    def sizes(self, folder: str, names: Sequence[str]) -> list[int | None]:
        return sizes_below(folder, names)

    def confirmed(self, folder: str, parts: Sequence[PartRecord]) -> list[bool]:
        return _looks().confirmed(folder, parts) if self._are_many(folder, parts) else super().confirmed(folder, parts)

    def written(self, folder: str, parts: Sequence[PartRecord]) -> list[bool]:
        return _looks().written(folder, parts) if self._are_many(folder, parts) else super().written(folder, parts)

    def _are_many(self, folder: str, parts: Sequence[PartRecord]) -> bool:
        return len(parts) >= MANY and is_folder(folder) and _looks().HAS_STATX

    def checksum(self, path: Path) -> str:
        return checksum(path)

    def footprint(self, path: Path) -> tuple[int, float]:
        inside = [unlinked(path), *path.rglob("*")]
        return sum(each.lstat().st_size for each in inside if is_file(each)), path.stat().st_mtime

    def names_below(self, folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in unlinked(folder).rglob("*") if is_file(path)}

    def versions(self, folder: Path) -> dict[str, object]:
        found: dict[str, object] = {}
        for name in self.names_below(folder):
            with contextlib.suppress(FileNotFoundError):
                found[name] = (folder / name).lstat().st_mtime_ns
        return found

    def names_in(self, folder: Path) -> set[str]:
        return self.names_here(folder)

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self.root).free

    def open(self, path: Path) -> FileBytes:
        return FileBytes(path)

    def zarr(self, path: Path) -> Any:
        if any(each.is_symlink() for each in unlinked(path).rglob("*")):
            raise Linked(f"{path} holds a link. saeflow makes none: verify the store, or do not use it.")
        return path

    def put_part(
        self, folder: Path, target: Path, names: Iterable[str], is_whole: Callable[[], bool], keep: bool
    ) -> None:
        """What is there under the name that the content gives is equal, or damaged."""
        flush_tree(folder)
        if target.exists() and is_whole():
            remove(folder)
            return
        remove(target)
        try:
            rename(folder, target)
        except OSError:  # another attempt at the same part was quicker
            if not is_whole():
                raise
            remove(folder)

    def copy_part(self, source: Path, target: Path, work: Path, record: str) -> None:
        shutil.copytree(unlinked(source), work, symlinks=True, copy_function=os.link)
        write_bytes(work / "part.json", record.encode())
        flush_tree(work)
        remove(target)
        rename(work, target)

    def put_whole(
        self, folder: Path, target: Path, names: Iterable[str], last: str, require_lease: Callable[[], None]
    ) -> bool:
        rename(folder, target)
        return True

    def read(self, path: Path) -> tuple[bytes, str | None]:
        return read_bytes(path), None

    def put_new(self, path: Path, content: bytes) -> bool:
        self.put_if_unchanged(path, content, None)
        return True

    def put_if_unchanged(self, path: Path, content: bytes, tag: str | None) -> None:
        """Replace a file. The caller's lock keeps others away."""
        write_bytes(path, content)

    def set_aside(self, path: Path) -> Path | None:
        if not os.path.lexists(path):
            return None
        target = self.aside(path)
        rename(path, target)
        return target

    def remove(self, path: Path) -> None:
        remove(path)

    def new_slot(self, path: Path) -> Slot:
        return FileSlot(path)


def _looks() -> ModuleType:
    from saeflow.store import looks  # takes half a second: only where there are many parts

    return looks
