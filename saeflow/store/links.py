"""No link leads out of a store: its own files and folders are never links, so none is followed, read or written.

A store may come from a stranger. Only what lies below a store's folder is looked at; the folder itself, and the user's
other paths, may be links.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, TypeVar

from saeflow.runtime.errors import UserError

_Path = TypeVar("_Path", str, Path)
_ROOTS: set[str] = set()


class Linked(UserError, OSError):
    """A file or folder of a store is a link, or is something else than a file."""


def keep_inside(root: Path) -> None:
    """From now on, follow no link below this folder."""
    _ROOTS.add(str(root))


def unlinked(path: _Path) -> _Path:
    """Return a path. Raises Linked if it, or a folder between a store and it, is a link, a pipe or a device."""
    _require_no_links(os.fspath(path))
    return path


def is_file(path: str | Path) -> bool:
    """True if a file is there, and no link on the way to it. Cheap: folders are looked at once a process."""
    folder, text = os.path.split(os.fspath(path))
    try:
        _look_once(folder)
        return stat.S_ISREG(os.lstat(text and f"{folder}/{text}").st_mode)
    except (FileNotFoundError, NotADirectoryError, Linked):
        return False


def sizes_below(folder: str, names: Sequence[str]) -> list[int | None]:
    """Return the bytes of each file below a folder; None if it is missing, or a link is on the way to it.

    Looks once at each file and at each folder: three million files are looked at in seconds.
    """
    if not is_folder(os.path.dirname(folder)) or not stat.S_ISDIR(_mode_and_size(folder)[0]):
        return [None] * len(names)
    steps = folders_of(tuple(names))
    closed = tuple(f"{step}/" for step in steps if not stat.S_ISDIR(_mode_and_size(f"{folder}/{step}")[0]))
    found = (_mode_and_size(f"{folder}/{name}") for name in names)
    open_sizes = [n_bytes if stat.S_ISREG(mode) else None for mode, n_bytes in found]
    return [None if name.startswith(closed) else n_bytes for name, n_bytes in zip(names, open_sizes, strict=True)]


def is_folder(path: str) -> bool:
    """True if a folder is there, and no link on the way to it. It is looked at once a process."""
    try:
        _look_once(path)
    except (FileNotFoundError, NotADirectoryError, Linked):
        return False
    return True


def _mode_and_size(path: str) -> tuple[int, int]:
    """Return both as 0 for a path that leads to nothing."""
    try:
        about = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0
    return about.st_mode, about.st_size


@lru_cache(maxsize=256)
def folders_of(names: tuple[str, ...]) -> list[str]:
    """Return the folders that these names lead through."""
    return sorted({name[:place] for name in names for place, letter in enumerate(name) if letter == "/"})


def read_in(folder: str, name: str) -> bytes:
    """Return the content of a file right in a folder that was looked at just now. Raises Linked as `read_bytes`."""
    with os.fdopen(_opened(f"{folder}/{name}", follow=False), "rb", buffering=0) as file:
        return bytes(file.read())


@lru_cache(maxsize=1 << 14)
def _look_once(folder: str) -> None:
    unlinked(folder)
    os.lstat(folder)  # a folder that is missing now is looked at again


def read_bytes(path: Path) -> bytes:
    """Return the content of a file. Raises Linked, also for what is no file and would keep its reader waiting."""
    with open_unlinked(path) as file:
        return file.read()


def open_unlinked(path: Path) -> IO[bytes]:
    """Open a file to be read. Raises Linked as `read_bytes` does."""
    return os.fdopen(_opened(str(unlinked(path)), follow=not _below_root(str(path))[1]), "rb")


def _opened(path: str, follow: bool) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, flags | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        raise (_linked(path) if os.path.islink(path) else error) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _no_file(path)
    return handle


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there; of a link, only the link. Raises Linked, or UserError in a store that
    belongs to somebody else.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), _folder_of(path) as folder:
        if stat.S_ISDIR(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
            shutil.rmtree(path.name, ignore_errors=True, dir_fd=folder)
        else:
            os.unlink(path.name, dir_fd=folder)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder; both folders are held open, so that none of them becomes a link meanwhile."""
    with _folder_of(source) as here, _folder_of(target) as there:
        os.rename(source.name, target.name, src_dir_fd=here, dst_dir_fd=there)


def require_owner(path: Path) -> None:
    """Raises UserError if a path lies in a store of somebody who does not share it with this user.

    A store is shared by giving its folder to a group that may write in it. One that root owns is a machine's.
    """
    root, names = _below_root(str(path))
    if not names:
        return
    about = os.stat(root)
    sudo_user = os.environ.get("SUDO_UID") if os.geteuid() == 0 else None
    is_shared = bool(about.st_mode & stat.S_IWGRP) and about.st_gid in {os.getegid(), *os.getgroups()}
    if about.st_uid not in (0, os.geteuid()) and str(about.st_uid) != sudo_user and not is_shared:
        raise UserError(
            f"The store {root} belongs to user {about.st_uid}, who does not share it with you: nothing is changed.\n"
            "Run the command as that user. Or share it (chgrp -R GROUP, chmod -R g+w), or make it yours (chown -R)."
        )


@contextlib.contextmanager
def _folder_of(path: Path) -> Iterator[int]:
    """Open the folder that a path lies in, step by step from its store, following no link."""
    require_owner(path)
    root, names = _below_root(str(path))
    if not names:
        root, names = str(path.parent), [path.name]
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in names[:-1]:
            try:
                step = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
            except OSError as error:
                unlinked(path.parent)
                raise error
            os.close(handle)
            handle = step
        yield handle
    finally:
        os.close(handle)


def _below_root(path: str) -> tuple[str, list[str]]:
    """Return a store's folder and the names below it that lead to a path; no names if the path lies in no store."""
    end = len(path)
    while end > 0:
        if path[:end] in _ROOTS:
            return path[:end], [name for name in path[end:].split("/") if name]
        end = path.rfind("/", 0, end)
    return path, []


def _require_no_links(path: str) -> None:
    step, names = _below_root(path)
    for name in names:
        step = f"{step}/{name}"
        _require_file_or_folder(step)


def _require_file_or_folder(path: str) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = os.lstat(path).st_mode
        if path.endswith("/..") or stat.S_ISLNK(mode):
            raise _linked(path)
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise _no_file(path)


def _no_file(path: str) -> Linked:
    return Linked(f"{path} is no file. saeflow did not write it: remove it, or do not use this store.")


def _linked(path: str) -> Linked:
    return Linked(
        f"{path} is a link, and leads out of its place in the store. It is neither followed nor written.\n"
        "saeflow makes no links: remove it, or do not use this store. To keep a store on another disk, name it with "
        "--store, or mount the disk there."
    )
