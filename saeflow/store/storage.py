"""An object store (s3://, gs://, az://) behind a folder of this machine.

The folder holds the records, as they are now, and the tables that were asked for. What a stage has finished is sent,
its record last; shards of arrays are read in ranges and not kept. Credentials come from the usual environment
variables, which obstore reads; they are not logged.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import obstore
import xxhash
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.store import from_url
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from saeflow.runtime.errors import UserError, first_line
from saeflow.store.files import checksum, remove

RETRIES: Any = {"max_retries": 4, "retry_timeout": timedelta(minutes=2)}
T = TypeVar("T")
_SENDERS = 4
"""Files of a part on their way at once."""
_STREAM_BYTES = 4 << 20
_UNSENT_SECONDS = 86_400
"""A file that is older and was never sent is not about to be."""


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def cache_folder(url: str) -> Path:
    """The folder of this machine that stands for a store: SAEFLOW_CACHE, else the user's cache, and a name of its
    own."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    base = Path(os.environ.get("SAEFLOW_CACHE") or Path(home) / "saeflow").absolute()
    name = "".join(c if c.isalnum() else "-" for c in url.partition("://")[2])[-40:].strip("-")
    return base / f"{name}-{hashlib.blake2b(url.encode(), digest_size=4).hexdigest()}"


@dataclass(frozen=True)
class Found:
    """What a listing says of an object: its size in bytes, and when it was written, in seconds since 1970."""

    n_bytes: int
    written: float


