"""What a storage was asked for: requests by kind, bytes that came, bytes that were on this machine already."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Traffic:
    """Requests and bytes, since some moment or between two."""

    requests: Mapping[str, int] = field(default_factory=dict)
    """How many of each kind: HEAD, LIST, GET, PUT. What a broken connection repeats is not counted."""
    n_bytes: int | None = 0
    """Bytes read. None if the system does not say."""
    cached_bytes: int = 0
    """Bytes that the cache on this machine gave instead."""

    def __sub__(self, earlier: Traffic) -> Traffic:
        requests = Counter(self.requests)
        requests.subtract(earlier.requests)
        known = self.n_bytes is not None and earlier.n_bytes is not None
        n_bytes = (self.n_bytes or 0) - (earlier.n_bytes or 0) if known else None
        return Traffic(dict(+requests), n_bytes, self.cached_bytes - earlier.cached_bytes)


class TrafficMeter:
    """Counts as they grow. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = Counter[str]()
        self._n_bytes = self._cached_bytes = 0

    def add(self, kind: str, n_bytes: int = 0, n: int = 1) -> None:
        with self._lock:
            self._requests[kind] += n
            self._n_bytes += n_bytes

    def add_cached(self, n_bytes: int) -> None:
        with self._lock:
            self._cached_bytes += n_bytes

    @property
    def traffic(self) -> Traffic:
        with self._lock:
            return Traffic(dict(self._requests), self._n_bytes, self._cached_bytes)


def bytes_read_here() -> int | None:
    """Return the bytes that this process has read from files, cached by the system or not; None if nobody says."""
    try:
        lines = Path("/proc/self/io").read_text("ascii").splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["rchar"])
