"""Batches on their way to a GPU: each is copied, on a stream of its own, while the step before it is at work.

A ring of three slots, each with pinned memory of the host and memory of the device (CUDA C++ Programming Guide,
"Asynchronous Concurrent Execution"). One slot belongs to the step at work, one to the batch that is copied, one to the
batch that the host reads. A slot is filled again only when its copy is over, and copied again only when its step is.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Room = Callable[[Sequence[tuple[int, int]], torch.dtype], list[Tensor]]
"""Returns memory of the host for a batch: a tensor of each shape."""
Read = Callable[[Room | None], Iterator[tuple[Tensor, ...]]]
"""Yields batches, one tensor for each site; in the memory of `Room`, if there is one."""

N_SLOTS, _AHEAD = 3, 2


class Lane(Protocol):
    """What copies to a device, beside its queue of steps. An event says when all work before it is done."""

    def event(self) -> Any:
        """Return an event, which says that it is done until it is used."""

    def room(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return memory of the host and of the device."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any, then: Any) -> None:
        """Copy the first of each pair to the second, after an event of the steps, then set another one."""

    def mark(self, event: Any) -> None:
        """Set an event after the steps so far."""

    def hold_steps(self, event: Any) -> None:
        """Let the steps to come wait for an event of the copies."""

    def wait(self, event: Any) -> None:
        """Wait for an event on the host."""

    def close(self) -> None:
        """Let whoever gets the memory next wait for all copies."""


class CudaLane:
    """A stream for copies to one GPU."""

    def __init__(self, place: torch.device) -> None:
        self.place, self.stream = place, torch.cuda.Stream(place)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def room(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return torch.empty(shape, dtype=dtype, pin_memory=True), torch.empty(shape, dtype=dtype, device=self.place)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: torch.cuda.Event, then: torch.cuda.Event) -> None:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            for here, there in pairs:
                there.copy_(here, non_blocking=True)
            then.record(self.stream)

    def mark(self, event: torch.cuda.Event) -> None:
        event.record(torch.cuda.current_stream(self.place))

    def hold_steps(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.place).wait_event(event)

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def close(self) -> None:
        torch.cuda.current_stream(self.place).wait_stream(self.stream)


@dataclass
class _Slot:
    """Room for a batch on both sides."""

    copied: Any
    used: Any
    """After the step that uses the batch."""
    here: list[Tensor]
    there: list[Tensor]
    n_rows: int = 0


class _Ring:
    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._slots = itertools.cycle([_Slot(lane.event(), lane.event(), [], []) for _ in range(N_SLOTS)])
        self._filled: _Slot | None = None

    def room(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
        """Return pinned memory for the next batch; wait until what was there before is copied."""
        slot = self._filled = next(self._slots)
        self.lane.wait(slot.copied)
        slot.n_rows = shapes[0][0]
        if not slot.here or slot.n_rows > len(slot.here[0]):
            pairs = [self.lane.room(shape, dtype) for shape in shapes]
            slot.here, slot.there = [here for here, _ in pairs], [there for _, there in pairs]
            self.lane.mark(slot.used)  # steps at work may still use the memory that the device gives out again
        return [each[: slot.n_rows] for each in slot.here]

    def send(self) -> _Slot:
        """Copy the batch that was written to `room`."""
        slot = self._filled
        assert slot is not None
        pairs = [(here[: slot.n_rows], there[: slot.n_rows]) for here, there in zip(slot.here, slot.there, strict=True)]
        self.lane.copy(pairs, after=slot.used, then=slot.copied)
        return slot


def uploaded(read: Read, place: torch.device, lane: Lane | None = None) -> Generator[tuple[Tensor, ...], None, None]:
    """Yield the batches on a device, in their order and precision; on the processor those that `read` yields.

    A batch on a GPU is valid until the next one is asked for: its memory is used again.
    """
    if lane is None and place.type != "cuda":
        yield from read(None)
        return
    lane = lane or CudaLane(place)
    ring, waiting = _Ring(lane), deque[_Slot]()
    try:
        for _ in read(ring.room):
            waiting.append(ring.send())
            if len(waiting) == _AHEAD:
                yield from _handed_over(waiting.popleft(), lane)
        while waiting:
            yield from _handed_over(waiting.popleft(), lane)
    finally:
        lane.close()


def _handed_over(slot: _Slot, lane: Lane) -> Iterator[tuple[Tensor, ...]]:
    lane.hold_steps(slot.copied)
    yield tuple(there[: slot.n_rows] for there in slot.there)
    lane.mark(slot.used)
