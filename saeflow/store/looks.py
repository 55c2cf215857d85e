"""Looks at very many files, with nothing of Python between one file and the next, and on all cores.

The system answers a look within a microsecond. Python adds more than that, and lets one thread look at a time.
A look only confirms: whatever is not just as recorded, and every file of a system without `statx`, is left to `links`.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence, Sized
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit, types

from saeflow.store.links import folders_of
from saeflow.store.records import Damaged, PartRecord

HAS_STATX = hasattr(ctypes.CDLL(None), "statx")
_IS_FOLDER, _ANY_SIZE, _NO_SIZE = -1, -2, -3
_HERE, _NO_FOLLOW, _MODE_AND_SIZE = -100, 0x100, 0x203  # AT_FDCWD, AT_SYMLINK_NOFOLLOW, STATX_TYPE | MODE | SIZE
_TEXT = types.CPointer(types.uint8)  # type: ignore[no-untyped-call]
_statx: Any = types.ExternalFunction("statx", types.int32(types.int32, _TEXT, types.int32, types.uint32, _TEXT))


def confirmed(folder: str, parts: Sequence[PartRecord]) -> list[bool]:
    """Return for each part below a folder whether it is there: its record and its files in their sizes, and no link."""
    if not parts:
        return []
    inside, n_bytes = [], []
    for part in parts:
        try:
            names, sizes = part.names_and_sizes
            paths, n_folders = _paths_inside(names)
            n_bytes.append([_IS_FOLDER, _ANY_SIZE, *[_IS_FOLDER] * n_folders, *sizes])
        except Damaged:
            paths, _ = _paths_inside(())
            n_bytes.append([_IS_FOLDER, _NO_SIZE])
        inside.append(paths)
    above = [f"{folder}/{part.folder}".encode() for part in parts]
    sizes_of_all = np.fromiter(itertools.chain.from_iterable(n_bytes), np.int64)
    there = _look(*_end_to_end(above), *_end_to_end(inside), sizes_of_all, _starts(n_bytes))
    return [bool(whole) for whole in there]


@lru_cache(maxsize=1 << 12)
def _paths_inside(names: tuple[str, ...]) -> tuple[bytes, int]:
    """Return what follows a part's folder in the paths to look at, each ended by a zero, and how many are folders.

    They are the folder itself, its record, the folders inside, and the files.
    """
    folders = folders_of(names)
    paths = ["", "/part.json", *(f"/{name}" for name in (*folders, *names))]
    return ("\0".join(paths) + "\0").encode(), len(folders)


def _end_to_end(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    return np.frombuffer(b"".join(texts), np.uint8), _starts(texts)


def _starts(each: Sequence[Sized]) -> np.ndarray:
    return np.cumsum([0, *map(len, each)])


@njit(nogil=True, cache=True)
def _look(
    above: np.ndarray,
    above_starts: np.ndarray,
    inside: np.ndarray,
    inside_starts: np.ndarray,
    n_bytes: np.ndarray,
    n_bytes_starts: np.ndarray,
) -> np.ndarray:
    """Look at the paths of each part until one is not as recorded. A path is the text above it, and a text inside."""
    there = np.ones(len(above_starts) - 1, np.bool_)
    about = np.zeros(32, np.uint64)  # struct statx: the mode at byte 28, the size at byte 40
    modes = about.view(np.uint16)
    path = np.zeros(np.max(np.diff(above_starts)) + np.max(np.diff(inside_starts)) + 1, np.uint8)
    for part in range(len(there)):
        n_above = above_starts[part + 1] - above_starts[part]
        path[:n_above] = above[above_starts[part] : above_starts[part + 1]]
        at = inside_starts[part]
        for wanted in n_bytes[n_bytes_starts[part] : n_bytes_starts[part + 1]]:
            end = n_above
            while inside[at] != 0:
                path[end] = inside[at]
                end, at = end + 1, at + 1
            path[end] = 0
            at += 1
            found = _statx(_HERE, path.ctypes, _NO_FOLLOW, _MODE_AND_SIZE, about.view(np.uint8).ctypes) == 0
            kind = modes[14] & 0o170000
            if wanted == _IS_FOLDER:
                found = found and kind == 0o040000
            else:
                found = found and kind == 0o100000 and (wanted == _ANY_SIZE or about[5] == np.uint64(wanted))
            if not found:
                there[part] = False
                break
    return there
