"""The user's cache on this machine: where it lies, and whether somebody else may have written what is read from it.

What lies there is believed: a record there has its checksum beside it, so whoever writes one writes the other. Each
file and folder must therefore belong to this user or to root, and nobody else may be able to write it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from saeflow.runtime.errors import UserError


class ForeignCache(UserError):
    """Somebody else may have written the user's cache, or something in it."""


def user_cache() -> Path:
    """Return SAEFLOW_CACHE, else saeflow's folder in the user's cache. Raises RuntimeError if the user has no home."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SAEFLOW_CACHE") or Path(home) / "saeflow").absolute()


def cache_folder(url: str) -> Path:
    """Return the folder of the cache that stands for a bucket."""
    name = "".join(c if c.isalnum() else "-" for c in url.partition("://")[2])[-40:].strip("-")
    return user_cache() / f"{name}-{hashlib.blake2b(url.encode(), digest_size=4).hexdigest()}"


def trusted_folder(folder: Path) -> Path:
    """Return a folder right in a cache, made for this user alone if it is missing, after a look at all in it.

    Raises ForeignCache if somebody else may have written the cache, the folder, or anything in it.
    """
    cache = folder.parent
    with contextlib.suppress(OSError):  # a service may have a cache that it can only read
        make_private(folder, cache)
    found, is_closed = _way_to(folder, cache)
    found = found or _foreign_below(folder, is_closed)
    if found is not None:
        raise ForeignCache(_what_is_foreign(found, cache))
    return folder


def make_private(folder: Path, cache: Path) -> None:
    """Make a folder of a cache, and the cache, for this user alone. Raises OSError."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    for step in _steps(folder, cache):
        step.mkdir(mode=0o700, exist_ok=True)


def is_foreign(path: Path, cache: Path) -> bool:
    """True if somebody else may have written a path, or a folder on the way to it from the cache."""
    return _way_to(path, cache)[0] is not None


def _way_to(path: Path, cache: Path) -> tuple[Path | None, bool]:
    """Return the first step from a cache to a path that somebody else may have written, and whether a step is closed.

    The way ends where a step is missing.
    """
    is_closed = False
    with contextlib.suppress(OSError):
        for step in _steps(path, cache):
            about = step.stat()
            if _is_foreign(about, is_closed):
                return step, is_closed
            is_closed = is_closed or _closes(about)
    return None, is_closed


def _foreign_below(folder: Path, is_closed: bool) -> Path | None:
    """Return a file or folder below a folder that somebody else may have written. What cannot be read is left out."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process has removed it
                about = entry.stat()
                if _is_foreign(about, is_closed):
                    return Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    found = _foreign_below(Path(entry.path), is_closed or _closes(about))
                    if found is not None:
                        return found
    return None


def _steps(path: Path, cache: Path) -> list[Path]:
    return [cache, *(each for each in reversed([path, *path.parents]) if each != cache and each.is_relative_to(cache))]


def _is_foreign(about: os.stat_result, is_closed: bool) -> bool:
    """True if somebody else owns a file or folder, or may write it. In a closed folder nobody else can."""
    return about.st_uid not in (0, os.geteuid()) or (not is_closed and bool(about.st_mode & 0o022))


def _closes(about: os.stat_result) -> bool:
    """True if a folder gives others no right at all, so that they reach nothing in it."""
    return not about.st_mode & 0o077


def _what_is_foreign(found: Path, cache: Path) -> str:
    about = found.stat()
    if about.st_uid in (0, os.geteuid()):
        problem, way_out = f"others may write {found}", f"run `chmod -R go-w {cache}` if you trust them"
    else:
        problem, way_out = f"{found} belongs to user {about.st_uid}", "remove it"
    return f"SAEFLOW_CACHE is {cache}, but {problem}: {way_out}, or set SAEFLOW_CACHE to a folder of your own."
