"""A GPU as the feed sees it, whose copies and steps are done as late as chance wants."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Record:
    """One setting of an event."""

    is_done: bool = False


@dataclass
class FakeEvent:
    """An event of CUDA: who waits for it waits for the newest setting before."""

    last: Record = field(default_factory=lambda: Record(True))


class FakeLane:
    """A GPU with two queues, each of which is worked through as late as chance wants, and never before it may."""

    def __init__(self, seed: int) -> None:
        self.copies: deque[Callable[[], bool]] = deque()
        self.steps: deque[Callable[[], bool]] = deque()
        self.dice = random.Random(seed)
        self.rooms: list[Tensor] = []

    def event(self) -> FakeEvent:
        return FakeEvent()

    def room(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        here, there = torch.full(shape, -1, dtype=dtype), torch.full(shape, -2, dtype=dtype)
        self.rooms += [here, there]
        return here, there

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: FakeEvent, then: FakeEvent) -> None:
        self._wait_in(self.copies, after)
        self.copies.append(lambda: all(there.copy_(here) is there for here, there in pairs))
        self._record_in(self.copies, then)

    def mark(self, event: FakeEvent) -> None:
        self._record_in(self.steps, event)

    def hold_steps(self, event: FakeEvent) -> None:
        self._wait_in(self.steps, event)

    def wait(self, event: FakeEvent) -> None:
        self.work(lambda: event.last.is_done)

    def close(self) -> None:
        self.work(lambda: not self.copies)

    def step(self, use: Callable[[], bool]) -> None:
        self.steps.append(use)
        for _ in range(self.dice.randrange(8)):
            self._work_once()

    def work(self, until: Callable[[], bool]) -> None:
        for _ in range(100_000):
            if until():
                return
            self._work_once()
        raise AssertionError("the queues wait for each other")

    def _work_once(self) -> None:
        queue = self.dice.choice([self.copies, self.steps])
        if queue and queue[0]():
            queue.popleft()

    def _wait_in(self, queue: deque[Callable[[], bool]], event: FakeEvent) -> None:
        record = event.last
        queue.append(lambda: record.is_done)

    def _record_in(self, queue: deque[Callable[[], bool]], event: FakeEvent) -> None:
        record = event.last = Record()

        def done() -> bool:
            record.is_done = True
            return True

        queue.append(done)
