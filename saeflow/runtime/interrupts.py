"""Ctrl-C and SIGTERM that wait until a step is done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block has ended: half a step must not be saved."""
    with interrupts_noted() as asked:
        yield
    if asked:
        signal.raise_signal(asked[0])


@contextlib.contextmanager
def interrupts_noted() -> Iterator[list[int]]:
    """Only note Ctrl-C and SIGTERM inside the block, in the list that it gets."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        yield asked
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
