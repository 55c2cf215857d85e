"""Threads that each use one core: quicker here than torch's own threads, which wait for one another at every step."""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from dask.system import cpu_count

Item = TypeVar("Item")
Result = TypeVar("Result")


def n_threads(asked: int) -> int:
    """Threads to use: as many as asked for, or one for each core that this process may use (affinity, cgroup)."""
    return asked or cpu_count()


def keep_freed_memory() -> None:
    """Let the C library keep blocks of up to 32 MiB for the next use instead of giving them back to the system.

    A training step frees and takes the same megabytes again; getting them from the system took a fifth of its time.
    Numbers are those of glibc's malloc.h; other libraries have no `mallopt` and go on as they are.
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 32 << 20)
        library.mallopt(trim_threshold, (1 << 31) - 1)


def use_one_thread() -> None:
    """Let torch use one thread for what the calling thread asks of it."""
    torch.get_num_threads()  # the first call in a thread would otherwise undo the next
    torch.set_num_threads(1)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Results of `work` in the order of `items`, computed by several threads, at most twice as many ahead."""
    with ThreadPoolExecutor(workers, "saeflow-work", initializer=use_one_thread) as pool:
        pending: deque[Future[Result]] = deque()
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
