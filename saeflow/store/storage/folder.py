"""A store in a folder: a local disk, or a file system that several machines share."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeflow.store.files import FileBytes, checksum, flush_tree, remove, rename, replacing
from saeflow.store.lease_slot import FileSlot, Slot
from saeflow.store.records import FileRecord
from saeflow.store.storage.interface import Storage

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


class Folder(Storage):
    """Files lie where their paths say. Others see what is written at once, so there is nothing to send or to pull."""

    n_readers = 2
    has_locks = True
    asks_a_server = False

    @property
    def name(self) -> str:
        return str(self.root)

    def location(self, path: Path) -> str:
        return str(path)

    def shell_name(self, path: Path) -> str:
        return str(path)

    def pull(self) -> None:
        pass

    def pull_one(self, folder: Path) -> None:
        pass

    def list_again(self) -> None:
        pass

    def size(self, path: str) -> int | None:
        try:
            about = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return about.st_size if stat.S_ISREG(about.st_mode) else None

    def checksum(self, path: Path) -> str:
        return checksum(path)

    def footprint(self, path: Path) -> tuple[int, float]:
        inside = [path, *path.rglob("*")]
        return sum(each.stat().st_size for each in inside if each.is_file()), path.stat().st_mtime

    def names_below(self, folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    def names_in(self, folder: Path) -> set[str]:
        with contextlib.suppress(FileNotFoundError):
            return {entry.name for entry in os.scandir(folder)}
        return set()

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self.root).free

    def fetch(self, path: Path, fresh: bool = False) -> Path:
        return path

    def fetch_recorded(self, path: Path, files: Callable[[], Iterable[FileRecord]]) -> Path:
        return path

    def open(self, path: Path) -> FileBytes:
        return FileBytes(path)

    def zarr(self, path: Path) -> Any:
        return path

    def register(self, connection: DuckDBPyConnection) -> None:
        pass

    def send(self, *paths: Path) -> None:
        pass

    def put_part(
        self, folder: Path, target: Path, names: Iterable[str], is_whole: Callable[[], bool], keep: bool
    ) -> None:
        """What is there under the name that the content gives is equal, or damaged."""
        flush_tree(folder)
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

    def put_whole(
        self, folder: Path, target: Path, names: Iterable[str], last: str, require_lease: Callable[[], None]
    ) -> bool:
        rename(folder, target)
        return True

    def put_new(self, path: Path) -> bool:
        return True

    def put_if_unchanged(self, path: Path, content: bytes) -> None:
        """Replace a record. The caller's lock keeps others away."""
        with replacing(path) as temporary:
            temporary.write_bytes(content)

    def remove(self, path: Path) -> None:
        remove(path)

    def keep(self, folder: Path, number: int, last: str) -> None:
        pass

    def bring_back(self, folder: Path, last: str) -> None:
        pass

    def new_slot(self, path: Path) -> Slot:
        return FileSlot(path)
