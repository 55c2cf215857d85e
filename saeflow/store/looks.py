"""Looks at very many files, with nothing of Python between one file and the next, and on all cores.

The system answers a look within a microsecond. Python adds more than that, and lets one thread look at a time.
A look only confirms: whatever is not just as recorded, and every file of a system without `statx`, is left to `links`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit, types

from saeflow.store.links import folders_of
from saeflow.store.records import Damaged, PartRecord

HAS_STATX = hasattr(ctypes.CDLL(None), "statx")
_FOLDER, _ANY_SIZE = -1, -2
_HERE, _NO_FOLLOW, _MODE_AND_SIZE = -100, 0x100, 0x203  # AT_FDCWD, AT_SYMLINK_NOFOLLOW, STATX_TYPE | MODE | SIZE
_TEXT = types.CPointer(types.uint8)  # type: ignore[no-untyped-call]
_statx: Any = types.ExternalFunction("statx", types.int32(types.int32, _TEXT, types.int32, types.uint32, _TEXT))


def confirmed(folder: str, parts: Sequence[PartRecord]) -> list[bool]:
    """Return for each part below a folder whether it is there: its record and its files in their sizes, and no link."""
    paths: list[str] = []
    n_bytes: list[int] = []
    first: list[int] = []
    for part in parts:
        first.append(len(paths))
        inside = f"{folder}/{part.folder}"
        try:
            files = part.files
        except Damaged:
            paths.append(inside)
            n_bytes.append(_ANY_SIZE)  # it is no file, so nothing is confirmed
            continue
        names = tuple(file.name for file in files)
        steps = folders_of(names)
        paths += [inside, f"{inside}/part.json"]
        paths += [f"{inside}/{name}" for name in (*steps, *names)]
        n_bytes += [_FOLDER, _ANY_SIZE, *[_FOLDER] * len(steps), *(file.n_bytes for file in files)]
    if not paths:
        return []
    text = np.frombuffer(("\0".join(paths) + "\0").encode(), np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(text == 0)[:-1] + 1])
    there = _look(text, starts, np.array(n_bytes, np.int64))
    return [bool(whole) for whole in np.logical_and.reduceat(there, first)]


@njit(nogil=True, cache=True)
def _look(text: np.ndarray, starts: np.ndarray, n_bytes: np.ndarray) -> np.ndarray:
    there = np.zeros(len(starts), np.bool_)
    about = np.zeros(32, np.uint64)  # struct statx: the mode at byte 28, the size at byte 40
    modes = about.view(np.uint16)
    for i in range(len(starts)):
        if _statx(_HERE, text[starts[i] :].ctypes, _NO_FOLLOW, _MODE_AND_SIZE, about.view(np.uint8).ctypes) == 0:
            kind = modes[14] & 0o170000
            if n_bytes[i] == _FOLDER:
                there[i] = kind == 0o040000
            else:
                there[i] = kind == 0o100000 and (n_bytes[i] == _ANY_SIZE or about[5] == np.uint64(n_bytes[i]))
    return there
