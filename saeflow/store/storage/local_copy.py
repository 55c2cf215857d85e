"""What a bucket holds, listed once, and which files of the folder that stands for it are the bucket's.

A note in tmp/ says, for each file of an artefact's own, with which checksum and tag it was last sent or fetched.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from saeflow.store.files import checksum
from saeflow.store.links import remove
from saeflow.store.records import KINDS, FileRecord, damaged
from saeflow.store.storage.objects import REQUESTS_AT_ONCE, Found, Objects


class Listing:
    """All objects below a prefix, by key."""

    def __init__(self, found: dict[str, Found]) -> None:
        self.found = found
        self._sorted: list[str] | None = None

    def add(self, key: str, found: Found) -> None:
        """Note an object that was sent just now."""
        self.found[key] = found
        self._sorted = None

    def below(self, key: str) -> list[str]:
        """Return the keys below a key, without a walk through all of them."""
        if self._sorted is None:
            self._sorted = sorted(self.found)
        keys = self._sorted
        return keys[bisect_left(keys, f"{key}/") : bisect_left(keys, f"{key}0")]  # 0 comes after /


class Listings:
    """The listings of a bucket: one for each artefact that was asked for, one for each folder beside the artefacts.

    They are one look at the bucket: `forget` ends it, and with it all that is known of objects that may change.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._made: dict[str, Listing] = {}
        self._asked: dict[str, Found] = {}
        """Objects that were asked for one by one, by key."""
        self._n_changes = 0
        self._lock = threading.RLock()

    def of(self, key: str) -> Listing:
        """Return the listing in which a key is, or would be."""
        prefix, _ = _listed_with(key)
        with self._lock:
            if prefix not in self._made:
                found = {meta["path"]: Found.of(meta) for meta in self._objects.list(prefix)}
                self._made[prefix] = Listing(found)
            return self._made[prefix]

    def about(self, key: str) -> Found:
        """Return what this look has found of an object. Raises FileNotFoundError.

        An artefact, which may have very many objects, is not listed to find one.
        """
        prefix, is_artefact = _listed_with(key)
        with self._lock:
            listed = self.of(key).found if not is_artefact or prefix in self._made else {}
            known, before = listed.get(key) or self._asked.get(key), self._n_changes
        if known is not None:
            return known
        found = self._objects.about(key)
        with self._lock:
            if self._n_changes == before:
                self._asked[key] = found
        return found

    def add(self, key: str, n_bytes: int, tag: str) -> None:
        """Note an object that was sent just now."""
        found = Found(n_bytes, time.time(), tag)
        with self._lock:
            self._n_changes += 1
            self._asked[key] = found
            for prefix, listing in self._made.items():
                if key.startswith(f"{prefix}/"):
                    listing.add(key, found)

    def forget(self, folder: str = "") -> None:
        """Look at a folder, or everything, again when it is asked for."""
        with self._lock:
            self._n_changes += 1
            for known in (self._made, self._asked):
                for key in [key for key in known if key.startswith(folder)]:
                    del known[key]


def _listed_with(key: str) -> tuple[str, bool]:
    """Return the prefix with which a key is listed, and whether an artefact lies below it."""
    first, _, rest = key.partition("/")
    return (f"{first}/{rest.partition('/')[0]}", True) if first in KINDS else (first, False)


_UNSENT_SECONDS = 86_400
"""Age from which a file that was never sent is not about to be."""


