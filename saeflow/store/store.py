"""A store: a folder of artefacts, or the object store that a folder stands for."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import Overlap
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, human_bytes
from saeflow.store.artefact import Artefact
from saeflow.store.files import make_folder, remove
from saeflow.store.lease import FileSlot, Lease, ObjectSlot, held
from saeflow.store.records import KINDS, Kind, damaged, read_checked, write_checked
from saeflow.store.storage import Objects, cache_folder, is_url


@dataclass(frozen=True)
class Store:
    """A folder of artefacts, or one that stands for an object store."""

    root: Path
    objects: Objects | None = field(default=None, compare=False)
    overlap: Overlap = field(default="refuse", compare=False)

    @classmethod
    def at(cls, root: str | Path, overlap: Overlap = "refuse") -> Store:
        """The store of a folder or URL, with the records as they are now."""
        if not is_url(root):
            return cls(Path(root).absolute(), overlap=overlap)
        objects = Objects(str(root).rstrip("/"), cache_folder(str(root).rstrip("/")))
        objects.pull()
        return cls(objects.root, objects, overlap)

    @property
    def name(self) -> str:
        """What `--store` calls it."""
        return self.objects.url if self.objects else str(self.root)

    @classmethod
    def create(cls, root: str | Path, overlap: Overlap = "refuse") -> Store:
        """Open for writing, making the folder if needed. Raises UserError where that cannot be.

        `overlap`: what is done where another run is writing.
        """
        store = cls.at(root, overlap)
        try:
            make_folder(store.root / "tmp")
            tempfile.TemporaryFile(dir=store.root / "tmp").close()
        except OSError as error:
            raise UserError(
                f"The store {store.root} cannot be written: {error.strerror}.\n"
                "Choose another folder with --store or SAEFLOW_STORE, or change its permissions."
            ) from error
        marker = store.root / "store.json"
        if not marker.exists():
            with FileSlot(store.root / "tmp" / "locks" / "store.lease").guard():  # two may begin a store at once
                write_checked(marker, {"format_version": FORMAT_VERSION})
            store.send(marker)
        read_checked(marker)
        return store

    @classmethod
    def open(cls, root: str | Path) -> Store:
        """Open for reading. Raises UserError where there is no store, or one that cannot be read."""
        store = cls.find(root)
        try:
            read_checked(store.root / "store.json")
        except FileNotFoundError:
            raise damaged(store.root / "store.json") from None
        return store

    @classmethod
    def find(cls, root: str | Path) -> Store:
        """A store whose marker may be damaged. Raises UserError where there is none."""
        store = cls.at(root)
        if not (store.root / "store.json").is_file() and not any((store.root / kind).is_dir() for kind in KINDS):
            raise UserError(
                f"No store at {store.name}. Name one with --store or SAEFLOW_STORE, or make one: `saeflow run RECIPE`."
            )
        return store

    @contextlib.contextmanager
    def writing(self, name: str, what: str) -> Iterator[Lease]:
        """Hold a lease of this name: for what is no artefact. Raises UserError as `Artefact.writing` does."""
        path = self.root / "tmp" / "locks" / f"{name}.lease"
        slot = FileSlot(path) if self.objects is None else ObjectSlot(self.objects, path)
        with held(slot, what, self.overlap) as lease:
            yield lease

    def send(self, path: Path) -> None:
        if self.objects is not None:
            self.objects.send([path])

    def remove(self, path: Path) -> None:
        """A file or folder of work in progress, here and in the object store."""
        if self.objects is not None:
            self.objects.remove(path)
        else:
            remove(path)

    def artefact(self, kind: Kind, name: str, fp: str) -> Artefact:
        return Artefact(self.root, kind, name, fp, self.objects, self.overlap)

    def by_id(self, id: str) -> Artefact:
        """The artefact of a name such as `tokens/demo-0123abcd`. Raises UserError where it would lie somewhere else."""
        kind, _, folder = id.partition("/")
        name, _, fp = folder.rpartition("-")
        if kind not in KINDS or not name or "/" in folder:
            raise UserError(
                f"{brief(id)!r} in a record of {self.name} names no artefact: that is called "
                "<kind>/<name>-<fingerprint>.\n"
                "The record was not written by saeflow; do not use this store."
            )
        return Artefact(self.root, kind, name, fp, self.objects, self.overlap)  # type: ignore[arg-type]

    def artefacts(self, *kinds: Kind) -> list[Artefact]:
        """Existing artefacts, by kind and name, the newest last among equal names."""
        found = []
        for kind in kinds or KINDS:
            paths = sorted((self.root / kind).glob("?*-*/artefact.json"), key=lambda p: (p.stat().st_mtime_ns, p))
            found += [self.by_id(f"{kind}/{path.parent.name}") for path in paths]
        return found

    def told_apart(self, target: Artefact, facts: dict[str, Any]) -> str:
        """Why an artefact that is begun is another than the newest of its name; empty where there is none."""
        others = [other for other in self.artefacts(target.kind) if other.name == target.name and other != target]
        if target.exists() or not others:
            return ""
        mine, theirs = _flat(facts), _flat(others[-1].record.facts)
        names = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
        return (
            f"{target.kind}: a new artefact beside {others[-1].id}, because of {', '.join(names)}. "
            "To go on with that one, set them as they were."
        )

    def require_free(self, n_bytes: int, purpose: str) -> None:
        """Refuse to start work that the disk cannot hold. An object store tells nobody how much it holds."""
        if self.objects is not None:
            return
        free = shutil.disk_usage(self.root).free
        if n_bytes > free:
            raise UserError(
                f"{purpose} needs about {human_bytes(n_bytes)}, but {self.root} has {human_bytes(free)} free.\n"
                "Free some space, choose another disk with --store, or read fewer documents or sites."
            )


def _flat(facts: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def store_path(option: str | None, recipe: Recipe | None = None) -> str:
    """Folder or URL: `--store`, then SAEFLOW_STORE, then the recipe, then data/store."""
    found = option or os.environ.get("SAEFLOW_STORE") or (recipe.store if recipe else None) or "data/store"
    return found.removeprefix("file://")
