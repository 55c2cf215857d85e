"""A cache on this machine for pieces of published files: their footers, and whole small tables.

Each piece is a file of its own, named by what it belongs to, with the checksum of its bytes in front. Several processes
may use the cache at once, a process may be killed, and the folder may be deleted at any time. A piece that another user
may have written is not there.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import xxhash
from pydantic import ByteSize, TypeAdapter, ValidationError

from saeflow.runtime.errors import UserError
from saeflow.store.user_cache import is_foreign, make_private

LIMIT = "SAEFLOW_CACHE_BYTES"
_USUAL_LIMIT = "1GiB"
_DIGEST_BYTES = 16
_LOOKS = 16
"""A process measures the cache whenever it has added a sixteenth of the limit; other processes add meanwhile."""


def cache_limit() -> int:
    """Return the bytes that the cache may take. Raises UserError if the environment says nonsense."""
    said = os.environ.get(LIMIT) or _USUAL_LIMIT
    try:
        return int(TypeAdapter(ByteSize).validate_python(said))
    except ValidationError:
        raise UserError(f"{LIMIT} is {said!r}, but it must be a size such as 500MB or 2GiB; 0 keeps nothing.") from None


class PieceCache:
    """Pieces by name, the longest unused removed first. Safe to use from several threads."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._added, self._lock = most_bytes, threading.Lock()

    def get(self, name: str) -> bytes | None:
        """Return a piece as it was put; None if it is not there or damaged."""
        path = self._path(name)
        with contextlib.suppress(OSError):
            if is_foreign(path, self.folder.parent):
                return None
            content = path.read_bytes()
            digest, piece = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if xxhash.xxh3_128_digest(piece) == digest:
                with contextlib.suppress(OSError):  # it may be read-only
                    os.utime(path)
                return piece
            path.unlink()
        return None

    def put(self, name: str, piece: bytes) -> None:
        """Keep a piece. A disk that is full or read-only keeps nothing."""
        n_bytes = len(piece) + _DIGEST_BYTES
        if n_bytes > self.most_bytes:
            return
        path = self._path(name)
        temporary = path.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}")
        with contextlib.suppress(OSError):
            make_private(path.parent, self.folder.parent)
            try:
                temporary.touch(mode=0o600)
                temporary.write_bytes(xxhash.xxh3_128_digest(piece) + piece)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        self._note_added(n_bytes)

    def _note_added(self, n_bytes: int) -> None:
        with self._lock:
            self._added += n_bytes
            if self._added * _LOOKS > self.most_bytes:
                self._added = 0
                self._make_room()

    def _make_room(self) -> None:
        """Remove what was unused for longest, also what killed processes left, until there is room to the next look."""
        found = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_size, path))
        total = sum(n_bytes for _, n_bytes, _ in found)
        for _, n_bytes, path in sorted(found):
            if total <= self.most_bytes - self.most_bytes // _LOOKS:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= n_bytes

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name
