"""Threads that use one core each. They are faster than torch's own, which wait for one another at every operation."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from dask.system import cpu_count

WorkItem = TypeVar("WorkItem")
WorkResult = TypeVar("WorkResult")


def n_threads(asked: int) -> int:
    """Return the threads to use: `asked`, or for 0 one per core that this process may use (affinity, cgroup).

    Processes that `torchrun` has started on this machine share its cores.
    """
    return asked or max(cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


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


def use_threads(asked: int) -> None:
    """Let torch use as many threads as a recipe asks for, and keep the memory that it frees."""
    torch.set_num_threads(n_threads(asked))
    keep_freed_memory()


def use_one_thread() -> None:
    """Let torch use one thread for the calls of this thread."""
    torch.get_num_threads()  # the first call in a thread would otherwise undo the next
    torch.set_num_threads(1)


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread for what the calling thread asks of it inside the block."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ranges(n: int, size: int) -> list[tuple[int, int]]:
    """Cut 0..n into consecutive ranges of at most `size`; the end of a range is not part of it."""
    return [(start, min(start + size, n)) for start in range(0, n, size)]


@torch.no_grad()
def in_parallel(
    function: Callable[[WorkItem], WorkResult], items: Sequence[WorkItem], threads: int
) -> list[WorkResult]:
    """Return the results of `function` in the order of `items`, computed by `threads` workers.

    One thread means the calling thread. Torch uses one thread wherever `function` runs, so nothing competes for cores
    and no result depends on `threads`. `function` must not call `in_parallel`.
    """
    if threads == 1:
        with one_torch_thread():
            return [function(item) for item in items]
    return list(_executor(threads, os.getpid()).map(function, items))


@cache
def _executor(threads: int, process: int) -> ThreadPoolExecutor:
    """Start the workers of a process once for each count: to start them takes longer than most of their work."""
    before, barrier = torch.get_num_threads(), threading.Barrier(threads + 1)

    def prepare() -> None:
        use_one_thread()
        torch.set_grad_enabled(False)  # this too is a setting of the thread
        barrier.wait()

    workers = ThreadPoolExecutor(threads, "saeflow", initializer=prepare)
    for _ in range(threads):
        workers.submit(int)
    barrier.wait()
    torch.set_num_threads(before)  # threads started later take this as their default
    return workers


def map_in_order(
    work: Callable[[WorkItem], WorkResult], items: Iterable[WorkItem], workers: int, shared: Executor | None = None
) -> Iterator[WorkResult]:
    """Yield the results of `work` in the order of `items`. Threads run ahead by at most twice their number.

    `shared`: threads that do other work, too; else `workers` are started.
    """
    own = shared or ThreadPoolExecutor(workers, "saeflow-work", initializer=use_one_thread)
    with contextlib.nullcontext(shared) if shared else own as pool:
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
