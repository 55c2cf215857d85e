"""Work in progress: what lies in a store's tmp/, and the versions of it that a bucket keeps for another machine."""

from __future__ import annotations

import contextlib
import stat
from pathlib import Path

from saeflow.store.links import unlinked


class Work:
    """Files and folders in tmp/ on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> set[str]:
        """Return the names of files and folders in tmp/."""
        return {path.name for path in unlinked(self.root / "tmp").glob("*")}

    def names_with(self, last: str) -> set[str]:
        """Return the names of folders in tmp/ in which a whole version of some folder was kept."""
        return {path.parts[-3] for path in unlinked(self.root / "tmp").glob(f"*/*/{last}")}

    def footprint(self, path: Path) -> tuple[int, float]:
        """Return the bytes of a file or folder, and when the newest of it was written, in seconds since 1970."""
        n_bytes, written = 0, 0.0
        for each in (path, *path.rglob("*")):
            with contextlib.suppress(FileNotFoundError):
                about = each.lstat()
                is_folder = stat.S_ISDIR(about.st_mode)
                n_bytes, written = n_bytes + (0 if is_folder else about.st_size), max(written, about.st_mtime)
        return n_bytes, written

    def keep(self, folder: Path, number: int, last: str) -> None:
        """Store a folder as its version `number`, the file `last` after the others."""

    def bring_back(self, folder: Path, last: str) -> None:
        """Bring the newest whole version of a folder that was kept here, if there is one."""
