"""Power cuts: what a disk would hold if everything that was not flushed to it were gone.

A run notes the content of every file and folder whenever `os.fsync` is called for it. At chosen calls it writes two
copies of the store as a disk could show it after a cut there:

*strict*   folders list what they listed when they were last flushed, files hold what they held then;
*eager*    folders are as they are now (renames went ahead), files hold what was last flushed, or nothing.
"""

from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from saeflow.store.verify import find_damage
from tests.faults import Runner, differences

VIEWS = ("strict", "eager")


@dataclass
class Disk:
    """What has been flushed, by inode; flushed files are held open so that no number comes twice."""

    root: Path
    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, dict[str, int]] = field(default_factory=dict)
    published: dict[str, list[str]] = field(default_factory=dict)
    """Folders of the parts of each artefact whose publication had returned."""
    n_flushes: int = 0

    def flushed(self, handle: int) -> None:
        about = os.fstat(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if not path.is_relative_to(self.root):
            return
        os.dup(handle)
        if stat.S_ISDIR(about.st_mode):
            self.folders[about.st_ino] = {e.name: e.inode() for e in os.scandir(path)}
        else:
            self.files[about.st_ino] = path.read_bytes()
        self.n_flushes += 1

    def strict(self, target: Path) -> None:
        """Only what was flushed."""
        self._lay_out(self.root.stat().st_ino, target)

    def _lay_out(self, folder: int, target: Path) -> None:
        target.mkdir(parents=True)
        for name, inode in self.folders.get(folder, {}).items():
            if inode in self.files:
                (target / name).write_bytes(self.files[inode])
            elif inode in self.folders:
                self._lay_out(inode, target / name)

    def eager(self, target: Path) -> None:
        """All names as they are now; content only where it was flushed."""
        target.mkdir(parents=True)
        for path in sorted(self.root.rglob("*")):
            place = target / path.relative_to(self.root)
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.write_bytes(self.files.get(path.stat().st_ino, b""))

    def cut(self, target: Path) -> None:
        for view in VIEWS:
            getattr(self, view)(target / view)
        (target / "published.json").write_text(json.dumps(self.published))


def record(root: Path, target: Path, at: frozenset[int]) -> None:
    """In this process: a cut before each of these flushes of something below `root`; counts them in `target`."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    for folder in (root, target):
        folder.mkdir(parents=True)
    disk = Disk(root)
    real: Callable[[int], None] = os.fsync
    publish = Artefact.publish

    def fsync(handle: int) -> None:
        if disk.n_flushes in at and not (target / f"{disk.n_flushes:05d}").exists():
            disk.cut(target / f"{disk.n_flushes:05d}")
        real(handle)
        disk.flushed(handle)
        (target / "n_flushes").write_text(str(disk.n_flushes))

    def noted(self: Artefact, *arguments: Any, **options: Any) -> Any:
        generation = publish(self, *arguments, **options)
        disk.published[self.id] = [part.folder for part in generation.parts]
        return generation

    os.fsync = fsync  # type: ignore[assignment]
    Artefact.publish = noted  # type: ignore[method-assign]


def power_cuts(runner: Runner, n_cuts: int) -> list[Path]:
    """Run twice: to count the flushes, and with cuts evenly spread over them; the folders that hold the views."""
    n_flushes = int((_recorded(runner, "counted", frozenset()) / "n_flushes").read_text())
    cuts = _recorded(runner, "cut", frozenset(n_flushes * (2 * n + 1) // (2 * n_cuts) for n in range(n_cuts)))
    return sorted(path for path in cuts.iterdir() if path.is_dir())


def _recorded(runner: Runner, name: str, at: frozenset[int]) -> Path:
    store, target = runner.folder / name / "store", runner.folder / f"{name}-views"
    process = runner.start(store, partial(record, store, target, at))
    assert runner.finish(store, process) == 0, runner.said(store)
    assert differences(runner.undisturbed, store) == []
    return target


def problems(runner: Runner, cut: Path, view: str) -> list[str]:
    """Is what was published still whole, and does the plain command finish the work?"""
    store = cut / view
    found = []
    for name, folders in json.loads((cut / "published.json").read_text()).items():
        artefact = Store(store).by_id(name)
        now = artefact.generation()
        if now is None or [part.folder for part in now.parts] != folders:
            found.append(f"{name}: a published generation is lost")
        found += [str(each) for each in find_damage(artefact, full=True)]
    if runner.run(store) != 0 or "Traceback" in runner.said(store):
        return [*found, f"the run afterwards:\n{runner.said(store)}"]
    return found + differences(runner.undisturbed, store)
