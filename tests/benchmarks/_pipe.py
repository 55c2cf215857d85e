"""A store behind a pipe of a given rate: what is read of it is counted, and waited for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class Pipe:
    """All readers share it: `rate` bytes/s, or as they can."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self.n_bytes = 0
        self.free_at = 0.0
        self.lock = threading.Lock()

    def wait(self, n_bytes: int) -> None:
        with self.lock:
            self.n_bytes += n_bytes
            if self.rate is None:
                return
            self.free_at = max(self.free_at, time.monotonic()) + n_bytes / self.rate
            until = self.free_at
        time.sleep(max(until - time.monotonic(), 0))

    @contextlib.contextmanager
    def installed(self, owner: type, name: str, size_of: Callable[..., int]) -> Iterator[None]:
        """In the method `name` of a class; `size_of` gets its arguments."""
        plain = getattr(owner, name)

        def read(*arguments: Any) -> Any:
            found = plain(*arguments)
            self.wait(size_of(*arguments))
            return found

        setattr(owner, name, read)
        try:
            yield
        finally:
            setattr(owner, name, plain)
