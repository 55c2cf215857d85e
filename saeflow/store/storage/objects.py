"""Requests to an object store (s3://, gs://, az://), by key. Credentials come from the usual environment variables,
which obstore reads; they are not logged."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import obstore
import xxhash
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.store import from_url
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from saeflow.runtime.errors import UserError, first_line
from saeflow.store.storage.traffic import TrafficMeter

RETRIES: Any = {"max_retries": 4, "retry_timeout": timedelta(minutes=2)}
T = TypeVar("T")
REQUESTS_AT_ONCE = 16
"""Requests wait for the server most of the time."""

_STREAM_BYTES, _PAGE = 4 << 20, 1000


@dataclass(frozen=True, slots=True)
class Found:
    """An object as a listing gives it: its size in bytes, and when it was written, in seconds since 1970."""

    n_bytes: int
    written: float
    tag: str
    """Changes with the content."""

    @classmethod
    def of(cls, meta: Any) -> Found:
        return cls(int(meta["size"]), meta["last_modified"].timestamp(), str(meta["e_tag"]))


class Objects:
    """The objects below a URL, by key. Safe to use from several threads.

    Every request raises UserError if the store refuses, or is silent for minutes.
    """

    def __init__(self, url: str, n_tries: int = 8) -> None:
        self.url, self._n_tries, self.meter = url, n_tries, TrafficMeter()
        options: Any = {"retry_config": RETRIES, "client_options": {"allow_http": allow_http()}}
        try:
            self.store: Any = from_url(url, **options)
        except (BaseError, ValueError, TypeError) as error:
            raise UserError(f"The store {url} cannot be opened: {first_line(error)}. {_HELP}") from error

    def _ask(self, ask: Callable[[], T]) -> T:
        """Return the answer to something that can be asked twice.

        obstore tries again what fails at once; an answer that breaks off in the middle is left to us.
        """
        try:
            return tries(GenericError, n=self._n_tries)(ask)
        except (AlreadyExistsError, PreconditionError):
            raise
        except (BaseError, PermissionError) as error:
            raise UserError(
                f"The store {self.url} does not answer: {first_line(error)}.\n{_HELP}\n"
                "Finished parts are safe; then run the same command again."
            ) from error

    def list(self, prefix: str) -> list[Any]:
        """Return what is below a prefix."""
        pages = self._ask(lambda: [*obstore.list(self.store, prefix, chunk_size=_PAGE)])
        self.meter.add("LIST", n=max(1, len(pages)))
        return [meta for page in pages for meta in page]

    def list_level(self, prefix: str) -> Any:
        """Return the objects and the prefixes right below a prefix."""
        found = self._ask(lambda: obstore.list_with_delimiter(self.store, prefix or None))
        self.meter.add("LIST", n=_pages(len(found["objects"]) + len(found["common_prefixes"])))
        return found

    def about(self, key: str) -> Found:
        """Return what a listing would say of an object. Raises FileNotFoundError."""
        self.meter.add("HEAD")
        return self._ask(lambda: Found.of(obstore.head(self.store, key)))

    def checksum(self, key: str) -> str:
        """Return the xxh3_128 of an object. Raises FileNotFoundError."""

        def digest() -> str:
            found = xxhash.xxh3_128()
            gotten = obstore.get(self.store, key)
            self.meter.add("GET", gotten.meta["size"])
            for piece in gotten.stream(min_chunk_size=_STREAM_BYTES):
                found.update(piece)
            return found.hexdigest()

        return self._ask(digest)

    def range(self, key: str, start: int, n_bytes: int) -> memoryview:
        """Return bytes of an object. Raises FileNotFoundError."""
        if not n_bytes:
            return memoryview(b"")
        found = self._ask(lambda: memoryview(obstore.get_range(self.store, key, start=start, length=n_bytes)))
        self.meter.add("GET", len(found))
        return found

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Return what an object holds and its tag; None if there is none."""

        def read() -> tuple[bytes, str]:
            found = obstore.get(self.store, key)
            self.meter.add("GET", found.meta["size"])
            return bytes(found.bytes()), str(found.meta["e_tag"])

        with contextlib.suppress(FileNotFoundError):
            return self._ask(read)
        return None

    def download(self, key: str, path: Path) -> str:
        """Write an object to a file that has its time, and return its tag. Raises FileNotFoundError."""

        def once() -> str:
            found = obstore.get(self.store, key)
            self.meter.add("GET", found.meta["size"])
            with path.open("wb") as file:
                for piece in found.stream(min_chunk_size=_STREAM_BYTES):
                    file.write(piece)
            written = found.meta["last_modified"].timestamp()
            os.utime(path, (written, written))
            return str(found.meta["e_tag"])

        return self._ask(once)

    def upload(self, path: Path, key: str) -> str:
        """Store a file and return its tag."""
        self.meter.add("PUT")
        return str(self._ask(lambda: obstore.put(self.store, key, path))["e_tag"])

    def put(self, key: str, content: bytes, tag: str | None) -> str | None:
        """Write an object that still has this tag, or (None) is not there. Return its new tag; None if that is not so.

        Raises UserError if the store cannot compare.
        """
        mode: Any = {"e_tag": tag} if tag is not None else "create"
        self.meter.add("PUT")
        try:
            put = self._ask(lambda: obstore.put(self.store, key, content, mode=mode, use_multipart=False))
            return str(put["e_tag"])
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            found = self.read(key)
            return found[1] if found and found[0] == content else None  # the answer to the first try was lost
        except NotImplementedError as error:
            raise UserError(
                f"{self.url} cannot compare before it replaces (conditional put), so two runs could undo each other.\n"
                "Use an object store that can (S3, Google, Azure, MinIO, R2), or a local folder."
            ) from error

    def keys(self, key: str) -> Sequence[str]:
        """Return what is below a key, or the key itself: it stands for a folder or for an object."""
        return [meta["path"] for meta in self.list(key)] or [key]

    def copy_all(self, key: str, target: str) -> bool:
        """Store an object, or all below its key, under another key as well. Return False if nothing is there."""
        with contextlib.suppress(FileNotFoundError):
            for each in self.keys(key):
                self._ask(partial(obstore.copy, self.store, each, target + each.removeprefix(key)))
            return True
        return False

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects that may be gone already."""
        with contextlib.suppress(FileNotFoundError):
            if keys:
                self._ask(lambda: obstore.delete(self.store, [*keys]))

    def zarr(self, key: str) -> Any:
        """Return an array as zarr opens it."""
        from zarr.storage import ObjectStore, StorePath

        return StorePath(ObjectStore(self.store, read_only=True), key)


def _pages(n_listed: int) -> int:
    return max(1, -(-n_listed // _PAGE))


@dataclass
class ObjectBytes:
    """One object, part of which may be in memory. Raises FileNotFoundError once the object is gone."""

    objects: Objects
    key: str
    n_bytes: int
    held: memoryview = field(default_factory=lambda: memoryview(b""))
    held_from: int = 0

    def read_into(self, out: np.ndarray, start: int) -> int:
        found = self._range(start, len(out))
        out[: len(found)] = np.frombuffer(found, np.uint8)
        return len(found)

    def read(self, start: int, n_bytes: int) -> bytes:
        return bytes(self._range(start, n_bytes))

    def _range(self, start: int, n_bytes: int) -> memoryview:
        n_bytes = max(min(n_bytes, self.n_bytes - start), 0)
        at = start - self.held_from
        if at >= 0 and at + n_bytes <= len(self.held):
            return self.held[at : at + n_bytes]
        return self.objects.range(self.key, start, n_bytes)

    def ahead(self, start: int, n_bytes: int) -> ObjectBytes:
        return ObjectBytes(self.objects, self.key, self.n_bytes, self._range(start, n_bytes), start)

    def __enter__(self) -> ObjectBytes:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def allow_http() -> bool:
    """True only if an endpoint in the environment is http://."""
    return any(str(os.environ.get(name, "")).startswith("http://") for name in _ENDPOINTS)


def tries(*failures: type[BaseException], n: int = 8) -> Retrying:
    """Return what calls a function again, `n` times at most, when it fails so."""
    return Retrying(
        retry=retry_if_exception_type(failures),
        stop=stop_after_attempt(n),
        wait=wait_random_exponential(multiplier=0.1, max=10),
        reraise=True,
    )


_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL")
_HELP = (
    "Check the bucket's name, and the credentials in the environment "
    "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL; or those of Google or Azure)."
)
