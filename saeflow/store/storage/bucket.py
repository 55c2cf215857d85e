"""A store in a bucket (s3://, gs://, az://), with a folder of this machine that stands for it.

The folder holds the records, as they are now, and the tables that were asked for. What a stage has finished is sent,
its record last; shards of arrays are read in ranges and not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from saeflow.runtime.errors import UserError
from saeflow.store.files import checksum, rename, write_bytes
from saeflow.store.lease_slot import Owner, Slot
from saeflow.store.links import remove
from saeflow.store.records import FileRecord
from saeflow.store.storage.folder import Storage
from saeflow.store.storage.local_copy import Listings, LocalCopy, is_own
from saeflow.store.storage.objects import REQUESTS_AT_ONCE, ObjectBytes, Objects
from saeflow.store.storage.piece_cache import PieceCache, cache_limit
from saeflow.store.storage.pieces import Pieces, piece_name
from saeflow.store.storage.traffic import Traffic
from saeflow.store.storage.work import Work
from saeflow.store.user_cache import trusted_folder

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

    from saeflow.store.storage.duckdb_files import BucketFiles

_ONE_REQUEST = 1 << 30
"""Bytes of the largest file that is held in memory to be sent."""

_DUCKDB_NEEDS = (
    "The files lie in an object store: copy this file here, and give the shell the extension httpfs (INSTALL httpfs;",
    "LOAD httpfs;) and your credentials (CREATE SECRET) before it is read.",
)

_SENDERS = 4
"""Files of a part on their way at once."""


class ComparedObjects(Storage):
    """Small objects of a bucket, replaced only while they still have the tag that was read."""

    objects: Objects
    local: LocalCopy
    listings: Listings

    def put_new(self, path: Path, content: bytes) -> bool:
        is_new = self._put_new(path, content)
        if is_new:
            write_bytes(path, content)
        return is_new

    def _put_new(self, path: Path, content: bytes) -> bool:
        """Store a file, but not on this machine. If another one has its name, that one is here then."""
        tag = self.objects.put(self.local.key(path), content, None)
        if tag is None:
            self.fetch(path, fresh=True)
            return False
        self._note(path, content, tag)
        return True

    def read(self, path: Path) -> tuple[bytes, str | None]:
        found = self.objects.read(self.local.key(path))
        if found is None:
            raise FileNotFoundError(self.location(path))
        return found

    def tag(self, path: Path) -> str | None:
        return self.local.tag(path)

    def put_if_unchanged(self, path: Path, content: bytes, tag: str | None) -> None:
        fresh = self.objects.put(self.local.key(path), content, tag)
        if fresh is None:
            try:
                self.fetch(path, fresh=True)
            except FileNotFoundError:
                self.local.remove(path)
            raise UserError(
                f"Another machine has published or removed {path.parent.name} in {self.name} since this run began.\n"
                "Nothing is lost; run the same command again."
            )
        self._note(path, content, fresh)
        write_bytes(path, content)

    def _note(self, path: Path, content: bytes, tag: str) -> None:
        self.local.note(path, xxhash.xxh3_128_hexdigest(content), tag)
        self.listings.add(self.local.key(path), len(content), tag)


class Bucket(ComparedObjects):
    """The objects below a URL, by the paths that stand for them below `root`. Safe to use from several threads."""

    n_readers = 8
    has_locks = False
    asks_a_server = True
    n_query_threads = REQUESTS_AT_ONCE
    duckdb_needs = _DUCKDB_NEEDS

    def __init__(self, objects: Objects, root: Path) -> None:
        super().__init__(trusted_folder(root))
        self.objects, self.local, self.listings = objects, LocalCopy(objects, root), Listings(objects)
        self.pieces = Pieces(objects, self.listings, PieceCache(root.parent / "pieces", cache_limit()))
        self.key = self.local.key
        self.work = BucketWork(self)

    @property
    def name(self) -> str:
        return self.objects.url

    def location(self, path: Path) -> str:
        return f"{self.objects.url}/{self.key(path)}"

    def shell_name(self, path: Path) -> str:
        return path.name

    def pull(self) -> None:
        self.listings.forget()
        self.local.pull()

    def pull_one(self, folder: Path) -> None:
        self.listings.forget(self.key(folder))
        self.local.pull_one(folder)

    def list_again(self) -> None:
        self.listings.forget()

    def size(self, path: str) -> int | None:
        key = self.key(Path(path))
        found = self.listings.of(key).found.get(key)
        return found.n_bytes if found else None

    def checksum(self, path: Path) -> str:
        return self.objects.checksum(self.key(path))

    def footprint(self, path: Path) -> tuple[int, float]:
        key = self.key(path)
        listing = self.listings.of(key)
        found = [listing.found[each] for each in (key, *listing.below(key)) if each in listing.found]
        return sum(each.n_bytes for each in found), max((each.written for each in found), default=0.0)

    def names_below(self, folder: Path) -> set[str]:
        key = self.key(folder)
        return {each.removeprefix(f"{key}/") for each in self.listings.of(key).below(key)}

    def versions(self, folder: Path) -> dict[str, object]:
        listing = self.listings.of(self.key(folder))
        return {key: listing.found[key].tag for key in listing.below(self.key(folder))}

    def fetch(self, path: Path, fresh: bool = False) -> Path:
        if fresh or not path.is_file():
            self.local.download(path)
        return path

    def fetch_recorded(self, path: Path, files: Callable[[], Iterable[FileRecord]]) -> Path:
        self.local.require_recorded(path, files)
        return path

    def open(self, path: Path) -> ObjectBytes:
        key = self.key(path)
        return ObjectBytes(self.objects, key, self.listings.about(key).n_bytes)

    def zarr(self, path: Path) -> Any:
        return self.objects.zarr(self.key(path))

    @property
    def filesystem(self) -> BucketFiles:
        from saeflow.store.storage.duckdb_files import BucketFiles

        return BucketFiles(self.name, self.pieces)

    def register(self, connection: DuckDBPyConnection) -> None:
        connection.register_filesystem(self.filesystem)

    def note_recorded(self, folder: Path, files: Iterable[FileRecord]) -> None:
        key = self.key(folder)
        self.pieces.recorded |= {f"{key}/{file.name}": file for file in files}

    def look_once(self, what: str, look: Callable[[], None]) -> None:
        cache, name = self.pieces.cache, piece_name("whole", self.name, what)
        if cache.get(name) is None:
            look()
            cache.put(name, b"")

    def traffic(self) -> Traffic:
        return self.objects.meter.traffic

    def send(self, *paths: Path) -> None:
        self.send_as((path, path) for path in paths)

    def send_as(self, pairs: Iterable[tuple[Path, Path]]) -> None:
        """Store files under the names of others, several at once."""

        def send_one(pair: tuple[Path, Path]) -> None:
            path, key = pair[0], self.key(pair[1])
            tag = self.objects.upload(path, key)
            if is_own(key):
                self.local.note(pair[1], checksum(path), tag)
            self.listings.add(key, path.stat().st_size, tag)

        with ThreadPoolExecutor(_SENDERS, "saeflow-send") as pool:
            list(pool.map(send_one, pairs))

    def send_folder(self, folder: Path, target: Path, names: Iterable[str]) -> None:
        """Store files of a folder as those of another."""
        self.send_as((folder / name, target / name) for name in names)

    def put_part(
        self, folder: Path, target: Path, names: Iterable[str], is_whole: Callable[[], bool], keep: bool
    ) -> None:
        self.send_folder(folder, target, names)
        self.send_folder(folder, target, ["part.json"])
        remove(target)
        if keep:
            rename(folder, target)
        else:
            remove(folder)

    def copy_part(self, source: Path, target: Path, work: Path, record: str) -> None:
        self.objects.copy_all(self.key(source), self.key(target))
        self.listings.forget(self.key(target))
        write_bytes(target / "part.json", record.encode())
        self.send(target / "part.json")

    def put_whole(
        self, folder: Path, target: Path, names: Iterable[str], last: str, require_lease: Callable[[], None]
    ) -> bool:
        """A file too large for one request goes in pieces, which no store compares with what is there."""
        for name in names:
            if (folder / name).stat().st_size > _ONE_REQUEST:
                self.send_folder(folder, target, [name])
            elif not self._put_new(target / name, (folder / name).read_bytes()):
                return False
        require_lease()
        if not self._put_new(target / last, (folder / last).read_bytes()):
            return False
        remove(target)
        rename(folder, target)
        return True

    def set_aside(self, path: Path) -> Path | None:
        target = self.aside(path)
        was_there = self.objects.copy_all(self.key(path), self.key(target))
        self.remove(path)
        return target if was_there else None

    def remove(self, path: Path) -> None:
        self.objects.delete(self.objects.keys(self.key(path)))
        self.local.remove(path)
        self.list_again()

    def new_slot(self, path: Path) -> Slot:
        return BucketSlot(self.objects, self.key(path), path)


class BucketWork(Work):
    """Work in progress here and in the bucket, which keeps the newest whole version of a folder."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket.root)
        self.bucket = bucket

    def keep(self, folder: Path, number: int, last: str) -> None:
        """Older versions go once the new one is whole."""
        older = [meta["path"] for meta in self.bucket.objects.list(self.bucket.key(folder))]
        target = folder / f"{number:09d}"
        self.bucket.send_folder(folder, target, [path.name for path in folder.iterdir() if path.name != last])
        self.bucket.send_folder(folder, target, [last])
        self.bucket.objects.delete([key for key in older if not key.startswith(f"{self.bucket.key(target)}/")])

    def bring_back(self, folder: Path, last: str) -> None:
        """The file `last` comes after the others: a folder without it was not brought whole."""
        found = (meta["path"] for meta in self.bucket.objects.list(self.bucket.key(folder)))
        keys = sorted(found, key=lambda key: (key.endswith(f"/{last}"), key))
        whole = [key.rpartition("/")[0] for key in keys if key.endswith(f"/{last}")]
        if not whole:
            return
        remove(folder)
        for key in keys:
            if key.startswith(f"{whole[-1]}/"):
                self.bucket.local.download(folder / key.rpartition("/")[2], key)

    def names_with(self, last: str) -> set[str]:
        kept = {key.split("/")[1] for key in self.bucket.listings.of("tmp").found if key.endswith(f"/{last}")}
        return super().names_with(last) | kept

    def names(self) -> set[str]:
        return super().names() | {key.split("/")[1] for key in self.bucket.listings.of("tmp").found}

    def footprint(self, path: Path) -> tuple[int, float]:
        both = super().footprint(path), self.bucket.footprint(path)
        return sum(n_bytes for n_bytes, _ in both), max(written for _, written in both)


class BucketSlot(Slot):
    """An object, written with the condition that it is still the one that was read: there is no lock to guard it."""

    def __init__(self, objects: Objects, key: str, path: Path) -> None:
        super().__init__(path)
        self.objects, self.key = objects, key

    def read(self) -> tuple[Owner | None, Any]:
        found = self.objects.read(self.key)
        return (Owner.parse(found[0].decode("utf-8", "replace")), found[1]) if found else (None, None)

    def swap(self, owner: Owner | None, tag: Any) -> tuple[bool, Any]:
        content = (owner.text if owner else "{}\n").encode()  # not deleted: that asks no condition
        fresh = self.objects.put(self.key, content, tag)
        return fresh is not None, fresh
