"""Files of a bucket, fetched as DuckDB reads them: an fsspec filesystem whose open files threads may share."""

from __future__ import annotations

import io
import re
import threading
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

from saeflow.store.storage.folder import Storage

_CACHED_BYTES, _N_CACHED = 256 << 10, 256
"""Small reads go through a cache of 64 MiB, because DuckDB asks for the ends of Parquet files again and again."""


class BucketFiles(AbstractFileSystem):  # type: ignore[misc]
    """A read-only filesystem. Paths are the store's own URLs, and objects of a published generation never change."""

    cachable = False

    def __init__(self, bucket: Storage) -> None:
        super().__init__()
        self.protocol, _, self._prefix = bucket.name.partition("://")
        self.bucket = bucket
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def key(self, path: str) -> str:
        return _path_of_glob(path.partition("://")[2] or path).removeprefix(f"{self._prefix}/")

    def _open(self, path: str, mode: str = "rb", **options: Any) -> _ObjectReader:
        if mode != "rb":
            raise PermissionError(f"{path} is read only")
        return _ObjectReader(self, self.key(path))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "size": self.size_of(self.key(path)), "type": "file"}

    def glob(self, path: str, **options: Any) -> list[str]:
        return [_path_of_glob(path)]

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(0, UTC)

    def size_of(self, key: str) -> int:
        return self.bucket.open(self.bucket.root / key).n_bytes

    def read(self, key: str, start: int, n_bytes: int) -> bytes:
        stop = min(start + n_bytes, self.size_of(key))
        if stop - start > _CACHED_BYTES:
            return self.bucket.open(self.bucket.root / key).read(start, stop - start)
        numbers = range(start // _CACHED_BYTES, -(-stop // _CACHED_BYTES))
        joined = b"".join(self._block(key, number) for number in numbers)
        return joined[start - numbers.start * _CACHED_BYTES :][: max(stop - start, 0)]

    def _block(self, key: str, number: int) -> bytes:
        with self._lock:
            if (key, number) in self._blocks:
                self._blocks.move_to_end((key, number))
                return self._blocks[key, number]
        found = self.bucket.open(self.bucket.root / key).read(number * _CACHED_BYTES, _CACHED_BYTES)
        with self._lock:
            self._blocks[key, number] = found
            while len(self._blocks) > _N_CACHED:
                self._blocks.popitem(last=False)
        return found


class _ObjectReader(io.RawIOBase):
    """An open object. DuckDB's threads share it and call seek, then read, so each thread has its own position."""

    def __init__(self, files: BucketFiles, key: str) -> None:
        self.files, self.key, self._here = files, key, threading.local()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(getattr(self._here, "at", 0))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.files.size_of(self.key)}[whence]
        at = base + offset
        self._here.at = at
        return at

    def read(self, n_bytes: int = -1) -> bytes:
        if n_bytes < 0:
            n_bytes = self.files.size_of(self.key) - self.tell()
        found = self.files.read(self.key, self.tell(), n_bytes)
        self._here.at = self.tell() + len(found)
        return found


def _path_of_glob(path: str) -> str:
    """Return the one path that matches a glob of bracketed letters."""
    return re.sub(r"\[([*?\[])\]", r"\1", path)
