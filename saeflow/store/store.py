"""A store: the artefacts of a folder or a bucket, by kind and name."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import Overlap
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, human_bytes, is_utf8
from saeflow.store.artefact import Artefact
from saeflow.store.files import make_folder
from saeflow.store.lease import Lease, hold_lease
from saeflow.store.links import unlinked
from saeflow.store.records import KINDS, Damaged, Kind, damaged, is_refusal, read_checked, write_checked
from saeflow.store.storage.bucket import Bucket
from saeflow.store.storage.folder import Folder, Storage
from saeflow.store.storage.objects import Objects
from saeflow.store.user_cache import cache_folder


@dataclass(frozen=True, init=False)
class Store:
    """The artefacts of a folder, or of a bucket."""

    storage: Storage
    overlap: Overlap = field(compare=False)
    """What writers do if another run holds the lease."""

    def __init__(self, storage: str | Path | Storage, overlap: Overlap = "refuse") -> None:
        """Take a folder, URL or opened storage, with the records as this process saw them last."""
        object.__setattr__(self, "storage", storage if isinstance(storage, Storage) else storage_of(storage))
        object.__setattr__(self, "overlap", overlap)

    @classmethod
    def at(cls, root: str | Path | Storage, overlap: Overlap = "refuse") -> Store:
        """Return a store with the records as they are now."""
        store = cls(root, overlap)
        for name in (*KINDS, "tmp", "labels", "sweeps", "damaged", "store.json"):
            unlinked(store.root / name)
        store.storage.pull()
        return store

    @property
    def root(self) -> Path:
        """The folder of this machine that holds the store, or stands for it."""
        return self.storage.root

    @property
    def name(self) -> str:
        """What `--store` calls the store."""
        return self.storage.name

    @classmethod
    def create(cls, root: str | Path | Storage, overlap: Overlap = "refuse") -> Store:
        """Open for writing, and make the folder if needed. Raises UserError if that cannot be done."""
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
            with store.storage.locked("store"):  # two may begin a store at once
                write_checked(marker, {"format_version": FORMAT_VERSION})
            store.storage.send(marker)
        read_checked(marker)
        return store

    @classmethod
    def open(cls, root: str | Path | Storage) -> Store:
        """Open for reading. Raises UserError if there is no store, or one that cannot be read."""
        store = cls.find(root)
        try:
            read_checked(store.root / "store.json")
        except FileNotFoundError:
            raise damaged(store.root / "store.json") from None
        return store

    @classmethod
    def find(cls, root: str | Path | Storage) -> Store:
        """Return a store whose marker may be damaged. Raises UserError if there is none."""
        store = cls.at(root)
        if not (store.root / "store.json").is_file() and not any((store.root / kind).is_dir() for kind in KINDS):
            raise UserError(
                f"No store at {store.name}. Name one with --store or SAEFLOW_STORE, or make one: `saeflow run RECIPE`."
            )
        return store

    @contextlib.contextmanager
    def writing(self, name: str, what: str) -> Iterator[Lease]:
        """Hold a lease of this name, for what is no artefact. Raises UserError as `Artefact.writing` does."""
        with hold_lease(self.storage.slot(name), what, self.overlap) as lease:
            yield lease

    def artefact(self, kind: Kind, name: str, fp: str) -> Artefact:
        return Artefact(self.storage, kind, name, fp, overlap=self.overlap)

    def by_id(self, id: str) -> Artefact:
        """Return the artefact of a name such as `tokens/demo-0123abcd`. Raises UserError if it would lie elsewhere."""
        kind, _, folder = id.partition("/")
        name, _, fp = folder.rpartition("-")
        if kind not in KINDS or not name or "/" in folder:
            raise UserError(
                f"{brief(id)!r} in a record of {self.name} names no artefact: that is called "
                "<kind>/<name>-<fingerprint>.\n"
                "The record was not written by saeflow; do not use this store."
            )
        return self.artefact(kind, name, fp)  # type: ignore[arg-type]

    def input_of(self, artefact: Artefact, kind: Kind) -> Artefact:
        """The artefact of this kind that another was made from. Raises UserError where its record names none."""
        name = artefact.record.input(kind)
        if name is None:
            raise UserError(f"The record of {artefact.id} does not say which {kind} it was made from.")
        return self.by_id(name)

    def artefacts(self, *kinds: Kind) -> list[Artefact]:
        """Return the existing artefacts by kind, the newest last."""
        found = []
        for kind in kinds or KINDS:
            names = fnmatch.filter(self.storage.names_here(self.root / kind), "?*-*")
            times = {name: _time_of(self.root / kind / name / "artefact.json") for name in names}
            ordered = sorted((time, name) for name, time in times.items() if time is not None)
            found += [self.by_id(f"{kind}/{name}") for _, name in ordered]
        return found

    def newest_of(self, kind: Kind, owner: str) -> dict[str, Artefact]:
        """Return the newest whole artefact of each name that belongs to these tokens, or to this run, by name.

        `owner` is an id such as `tokens/demo-0123abcd`. A damaged artefact counts as missing.
        """
        return {name: shown[0] for name, shown in self.shown_of(kind, owner).items()}

    def shown_of(self, kind: Kind, owner: str) -> dict[str, list[Artefact]]:
        """Return by name the artefacts that readers see: the newest, then older ones that add tables to it."""
        found: dict[str, list[Artefact]] = {}
        for artefact in reversed(self.artefacts(kind)):
            with contextlib.suppress(Damaged, FileNotFoundError):
                if owner_of(artefact) == owner and artefact.complete():
                    newer = found.setdefault(artefact.name, [])
                    if adds_tables(artefact, newer):
                        newer.append(artefact)
        return dict(sorted(found.items()))

    def why_new(self, target: Artefact, facts: dict[str, Any], ignored: Collection[str] = ()) -> str:
        """Say which settings set a new artefact apart from the newest of its name; empty if nothing is new."""
        others = [other for other in self.artefacts(target.kind) if other.name == target.name and other != target]
        if target.exists() or not others:
            return ""
        mine, theirs = _flat(facts), _flat(others[-1].record.facts)
        names = sorted(name for name in {*mine, *theirs}.difference(ignored) if mine.get(name) != theirs.get(name))
        if not names:
            return ""
        because = ", ".join(_FACTS_IN_WORDS.get(name, name) for name in names)
        way_back = "" if set(names) <= set(_FACTS_IN_WORDS) else " To go on with that one, set them as they were."
        return f"{target.kind}: a new artefact beside {others[-1].id}, because of {because}.{way_back}"

    def require_free(self, n_bytes: int, purpose: str) -> None:
        """Refuse to start work that the disk cannot hold. A bucket tells nobody how much it holds."""
        free = self.storage.free_bytes()
        if free is not None and n_bytes > free:
            raise UserError(
                f"{purpose} needs about {human_bytes(n_bytes)}, but {self.root} has {human_bytes(free)} free.\n"
                "Free some space, choose another disk with --store, or read fewer documents or sites."
            )


def owner_of(artefact: Artefact) -> str | None:
    """Return the id of the run, or else of the tokens, that annotations, probes or effects belong to."""
    return artefact.record.input("features") or artefact.record.input("tokens")


def adds_tables(older: Artefact, newer: Sequence[Artefact]) -> bool:
    """True if an artefact holds a table or class that newer ones of its name lack, and all are of the same values.

    `saeflow probe NAME` without --sparse, or with --class, therefore leaves visible what was probed before.
    """
    made_from = older.record.inputs, older.record.facts.get("values")
    if any((each.record.inputs, each.record.facts.get("values")) != made_from for each in newer):
        return False
    covered = {cell for each in newer for cell in _cells(each)}
    return not newer or any(not {(file, name), (file, None)} & covered for file, name in _cells(older))


def _cells(artefact: Artefact) -> set[tuple[str, str | None]]:
    """Return the tables of an artefact, each with its classes; None stands for all."""
    classes: Sequence[str | None] = classes_of(artefact) or [None]
    return {(file.name, name) for file in artefact.record.files for name in classes}


def classes_of(artefact: Artefact) -> list[str]:
    """Return the classes that a probe was limited to; none for all."""
    classes = artefact.record.facts.get("classes") if artefact.kind == "probes" else None
    return [str(each) for each in classes] if isinstance(classes, list) else []


def _time_of(record: Path) -> int | None:
    """Return when a record was written; 0 if this process may not know, None if there is no record."""
    try:
        return record.stat().st_mtime_ns
    except OSError as error:
        return 0 if is_refusal(error) else None


_FACTS_IN_WORDS = {
    "special_tokens": "special_tokens (the tokenizer's own, such as [CLS] and [SEP], which earlier versions left out)",
    "thresholds": "thresholds (jumprelu's follow sae.k, which they did not in earlier versions)",
}
"""Facts that no setting brings back, in words."""


def storage_of(name: str | Path, cache: Callable[[str], Path] = cache_folder) -> Storage:
    """Return the storage of a folder or URL. `cache` names the folder of this machine that stands for a bucket."""
    root = local_folder(name, cache)
    return Bucket(Objects(_url(name)), root) if _is_url(name) else Folder(root)


def local_folder(name: str | Path, cache: Callable[[str], Path] = cache_folder) -> Path:
    """Return the folder of this machine that holds a store, or stands for it."""
    folder = cache(_url(name)) if _is_url(name) else Path(name).absolute()
    if not is_utf8(str(folder)):
        raise UserError(f"The path of the store {str(folder)!a} is not UTF-8. Rename its folder, or choose another.")
    return folder


def _is_url(name: str | Path) -> bool:
    return "://" in str(name)


def _url(name: str | Path) -> str:
    return str(name).rstrip("/")


def _flat(facts: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Return settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def store_path(option: str | None, recipe: Recipe | None = None) -> str:
    """Return the folder or URL: `--store`, then SAEFLOW_STORE, then the recipe, then data/store."""
    found = option or os.environ.get("SAEFLOW_STORE") or (recipe.store if recipe else None) or "data/store"
    return found.removeprefix("file://")