@dataclass
class Objects:
    """The objects below a URL, by the paths that stand for them below `root`. Safe to use from several threads."""

    url: str
    root: Path
    _listed: dict[str, dict[str, Found]] = field(default_factory=dict, repr=False)
    _tags: dict[str, str] = field(default_factory=dict, repr=False)
    _n_bytes: dict[str, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        options: Any = {"retry_config": RETRIES, "client_options": {"allow_http": allow_http()}}
        try:
            self.store: Any = from_url(self.url, **options)
        except (BaseError, ValueError, TypeError) as error:
            raise UserError(f"The store {self.url} cannot be opened: {first_line(error)}. {_HELP}") from error

    def key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _ask(self, ask: Callable[[], T]) -> T:
        """The answer to something that can be asked twice. obstore tries again what fails at once; an answer that
        breaks off in the middle is left to us. Raises UserError where the store refuses, or is silent for minutes.
        """
        try:
            return tries(GenericError)(ask)
        except (AlreadyExistsError, PreconditionError):
            raise
        except (BaseError, PermissionError) as error:
            raise UserError(
                f"The store {self.url} does not answer: {first_line(error)}.\n{_HELP}\n"
                "Finished parts are safe; then run the same command again."
            ) from error

    def pull(self) -> None:
        """Bring the records of every artefact into the folder and drop what is no longer there.

        Two listings an artefact, whatever it holds; parts are not looked at. What was never in the store as it is here
        stays: a run of this machine is about to send it.
        """
        self._listed.clear()
        self._tags.clear()
        top = self._level("")
        kinds = [kind for kind in top["common_prefixes"] if kind != "tmp"]
        artefacts = [artefact for kind in kinds for artefact in self._level(kind)["common_prefixes"]]
        with ThreadPoolExecutor(_SENDERS) as pool:
            found = [*top["objects"], *itertools.chain.from_iterable(pool.map(self._own_files, artefacts))]
        self._bring(found, self._own_local(self.root), keep_unsent=True)

    def pull_one(self, folder: Path) -> None:
        """The same for one artefact by who holds its lease: what is here and was never sent is a killed run's, and
        goes."""
        key = self.key(folder)
        self._listed.pop(key, None)
        for known in [known for known in self._tags if known.startswith(f"{key}/")]:
            del self._tags[known]
        self._bring(self._own_files(key), self._own_local(folder), keep_unsent=False)

    def _bring(self, found: list[Any], local: Iterable[Path], keep_unsent: bool) -> None:
        known = {str(meta["path"]): meta for meta in found}
        for path in local:
            if self.key(path) not in known and not (keep_unsent and self._is_unsent(path)):
                path.unlink(missing_ok=True)
        for key, meta in known.items():
            self._refresh(key, meta, keep_unsent)

    def _own_files(self, artefact: str) -> list[Any]:
        """Objects of an artefact that belong to no part."""
        return [*self._level(artefact)["objects"], *self._level(f"{artefact}/generations")["objects"]]

    def _level(self, prefix: str) -> Any:
        """Objects and prefixes right below a prefix."""
        return self._ask(lambda: obstore.list_with_delimiter(self.store, prefix or None))

    def _own_local(self, folder: Path) -> Iterator[Path]:
        """Files of this machine in the place of `_own_files`, of the whole store where the folder is its root; not
        those, with a dot before their names, that are being written."""
        patterns = ("*", "*/*/*", "*/*/generations/*") if folder == self.root else ("*", "generations/*")
        for path in itertools.chain.from_iterable(map(folder.glob, patterns)):
            if path.is_file() and path.name[0] != "." and not path.is_relative_to(self.root / "tmp"):
                yield path

    def _refresh(self, key: str, meta: Any, keep_unsent: bool) -> None:
        """Small records are read anew, other files dropped where they are no longer those of the store."""
        path = self.root / key
        if key.endswith(".json"):
            return self._fetch(key, path)
        with contextlib.suppress(FileNotFoundError):  # another process of this machine may look at the same time
            unsent = keep_unsent and self._noted(path) and self._is_unsent(path)
            if path.is_file() and not unsent and not self._is_current(path, meta):
                path.unlink()
            if "/generations/" in key and not path.is_file():
                self._fetch(key, path)
        return None

    def _is_current(self, path: Path, meta: Any) -> bool:
        """Is a file the one of the listing? One that was sent from here then gets its time, to be known by from now
        on."""
        if _same(path, meta):
            return True
        if self._noted(path) != [checksum(path), str(meta["e_tag"])]:
            return False
        written = meta["last_modified"].timestamp()
        os.utime(path, (written, written))
        return True

    def _is_unsent(self, path: Path) -> bool:
        """Has a file never been in the store as it is here? One that is a day old is a killed run's."""
        with contextlib.suppress(FileNotFoundError):
            return self._noted(path)[:1] != [checksum(path)] and time.time() - path.stat().st_mtime < _UNSENT_SECONDS
        return False

    def _noted(self, path: Path) -> list[str]:
        """The checksum and the tag with which a file of an artefact's own was sent or fetched last, if it was."""
        with contextlib.suppress(FileNotFoundError):
            return self._note_of(path).read_text("utf-8").split(" ", 1)
        return []

    def _note_of(self, path: Path) -> Path:
        return self.root / "tmp" / "known" / self.key(path)

    def _note_known(self, path: Path, digest: str, tag: object) -> None:
        """Such a file is in the store now."""
        if self._noted(path) == [digest, str(tag)]:
            return
        note = self._note_of(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(note)
        temporary.write_text(f"{digest} {tag}", "utf-8")
        os.replace(temporary, note)

    def fetch(self, path: Path, fresh: bool = False) -> Path:
        """The file, brought here if it is not. Raises FileNotFoundError."""
        if fresh or not path.is_file():
            self._fetch(self.key(path), path)
        return path

    def _fetch(self, key: str, path: Path) -> None:
        self._ask(lambda: self._fetch_once(key, path))

    def _fetch_once(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            found = obstore.get(self.store, key)
            with temporary.open("wb") as file:
                for piece in found.stream(min_chunk_size=_STREAM_BYTES):
                    file.write(piece)
            written = found.meta["last_modified"].timestamp()
            os.utime(temporary, (written, written))
            if _is_own(key):
                self._note_known(path, checksum(temporary), found.meta["e_tag"])
            os.replace(temporary, path)
            self._tags[key] = str(found.meta["e_tag"])
        finally:
            temporary.unlink(missing_ok=True)

    def checksum(self, path: Path) -> str:
        """xxh3_128 of an object as it is in the store now."""

        def digest() -> str:
            found = xxhash.xxh3_128()
            for piece in obstore.get(self.store, self.key(path)).stream(min_chunk_size=_STREAM_BYTES):
                found.update(piece)
            return found.hexdigest()

        return self._ask(digest)

    def open(self, path: Path) -> ObjectBytes:
        """An object, to be read in ranges. Raises FileNotFoundError."""
        key = self.key(path)
        if key not in self._n_bytes:
            self._n_bytes[key] = self._ask(lambda: int(obstore.head(self.store, key)["size"]))
        return ObjectBytes(self, key, self._n_bytes[key])

    def range(self, key: str, start: int, n_bytes: int) -> memoryview:
        """Bytes of an object. Raises FileNotFoundError."""
        if not n_bytes:
            return memoryview(b"")
        return self._ask(lambda: memoryview(obstore.get_range(self.store, key, start=start, length=n_bytes)))

    def zarr(self, path: Path) -> Any:
        """An array as zarr reads it."""
        from zarr.storage import ObjectStore, StorePath

        return StorePath(ObjectStore(self.store, read_only=True), self.key(path))

    def send(self, paths: Iterable[Path], folder: Path | None = None, to: Path | None = None) -> None:
        """Write files to the store, several at once; those of `folder` under the names they would have in `to`."""
        pairs = [(path, to / path.relative_to(folder) if folder and to else path) for path in paths]
        with ThreadPoolExecutor(_SENDERS, "saeflow-send") as pool:
            for _ in pool.map(self._send, pairs):
                pass

    def _send(self, pair: tuple[Path, Path]) -> None:
        path, target = pair
        put = self._ask(lambda: obstore.put(self.store, self.key(target), path))
        if _is_own(self.key(target)):
            self._note_known(target, checksum(path), put["e_tag"])
        self._note(target, path.stat().st_size)

    def _note(self, target: Path, n_bytes: int | None) -> None:
        """Keep the listings that were made true."""
        key = self.key(target)
        with self._lock:
            for prefix, listed in self._listed.items():
                if key.startswith(prefix + "/"):
                    listed.pop(key, None)
                    if n_bytes is not None:
                        listed[key] = Found(n_bytes, time.time())

    def create(self, path: Path, source: Path | None = None) -> bool:
        """Send a file, or `source` in its name, unless there is another one of that name already; then False, and the
        other is here."""
        content, key = (source or path).read_bytes(), self.key(path)
        try:
            put = self._ask(lambda: obstore.put(self.store, key, content, mode="create", use_multipart=False))
        except AlreadyExistsError:
            self._fetch(key, path)
            return path.read_bytes() == content
        except NotImplementedError as error:
            raise UserError(_CANNOT_COMPARE.format(url=self.url)) from error
        self._note_known(path, xxhash.xxh3_128_hexdigest(content), put["e_tag"])
        self._note(path, len(content))
        return True

    def switch(self, path: Path, content: bytes) -> None:
        """Replace a record, if it is still the one that was last read here. Raises UserError where somebody else has
        replaced it since, or the store cannot compare."""
        key = self.key(path)
        mode: Any = {"e_tag": self._tags[key]} if key in self._tags else "create"
        try:
            put = self._ask(lambda: obstore.put(self.store, key, content, mode=mode, use_multipart=False))
            self._tags[key] = str(put["e_tag"])
            self._note_known(path, xxhash.xxh3_128_hexdigest(content), put["e_tag"])
            self._note(path, len(content))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
            self._tags.pop(key, None)
            with contextlib.suppress(FileNotFoundError):  # it was removed
                self._fetch(key, path)
                if path.read_bytes() == content:  # the answer to the first try was lost
                    return
            raise UserError(
                f"Another machine has published or removed {path.parent.name} in {self.url} since this run began.\n"
                "Nothing is lost; run the same command again."
            ) from error
        except NotImplementedError as error:
            raise UserError(_CANNOT_COMPARE.format(url=self.url)) from error

    def read_tagged(self, path: Path) -> tuple[bytes, str] | None:
        """What an object holds now, and its tag; None where there is none."""

        def read() -> tuple[bytes, str]:
            found = obstore.get(self.store, self.key(path))
            return bytes(found.bytes()), str(found.meta["e_tag"])

        with contextlib.suppress(FileNotFoundError):
            return self._ask(read)
        return None

    def put_tagged(self, path: Path, content: bytes, tag: str | None) -> str | None:
        """Write an object that still has this tag, or (None) is not there; its new tag, or None where that is not
        so."""
        mode: Any = {"e_tag": tag} if tag is not None else "create"
        try:
            put = self._ask(lambda: obstore.put(self.store, self.key(path), content, mode=mode, use_multipart=False))
            return str(put["e_tag"])
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            found = self.read_tagged(path)
            return found[1] if found and found[0] == content else None  # the answer to the first try was lost
        except NotImplementedError as error:
            raise UserError(_CANNOT_COMPARE.format(url=self.url)) from error

    def listing(self, folder: Path) -> dict[str, Found]:
        """All objects below a folder, by key; listed once, then kept up to date by what is sent and removed here."""
        prefix = self.key(folder)
        if prefix not in self._listed:
            found = {
                meta["path"]: Found(meta["size"], meta["last_modified"].timestamp()) for meta in self._below(prefix)
            }
            with self._lock:
                self._listed[prefix] = found
        return self._listed[prefix]

    def list_again(self) -> None:
        """Others have sent and removed objects."""
        with self._lock:
            self._listed.clear()

    def _below(self, prefix: str) -> list[Any]:
        return self._ask(lambda: [meta for each in obstore.list(self.store, prefix, chunk_size=1000) for meta in each])

    def keep(self, folder: Path, number: int, last: str) -> None:
        """Send a folder of work in progress as its version `number`, the file `last` after the others; drop older
        ones."""
        older = [meta["path"] for meta in self._below(self.key(folder))]
        target = folder / f"{number:09d}"
        paths = [path for path in folder.iterdir() if path.name != last]
        self.send(paths, folder, target)
        self.send([folder / last], folder, target)
        old = [key for key in older if not key.startswith(self.key(target) + "/")]
        if old:
            self._ask(lambda: obstore.delete(self.store, old))

    def bring_back(self, folder: Path, last: str) -> None:
        """The newest whole version of a folder that was kept, if there is one, in place of what the folder holds.

        The file `last` comes after the others: a folder without it was not brought whole.
        """
        keys = sorted(
            (meta["path"] for meta in self._below(self.key(folder))), key=lambda key: (key.endswith(f"/{last}"), key)
        )
        whole = [key.rpartition("/")[0] for key in keys if key.endswith(f"/{last}")]
        if whole:
            shutil.rmtree(folder, ignore_errors=True)
        for key in keys if whole else []:
            if key.startswith(whole[-1] + "/"):
                self._fetch(key, folder / key.rpartition("/")[2])

    def remove(self, path: Path) -> None:
        """An object, or all below a folder, here and there."""
        keys = [meta["path"] for meta in self._below(self.key(path))] or [self.key(path)]
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda: obstore.delete(self.store, keys))
        for here in (path, self._note_of(path)):
            remove(here)
        self._listed.clear()
        self._tags.pop(self.key(path), None)


@dataclass
class ObjectBytes:
    """One object, part of which may be in memory. Raises FileNotFoundError once it is gone."""

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
    """Only where an endpoint in the environment says so."""
    return any(str(os.environ.get(name, "")).startswith("http://") for name in _ENDPOINTS)


def tries(*failures: type[BaseException]) -> Retrying:
    """Calls again, eight times at most, what fails so."""
    return Retrying(
        retry=retry_if_exception_type(failures),
        stop=stop_after_attempt(8),
        wait=wait_random_exponential(multiplier=0.1, max=10),
        reraise=True,
    )


_CANNOT_COMPARE = (
    "{url} cannot compare before it replaces (conditional put), so two runs could undo each other.\n"
    "Use an object store that can (S3, Google, Azure, MinIO, R2), or a local folder."
)
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL")
_HELP = (
    "Check the bucket's name, and the credentials in the environment "
    "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL; or those of Google or Azure)."
)


def _is_own(key: str) -> bool:
    """Is it a file of an artefact's own, or of the store's?"""
    return not key.startswith("tmp/") and "/parts/" not in key


def _temporary(path: Path) -> Path:
    """A name beside a file for what takes its place, of this thread alone."""
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")


def _same(path: Path, meta: Any) -> bool:
    """Is the local file the object of the listing? As rsync sees it: equal size and time."""
    with contextlib.suppress(FileNotFoundError):
        about = path.stat()
        return bool(about.st_size == meta["size"] and abs(about.st_mtime - meta["last_modified"].timestamp()) < 1e-3)
    return False
