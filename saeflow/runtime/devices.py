"""Between the processor and a GPU: a stream for each thread, pinned memory, copies that only their own thread waits
for.

While one thread waits for its copy the GPU computes what another has asked for (CUDA C++ Programming Guide,
"Asynchronous Concurrent Execution"). On the processor all of this is nothing.
"""

from __future__ import annotations

import contextlib
import threading

import torch
from torch import Tensor

from saeflow.runtime.errors import UserError
from saeflow.runtime.memory import total_memory
from saeflow.runtime.threads import n_threads

_here = threading.local()
GPU_WORKERS = 2
"""Threads that feed a GPU: one batch is computed while the one before it leaves."""


def device(setting: str, name: str) -> torch.device:
    """`auto` is a GPU where there is one. Raises UserError, which names the setting, where a named one is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UserError(f'{setting} is {name!r}, but it may be "auto", "cpu", "cuda" or, of several, "cuda:1".')
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        seen = f"torch sees {torch.cuda.device_count()} CUDA devices" if number else "torch sees no CUDA device"
        raise UserError(f'{setting} is {name!r}, but {seen}. Use "auto" or "cpu".')
    if kind == "cuda":  # sums stay in float32, as the bounds of `encoding` have it
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.device(name)


def memory_of(place: torch.device) -> int:
    """Bytes of memory: this machine's, or what is free on a GPU."""
    return total_memory() if place.type == "cpu" else torch.cuda.mem_get_info(place)[0]


def n_workers(place: torch.device, threads: int) -> int:
    """Threads that run a model at once: as many as asked for on the processor, enough to keep a GPU busy."""
    return n_threads(threads) if place.type == "cpu" else GPU_WORKERS


def own_stream(place: torch.device) -> contextlib.AbstractContextManager[object]:
    """What this thread asks of a GPU inside the block is in a queue of its own."""
    if place.type != "cuda":
        return contextlib.nullcontext()
    if getattr(_here, "stream", None) is None:
        _here.stream = torch.cuda.Stream(place)
        _here.stream.wait_stream(torch.cuda.default_stream(place))  # weights may still be on their way
    return torch.cuda.stream(_here.stream)


def to_device(values: Tensor, place: torch.device) -> Tensor:
    return values.pin_memory().to(place, non_blocking=True) if place.type == "cuda" else values.to(place)


def to_processor(values: Tensor) -> Tensor:
    """The values in the processor's memory, all of them there."""
    if values.device.type != "cuda":
        return values.cpu()
    here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    here.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return here