class LocalCopy:
    """The records of a bucket, and the other files that were asked for."""

    def __init__(self, objects: Objects, root: Path) -> None:
        self.objects, self.root = objects, root

    def key(self, path: Path) -> str:
        """Return the key of the object that a path stands for."""
        return path.relative_to(self.root).as_posix()

    def pull(self) -> None:
        """Bring the records of every artefact here that are new, and drop what is no longer there.

        One listing for the bucket and each kind, two for each artefact, whatever it holds; parts are not looked at.
        What was never in the bucket as it is here stays: a run of this machine is about to send it.
        """
        top = self.objects.list_level("")
        kinds = [kind for kind in top["common_prefixes"] if kind != "tmp"]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            levels = pool.map(self.objects.list_level, kinds)
            artefacts = [artefact for level in levels for artefact in level["common_prefixes"]]
            found = [*top["objects"], *itertools.chain.from_iterable(pool.map(self._own_objects, artefacts))]
        self._bring(found, self.root, keep_unsent=True)

    def pull_one(self, folder: Path) -> None:
        """Bring the records of one artefact here; what was never sent is a killed run's, and goes."""
        self._bring(self._own_objects(self.key(folder)), folder, keep_unsent=False)

    def _own_objects(self, artefact: str) -> list[Any]:
        """Return the objects of an artefact that belong to no part."""
        level, lists = self.objects.list_level(artefact), f"{artefact}/generations"
        below = self.objects.list_level(lists)["objects"] if lists in level["common_prefixes"] else []
        return [*level["objects"], *below]

    def _own_files(self, folder: Path) -> Iterator[Path]:
        """Yield the files of an artefact that belong to no part; of every artefact if the folder is the root.

        Files with a dot before their names are being written, and are left out.
        """
        patterns = ("*", "*/*/*", "*/*/generations/*") if folder == self.root else ("*", "generations/*")
        for path in itertools.chain.from_iterable(map(folder.glob, patterns)):
            if path.is_file() and path.name[0] != "." and not path.is_relative_to(self.root / "tmp"):
                yield path

    def _bring(self, found: list[Any], folder: Path, keep_unsent: bool) -> None:
        known = {str(meta["path"]): meta for meta in found}
        for path in self._own_files(folder):
            if self.key(path) not in known and not (keep_unsent and self._is_unsent(path)):
                path.unlink(missing_ok=True)
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            list(pool.map(lambda key: self._refresh(self.root / key, known[key], keep_unsent), known))

    def _refresh(self, path: Path, meta: Any, keep_unsent: bool) -> None:
        """Bring a record that has changed; drop another file that is not the bucket's any more."""
        if path.suffix == ".json":
            self._refresh_record(path, str(meta["e_tag"]))
            return
        with contextlib.suppress(FileNotFoundError):  # another process of this machine may look at the same time
            unsent = keep_unsent and self._noted(path) and self._is_unsent(path)
            if path.is_file() and not unsent and not self._is_current(path, meta):
                path.unlink()
            if path.parent.name == "generations" and not path.is_file():
                self.download(path)

    def _refresh_record(self, path: Path, tag: str) -> None:
        """Bring a record, unless the one that is here is the one with this tag."""
        if self.tag(path) != tag:
            self.download(path)

    def tag(self, path: Path) -> str | None:
        """Return the tag with which a file was last sent or fetched as it is here; None if it never was."""
        with contextlib.suppress(FileNotFoundError):
            digest = checksum(path)
            noted = self._noted(path)
            return noted[1] if noted[:1] == [digest] else None
        return None

    def download(self, path: Path, key: str | None = None) -> None:
        """Bring a file here, from an object of its own key or of another. Raises FileNotFoundError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        key, temporary = key or self.key(path), _temporary_name(path)
        try:
            tag = self.objects.download(key, temporary)
            if is_own(key):
                self.note(path, checksum(temporary), tag)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def require_recorded(self, path: Path, files: Callable[[], Iterable[FileRecord]]) -> None:
        """Bring a file here if it is missing or not as long as its record says, e.g. after a power cut.

        Raises Damaged if its object is not what the record says. No error if there is no object.
        """
        known = [file for file in files() if path.as_posix().endswith(f"/{file.name}")]
        if path.is_file() and (not known or path.stat().st_size in [file.n_bytes for file in known]):
            return
        with contextlib.suppress(FileNotFoundError):
            self.download(path)
            if known and checksum(path) not in [file.checksum for file in known]:
                path.unlink()
                raise damaged(path)

    def _is_current(self, path: Path, meta: Any) -> bool:
        """True if a file is the object of the listing. A file that was sent from here then gets the object's time."""
        about, written = path.stat(), meta["last_modified"].timestamp()
        if about.st_size == meta["size"] and abs(about.st_mtime - written) < 1e-3:  # as rsync compares
            return True
        if self._noted(path) != [checksum(path), str(meta["e_tag"])]:
            return False
        os.utime(path, (written, written))
        return True

    def _is_unsent(self, path: Path) -> bool:
        """True if the bucket never had a file as it is here.

        A day later the file is a killed run's, and counts no more.
        """
        with contextlib.suppress(FileNotFoundError):
            return self._noted(path)[:1] != [checksum(path)] and time.time() - path.stat().st_mtime < _UNSENT_SECONDS
        return False

    def _noted(self, path: Path) -> list[str]:
        """Return the checksum and tag with which a file was last sent or fetched; nothing if it never was."""
        with contextlib.suppress(FileNotFoundError):
            return self._note_of(path).read_text("utf-8").split(" ", 1)
        return []

    def note(self, path: Path, digest: str, tag: str) -> None:
        """Remember that a file of an artefact's own is in the bucket now."""
        if self._noted(path) == [digest, tag]:
            return
        note = self._note_of(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(note)
        temporary.write_text(f"{digest} {tag}", "utf-8")
        os.replace(temporary, note)

    def remove(self, path: Path) -> None:
        """Remove a file or folder, and what is noted of it."""
        for here in (path, self._note_of(path)):
            remove(here)

    def _note_of(self, path: Path) -> Path:
        return self.root / "tmp" / "known" / self.key(path)


def is_own(key: str) -> bool:
    """True if a file belongs to an artefact or the store itself, not to a part or to work in progress."""
    return not key.startswith("tmp/") and "/parts/" not in key


def _temporary_name(path: Path) -> Path:
    """Return a name beside a file, of this thread alone, for what takes the file's place."""
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
