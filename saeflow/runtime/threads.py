"""Threads that use one core each. They are faster than torch's own, which wait for one another at every operation."""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from dask.system import cpu_count

WorkItem = TypeVar("WorkItem")
WorkResult = TypeVar("WorkResult")


def n_threads(asked: int) -> int:
    """Return the threads to use: `asked`, or for 0 one per core that this process may use (affinity, cgroup)."""
    return asked or cpu_count()


def keep_freed_memory() -> None:
    """Make the C library keep freed blocks of up to 32 MiB instead of returning them to the system.

    Each training step frees the same megabytes and takes them again. Getting them from the system took a fifth of its
    time. The numbers come from glibc's malloc.h. Libraries without `mallopt` stay as they are.
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 32 << 20)
        library.mallopt(trim_threshold, (1 << 31) - 1)


def use_one_thread() -> None:
    """Let torch use one thread for the calls of this thread."""
    torch.get_num_threads()  # the first call in a thread would otherwise undo the next
    torch.set_num_threads(1)


def map_in_order(
    work: Callable[[WorkItem], WorkResult], items: Iterable[WorkItem], workers: int
) -> Iterator[WorkResult]:
    """Yield the results of `work` in the order of `items`. Threads run ahead by at most twice their number."""
    with ThreadPoolExecutor(workers, "saeflow-work", initializer=use_one_thread) as pool:
        pending: deque[Future[WorkResult]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
