"""Files of a bucket, fetched as DuckDB reads them: an fsspec filesystem whose open files threads may share."""

from __future__ import annotations

import io
import re
import threading
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

from saeflow.store.storage.pieces import FileVersion, Pieces


class BucketFiles(AbstractFileSystem):  # type: ignore[misc]
    """A read-only filesystem, by the URLs of the store. An open file keeps the version that it was opened with."""

    cachable = False

    def __init__(self, url: str, pieces: Pieces) -> None:
        super().__init__()
        self.protocol, _, self._prefix = url.partition("://")
        self.pieces = pieces

    def key(self, path: str) -> str:
        return _path_of_glob(path.partition("://")[2] or path).removeprefix(f"{self._prefix}/")

    def _open(self, path: str, mode: str = "rb", **options: Any) -> _ObjectReader:
        if mode != "rb":
            raise PermissionError(f"{path} is read only")
        return _ObjectReader(self.pieces, self.pieces.version(self.key(path)))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "size": self.pieces.version(self.key(path)).n_bytes, "type": "file"}

    def glob(self, path: str, **options: Any) -> list[str]:
        return [_path_of_glob(path)]

    def modified(self, path: str) -> datetime:
        """Return the moment that DuckDB takes for an unknown one.

        DuckDB then keeps nothing of a file itself: it shows no replaced one, and reads no more than it needs.
        """
        return datetime.fromtimestamp(0, UTC)


class _ObjectReader(io.RawIOBase):
    """An open object. DuckDB's threads share it and call seek, then read, so each thread has its own position."""

    def __init__(self, pieces: Pieces, file: FileVersion) -> None:
        self.pieces, self.file, self._here = pieces, file, threading.local()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(getattr(self._here, "at", 0))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.file.n_bytes}[whence]
        at = base + offset
        self._here.at = at
        return at

    def read(self, n_bytes: int = -1) -> bytes:
        if n_bytes < 0:
            n_bytes = self.file.n_bytes - self.tell()
        found = self.pieces.read(self.file, self.tell(), n_bytes)
        self._here.at = self.tell() + len(found)
        return found


def _path_of_glob(path: str) -> str:
    """Return the one path that matches a glob of bracketed letters."""
    return re.sub(r"\[([*?\[])\]", r"\1", path)
