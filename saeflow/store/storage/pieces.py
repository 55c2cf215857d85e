"""Ranges of published files in a bucket, read with few requests.

A small file is read whole, at one request; of a larger one its end, where Parquet has its footer. Both are kept in
memory, and those of recorded files on this machine. Other ranges are read as they are asked for.

Files that no record names, such as labels, may be replaced at any time. What is kept of one is named by the tag that
the last look at the bucket found, so it ends with that look.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass

import xxhash

from saeflow.store.records import FileRecord, damaged
from saeflow.store.storage.local_copy import Listings
from saeflow.store.storage.objects import Objects
from saeflow.store.storage.piece_cache import PieceCache

WHOLE_BYTES = 2 << 20
"""Bytes of the largest file that is read whole: about what a server sends in the time that a request takes."""

LEAST_TAIL, _MOST_TAIL, _TAIL_SHARE = 64 << 10, 1 << 20, 512
"""Bytes read at the end of larger files: a footer takes about a 700th of a file of values."""

_IN_MEMORY = 64 << 20


def kept_range(n_bytes: int) -> tuple[int, int]:
    """Return the start and end of what is kept of a file of so many bytes."""
    if n_bytes <= WHOLE_BYTES:
        return 0, n_bytes
    return n_bytes - min(max(n_bytes // _TAIL_SHARE, LEAST_TAIL), _MOST_TAIL), n_bytes


@dataclass(frozen=True)
class FileVersion:
    """A file of a bucket with one content."""

    key: str
    n_bytes: int
    content: str
    """The checksum of a recorded file; else the tag."""
    record: FileRecord | None = None


class Pieces:
    """Reads files of a bucket by key. Safe to use from several threads."""

    def __init__(self, objects: Objects, listings: Listings, cache: PieceCache) -> None:
        self.objects, self.listings, self.cache = objects, listings, cache
        self.recorded: dict[str, FileRecord] = {}
        """Published files by key. Their sizes need not be asked for, and their pieces are kept on this machine."""
        self._held: OrderedDict[str, bytes] = OrderedDict()
        """Pieces by name."""
        self._held_bytes = 0
        self._lock = threading.Lock()
        self._turns = [threading.Lock() for _ in range(256)]

    def version(self, key: str) -> FileVersion:
        """Return a file as it is now. Raises FileNotFoundError if the bucket has to be asked and has none."""
        if record := self.recorded.get(key):
            return FileVersion(key, record.n_bytes, record.checksum, record)
        found = self.listings.about(key)
        return FileVersion(key, found.n_bytes, found.tag)

    def read(self, file: FileVersion, start: int, n_bytes: int) -> bytes:
        """Return bytes of a file, fewer at its end."""
        stop = min(start + n_bytes, file.n_bytes)
        first, last = kept_range(file.n_bytes)
        if start >= first:
            return self._kept(file, first, last)[start - first : stop - first]
        return self._fetched(file.key, start, stop)

    def _kept(self, file: FileVersion, start: int, stop: int) -> bytes:
        """Return a piece from memory, from this machine, or from the bucket. Threads that want the same wait."""
        name = piece_name(self.objects.url, file.key, file.content, start, stop)
        if (held := self._in_memory(name)) is not None:
            return held
        with self._turns[hash(name) % len(self._turns)]:
            if (held := self._in_memory(name)) is not None:
                return held
            if file.record:
                piece = self._found(name, file.key, file.record, start, stop)
            else:
                piece = self._fetched(file.key, start, stop)
            self._hold(name, piece)
            return piece

    def _found(self, name: str, key: str, record: FileRecord, start: int, stop: int) -> bytes:
        """Return a piece of a recorded file. Raises Damaged if the file is not as it was recorded."""
        piece = self.cache.get(name)
        if piece is not None and _fits(record, piece, start, stop):
            self.objects.meter.add_cached(len(piece))
            return piece
        piece = self._fetched(key, start, stop)
        if not _fits(record, piece, start, stop):
            raise damaged(f"{self.objects.url}/{key}")
        self.cache.put(name, piece)
        return piece

    def _fetched(self, key: str, start: int, stop: int) -> bytes:
        return bytes(self.objects.range(key, start, stop - start))

    def _in_memory(self, name: str) -> bytes | None:
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
            return self._held.get(name)

    def _hold(self, name: str, piece: bytes) -> None:
        with self._lock:
            self._held[name] = piece
            self._held_bytes += len(piece)
            while self._held_bytes > _IN_MEMORY:
                self._held_bytes -= len(self._held.popitem(last=False)[1])


def piece_name(*about: object) -> str:
    """Return the name of a piece in the cache."""
    return xxhash.xxh3_128_hexdigest(json.dumps(about).encode())


def _fits(record: FileRecord, piece: bytes, start: int, stop: int) -> bool:
    """True if a piece has its length, and a whole file the checksum of its record."""
    if len(piece) != stop - start:
        return False
    return stop - start < record.n_bytes or xxhash.xxh3_128_hexdigest(piece) == record.checksum
