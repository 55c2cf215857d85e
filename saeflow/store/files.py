"""Files: checksums, and writes that a power cut leaves either undone or whole."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import xxhash

from saeflow.store.links import move, open_unlinked, read_bytes, remove, unlinked

ROW_GROUP = 122_880
"""Rows of a row group in Parquet: as many as one thread of DuckDB reads at a time."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Bytes(Protocol):
    """A file or object that is read from anywhere in it, by several threads at once."""

    @property
    def n_bytes(self) -> int: ...
    def read_into(self, out: np.ndarray, start: int) -> int: ...
    def read(self, start: int, n_bytes: int) -> bytes: ...
    def ahead(self, start: int, n_bytes: int) -> Bytes:
        """The same, with these bytes in memory where each reading would be a request."""
        ...

    def __enter__(self) -> Bytes: ...
    def __exit__(self, *error: object) -> None: ...


class FileBytes:
    """A file of this machine. Raises FileNotFoundError."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(unlinked(path), os.O_RDONLY)
        self.n_bytes = os.fstat(self.handle).st_size

    def read_into(self, out: np.ndarray, start: int) -> int:
        return os.preadv(self.handle, [out.data], start)

    def read(self, start: int, n_bytes: int) -> bytes:
        return os.pread(self.handle, n_bytes, start)

    def ahead(self, start: int, n_bytes: int) -> FileBytes:
        return self

    def __enter__(self) -> FileBytes:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.handle)


def map_lookups(look: Callable[[list[Item]], list[Result]], items: Iterable[Item]) -> Iterator[Result]:
    """Yield what `look` returns for each item, in order. For short looks at files: a disk or a server is asked.

    `look` is given up to `MANY` items, by several threads at once if there are more.
    """
    left = iter(items)
    first = list(itertools.islice(left, MANY))
    if len(first) < MANY:
        yield from look(first)
        return
    chunks = itertools.chain([first], iter(lambda: list(itertools.islice(left, MANY)), []))
    with ThreadPoolExecutor(LOOKERS, "saeflow-look") as pool:
        yield from itertools.chain.from_iterable(pool.map(look, chunks))


LOOKERS, MANY = 8, 500


def checksum(path: Path) -> str:
    """Return the xxh3_128 of a file."""
    digest = xxhash.xxh3_128()
    with open_unlinked(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def checksum_once(path: Path) -> str:
    """Return the xxh3_128 of a file. It is read once a process while its size and time stay as they are."""
    about = path.stat()
    return _checksum_of(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=1 << 16)
def _checksum_of(path: Path, n_bytes: int, changed_ns: int) -> str:
    return checksum(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, flushed, when the block ends well."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.new")
    remove(temporary)  # a link there would be written through
    yield temporary
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file; a power cut leaves the old one or the new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: object) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json_text(value), "utf-8")


def json_text(value: object) -> str:
    """The one way in which JSON is written here."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Raises ValueError where the file is no JSON, however deeply it is nested."""
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """The folder, and what is missing above it; a power cut does not take them away again."""
    missing = [folder for folder in (unlinked(path), *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush(folder.parent)


def flush_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def rename(source: Path, target: Path) -> None:
    make_folder(target.parent)
    move(source, target)
    flush(target.parent)
    flush(source.parent)
