"""A folder of an inference engine: its files, checked as a whole before anything is read. It may be a stranger's."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from saeflow.corpus.files import shown
from saeflow.corpus.requests.files import Request, requests_in
from saeflow.runtime.errors import UserError

ENGINE_FILE = "engine.json"
INDEXES = ("requests.jsonl", "requests.parquet")
_UNREAD = {
    ".zst": "is packed by Zstandard. Unpack it with `zstd -d`.",
    **dict.fromkeys(
        (".pt", ".pth", ".pkl", ".bin"),
        "may run code when it is read. Save its tensors with safetensors.torch.save_file instead.",
    ),
}
"""Files that other settings of the engines write: left out without a word, their requests would be missing."""


@dataclass(frozen=True)
class RequestFolder:
    """The files of a folder. Listing it opens none of them."""

    path: Path
    files: dict[str, Path]
    """Safetensors files by their path in the folder, without ending."""
    index: Path | None

    @classmethod
    def of(cls, path: str) -> RequestFolder:
        """List a folder and the folders in it. Raises UserError for links, and for files that cannot be read."""
        folder = Path(path)
        if not folder.is_dir():
            raise UserError(f"corpus.requests: {shown(path)} is no folder on this machine. Check the path.")
        files: dict[str, Path] = {}
        unfinished: list[str] = []
        for file in _files_without_links(folder):
            if file.suffix == ".safetensors":
                files[shown(str(file.relative_to(folder).with_suffix("")))] = file
            elif file.name.endswith(".safetensors.lock"):
                unfinished += [file.name.removesuffix(".safetensors.lock")] * _is_unfinished(file)
            elif why := _UNREAD.get(file.suffix):
                raise UserError(f"corpus.requests: {shown(str(file))} {why}")
        if unfinished:
            raise UserError(
                f"corpus.requests: the engine has begun {len(unfinished):,} requests that have no file yet: "
                f"{some_of(unfinished)}.\nIf it still runs, wait. Else run them again, or remove their .lock files."
            )
        indexes = [folder / name for name in INDEXES if (folder / name).is_file()]
        if len(indexes) > 1:
            raise UserError(f"corpus.requests: {shown(path)} holds both {' and '.join(INDEXES)}. Remove one of them.")
        return cls(folder, dict(sorted(files.items())), indexes[0] if indexes else None)

    def states(self) -> list[tuple[str, int, int]]:
        """Return each file's path in the folder, size and time: what changes when a request comes or changes."""
        paths = [*self.files.values(), *([self.index] if self.index else [])]
        return [(shown(str(path.relative_to(self.path))), *_state(path)) for path in paths]

    @cached_property
    def requests(self) -> dict[str, Request]:
        """Every request by id. Opens every file. Raises UserError that names a damaged one, or an id given twice."""
        found: dict[str, Request] = {}
        for name, path in self.files.items():
            for request_id, request in requests_in(path, name).items():
                if request_id in found:
                    raise _twice(request_id, [found[request_id].path, path])
                found[request_id] = request
        return found

    def find(self, request_id: str) -> Request | None:
        """Return one request; None if its file is gone. Opens that file only."""
        for name in (request_id, request_id.rpartition("-")[0]):
            if name in self.files:
                return requests_in(self.files[name], name).get(request_id)
        return None


def some_of(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")


def _twice(request_id: str, paths: list[Path]) -> UserError:
    where = " and ".join(shown(str(path)) for path in paths)
    return UserError(
        f"corpus.requests: two files give the request {request_id!r}: {where}.\nRemove one of them, or rename it."
    )


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _files_without_links(folder: Path) -> Iterator[Path]:
    """Yield the files. Raises UserError for a link: it may lead out of the folder, to somebody else's files."""
    for path, names, files in os.walk(folder, onerror=_refuse):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in [*names, *sorted(files)]:
            each = Path(path, name)
            if each.is_symlink():
                raise UserError(
                    f"corpus.requests: {shown(str(each))} is a link, and saeflow follows none in such a folder.\n"
                    "Put the file itself there, e.g. with `cp -rL`."
                )
            if name in files and not name.startswith(".") and each.is_file():
                yield each


def _refuse(error: OSError) -> None:
    raise UserError(f"corpus.requests: {shown(str(error.filename))} cannot be read: {error.strerror}.") from error


def _is_unfinished(lock: Path) -> bool:
    """True if vLLM still holds the lock of a request, or has written no file beside it."""
    file = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return not lock.with_suffix("").exists()
