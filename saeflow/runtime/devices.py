"""Work on a GPU: one stream per thread, pinned memory, and copies that only their own thread waits for.

While one thread waits for its copy, the GPU computes for another (CUDA C++ Programming Guide, "Asynchronous Concurrent
Execution"). On the processor, these functions do nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading

import torch
from torch import Tensor

from saeflow.runtime.errors import UserError
from saeflow.runtime.memory import total_memory
from saeflow.runtime.threads import n_threads

_here = threading.local()
GPU_WORKERS = 2
"""Threads that feed a GPU: it computes one batch while the one before it is copied back."""


def choose_device(setting: str, name: str) -> torch.device:
    """Return the device of a setting; `auto` is a GPU if there is one.

    Each process that `torchrun` has started on this machine has a GPU of its own. Raises UserError that names the
    setting if the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UserError(
            f'{setting} is {name!r}, but it may be "auto", "cpu", "cuda", or "cuda:1" for one of several GPUs.'
        )
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        seen = f"torch sees {torch.cuda.device_count()} CUDA devices" if number else "torch sees no CUDA device"
        raise UserError(f'{setting} is {name!r}, but {seen}. Use "auto" or "cpu".')
    if kind == "cuda":  # the error bounds of `sae.encoder` need sums in float32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.device(name)


def device_memory(place: torch.device) -> int:
    """Return bytes of memory: the machine's total, or what is free on a GPU."""
    return total_memory() if place.type == "cpu" else torch.cuda.mem_get_info(place)[0]


def model_threads(place: torch.device, threads: int) -> int:
    """Return the threads that run a model at once: those asked for on the processor, or enough for a GPU."""
    return n_threads(threads) if place.type == "cpu" else GPU_WORKERS


def own_stream(place: torch.device) -> contextlib.AbstractContextManager[object]:
    """Inside the block, this thread's work for a GPU has its own queue."""
    if place.type != "cuda":
        return contextlib.nullcontext()
    if getattr(_here, "stream", None) is None:
        _here.stream = torch.cuda.Stream(place)
        _here.stream.wait_stream(torch.cuda.default_stream(place))  # the copy of the weights may still be running
    return torch.cuda.stream(_here.stream)


def to_device(values: Tensor, place: torch.device) -> Tensor:
    if place.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(place, non_blocking=place.type == "cuda")


def to_processor(values: Tensor) -> Tensor:
    """Return the values in the processor's memory, once all have arrived."""
    if values.device.type != "cuda":
        return values.cpu()
    here = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    here.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return here
