"""Listings of a bucket: made once for each artefact, then kept up to date with what is sent from here."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left

from saeflow.store.records import KINDS
from saeflow.store.storage.objects import Found, Objects


class Listing:
    """All objects below a prefix, by key."""

    def __init__(self, found: dict[str, Found]) -> None:
        self.found = found
        self._sorted: list[str] | None = None

    def add(self, key: str, n_bytes: int) -> None:
        """Note an object that was sent just now."""
        self.found[key] = Found(n_bytes, time.time())
        self._sorted = None

    def below(self, key: str) -> list[str]:
        """Return the keys below a key, without a walk through all of them."""
        if self._sorted is None:
            self._sorted = sorted(self.found)
        keys = self._sorted
        return keys[bisect_left(keys, f"{key}/") : bisect_left(keys, f"{key}0")]  # 0 comes after /


class Listings:
    """The listings of a bucket: one for each artefact that was asked for, one for each folder beside the artefacts."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._made: dict[str, Listing] = {}
        self._lock = threading.RLock()

    def of(self, key: str) -> Listing:
        """Return the listing in which a key is, or would be."""
        first, _, rest = key.partition("/")
        prefix = f"{first}/{rest.partition('/')[0]}" if first in KINDS else first
        with self._lock:
            if prefix not in self._made:
                metas = self._objects.list(prefix)
                found = {meta["path"]: Found(meta["size"], meta["last_modified"].timestamp()) for meta in metas}
                self._made[prefix] = Listing(found)
            return self._made[prefix]

    def add(self, key: str, n_bytes: int) -> None:
        """Note an object that was sent just now, in the listings that were made."""
        with self._lock:
            for prefix, listing in self._made.items():
                if key.startswith(f"{prefix}/"):
                    listing.add(key, n_bytes)

    def forget(self, folder: str = "") -> None:
        """List a folder, or everything, again when it is asked for."""
        with self._lock:
            for prefix in [prefix for prefix in self._made if prefix.startswith(folder)]:
                del self._made[prefix]
