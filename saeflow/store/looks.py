"""Looks at very many files, with nothing of Python between one file and the next, and on all cores.

The system answers a look within a microsecond. Python adds more than that, and lets one thread look at a time.
Each part's folder is opened, and names are looked up from there: a long path would be walked again for every file.
A look only confirms: whatever is not just as recorded, and every file of a system without `statx`, is left to `links`.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numba import types

from saeflow.runtime.compiled import compiled
from saeflow.store.files import LOOKERS, MANY
from saeflow.store.lists import FileColumns, by_list, text_letters
from saeflow.store.records import Damaged, PartRecord

HAS_STATX = hasattr(ctypes.CDLL(None), "statx")
_MODE_OF_FOLDER, _FILE = 0o040000, 0o100000
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_OPEN_FOLDER = getattr(os, "O_PATH", 0) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_FOLLOW, _MODE_AND_SIZE = 0x100, 0x203  # AT_SYMLINK_NOFOLLOW, STATX_TYPE | MODE | SIZE
_RECORD = np.frombuffer(b"part.json", np.uint8)
_SLASH, _DOT = 47, 46
_CONTENT_BYTES = 1 << 22
"""Room for the records of `MANY` parts. Those for which there is no room left are read by whoever wants to know."""
_TEXT = types.CPointer(types.uint8)  # type: ignore[no-untyped-call]
_statx: Any = types.ExternalFunction("statx", types.int32(types.int32, _TEXT, types.int32, types.uint32, _TEXT))
_openat: Any = types.ExternalFunction("openat", types.int32(types.int32, _TEXT, types.int32))
_pread: Any = types.ExternalFunction("pread", types.int64(types.int32, _TEXT, types.uint64, types.int64))
_close: Any = types.ExternalFunction("close", types.int32(types.int32))
_compiled = partial(compiled, reorder=False)


def confirmed(folder: str, parts: Sequence[PartRecord]) -> list[bool]:
    """Return for each part below a folder whether it is there: its record and its files in their sizes, and no link."""
    there = np.zeros(len(parts), np.bool_)
    for source, places, rows in by_list(parts):
        some = [parts[place] for place in places]
        with contextlib.suppress(Damaged):  # a part has not as many names as sizes: whoever looks at it says so
            files = source.file_columns if source else FileColumns.of_parts(some)
            there[places] = _confirmed(folder, [part.folder for part in some], files, np.asarray(rows, np.int64))
    return [bool(whole) for whole in there]


def _confirmed(folder: str, inside: Sequence[str], files: FileColumns, rows: np.ndarray) -> np.ndarray:
    """Look at the parts in these rows, whose folders lie in another folder. Several threads share them."""
    letters, starts = text_letters(pa.array(inside, pa.string()))
    longest = max(np.diff(each).max(initial=len(_RECORD)) for each in (starts, files.starts))
    columns = files.first, files.letters, files.starts, files.sizes

    def look(begin: int) -> np.ndarray:
        path = np.zeros(longest + 1, np.uint8)
        with _folder_handle(folder) as handle:
            return _look(handle, letters, starts[begin:], rows[begin : begin + MANY], *columns, _RECORD, path)

    with ThreadPoolExecutor(LOOKERS, "saeflow-look") as pool:
        return np.concatenate(list(pool.map(look, range(0, len(rows), MANY))))


def written(folder: str, parts: Sequence[PartRecord]) -> list[bool]:
    """Return True for each part below a folder whose record has the bytes that were written; False if nobody knows."""
    letters, starts = text_letters(pa.array([part.folder for part in parts], pa.string()))
    longest = int(np.diff(starts).max(initial=0)) + len(_RECORD) + 2

    def look(begin: int) -> list[bool]:
        some, content = parts[begin : begin + MANY], np.empty(_CONTENT_BYTES, np.uint8)
        with _folder_handle(folder) as handle:
            path = np.zeros(longest, np.uint8)
            ends = _contents(handle, letters, starts[begin : begin + len(some) + 1], _RECORD, path, content).tolist()
        spans = itertools.pairwise([0, *ends])
        return [part.is_written_as(content[a:b].data) for part, (a, b) in zip(some, spans, strict=True)]

    with ThreadPoolExecutor(LOOKERS, "saeflow-look") as pool:
        return list(itertools.chain.from_iterable(pool.map(look, range(0, len(parts), MANY))))


@contextlib.contextmanager
def _folder_handle(folder: str) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


@_compiled
def _end_with_zero(path: np.ndarray, text: np.ndarray) -> None:
    path[: len(text)] = text
    path[len(text)] = 0


@_compiled
def _kind_at(part: int, path: np.ndarray, about: np.ndarray) -> int:
    """Return what is at a path inside of an open folder, and note its size in `about`; 0 if nothing is there."""
    if _statx(part, path.ctypes, _NO_FOLLOW, _MODE_AND_SIZE, about.view(np.uint8).ctypes) != 0:
        return 0
    return int(about.view(np.uint16)[14] & 0o170000)


@_compiled
def _look(
    handle: int,
    folders: np.ndarray,
    folder_starts: np.ndarray,
    rows: np.ndarray,
    first: np.ndarray,
    letters: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    record: np.ndarray,
    path: np.ndarray,
) -> np.ndarray:
    """Look at the files of each row until one is not as recorded. `path` is room for the longest name and a zero."""
    there = np.zeros(len(rows), np.bool_)
    about = np.zeros(32, np.uint64)  # struct statx: the mode at byte 28, the size at byte 40
    for place in range(len(rows)):
        _end_with_zero(path, folders[folder_starts[place] : folder_starts[place + 1]])
        part = _openat(handle, path.ctypes, _OPEN_FOLDER)
        if part < 0:
            continue
        _end_with_zero(path, record)
        whole = _kind_at(part, path, about) == _FILE
        file, end = first[rows[place]], first[rows[place] + 1]
        while whole and file < end:
            name = letters[starts[file] : starts[file + 1]]
            whole = _folders_are_there(part, name, path, about) and _kind_at(part, path, about) == _FILE
            whole = whole and np.int64(about[5]) == sizes[file]
            file += 1
        there[place] = whole
        _close(part)
    return there


@_compiled
def _contents(
    handle: int, folders: np.ndarray, starts: np.ndarray, record: np.ndarray, path: np.ndarray, content: np.ndarray
) -> np.ndarray:
    """Read the records of parts into `content`, end to end. Return where each ends; nothing is read of one that fails.

    What a name leads to is not looked at: whatever is not as written counts for nothing.
    """
    ends = np.zeros(len(starts) - 1, np.int64)
    end = 0
    for place in range(len(ends)):
        folder = folders[starts[place] : starts[place + 1]]
        _end_with_zero(path, folder)
        path[len(folder)] = _SLASH
        _end_with_zero(path[len(folder) + 1 :], record)
        file = _openat(handle, path.ctypes, _OPEN_FILE)
        if file >= 0:
            end += max(_pread(file, content[end:].ctypes, len(content) - end, 0), 0)
            _close(file)
        ends[place] = end
    return ends


@_compiled
def _folders_are_there(part: int, name: np.ndarray, path: np.ndarray, about: np.ndarray) -> bool:
    """Put a name into `path`, and look at the folders that it leads through, but for those of the name before it.

    False as well if the name could lead elsewhere: by an empty step, one up, or a zero.
    """
    step, is_new = 0, False
    for at in range(len(name) + 1):
        letter = name[at] if at < len(name) else 0
        if letter == _SLASH or at == len(name):
            n_dots = 0
            while step + n_dots < at and name[step + n_dots] == _DOT:
                n_dots += 1
            if at - step == n_dots and n_dots <= 2:
                return False
            if at < len(name) and (is_new or path[at] != _SLASH):
                path[at] = 0
                if _kind_at(part, path, about) != _MODE_OF_FOLDER:
                    return False
            step = at + 1
        elif letter == 0:
            return False
        is_new = is_new or path[at] != letter
        path[at] = letter
    return True
