"""Ranks: processes that work together, as `torchrun` or a cluster starts them, and the few exchanges between them.

All exchanges are collectives of torch.distributed: gloo for tensors in the processor's memory, NCCL for those on GPUs.
With one rank every exchange returns its input. All ranks must exchange the same things in the same order.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from saeflow.runtime.errors import ToldElsewhere, UserError

PATIENCE = timedelta(minutes=10)
"""Time after which a rank that takes no part in an exchange is given up."""
_ROLL_CALL_SECONDS = 10.0
"""Time in which each rank must answer once an exchange has failed."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the second before torch 2.13
_store: Store | None = None
"""Keys that all ranks can read. `torchrun` keeps them, so they outlive any rank."""
_messages = itertools.count()


class RankLost(UserError):
    """A rank has ended without a message, so the others cannot go on. What they were doing is half done."""


@dataclass(frozen=True)
class Ranks:
    """This process's number among `n` that work together."""

    number: int = 0
    n: int = 1

    @property
    def is_first(self) -> bool:
        """True on the rank that writes, publishes and speaks for all."""
        return self.number == 0

    def share(self, n_items: int) -> slice:
        """Return this rank's share of items 0 to `n_items`. Shares follow one another; sizes differ by at most one."""
        return slice(self.number * n_items // self.n, (self.number + 1) * n_items // self.n)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up the tensors of all ranks, in place. Every rank gets the same bits."""
        if self.n > 1:
            with _exchange(self):
                dist.all_reduce(tensor)
        return tensor

    def total(self, number: float) -> float:
        """Return the sum of a number over all ranks."""
        return number if self.n == 1 else self.sum_(torch.tensor(number, dtype=torch.float64)).item()

    def least_(self, tensor: Tensor) -> Tensor:
        """Take the smallest of all ranks' numbers, in place."""
        if self.n > 1:
            with _exchange(self):
                dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any rank has set it."""
        if self.n == 1:
            return list(flags)
        return [n_set > 0 for n_set in self.sum_(torch.tensor(flags, dtype=torch.int64)).tolist()]

    def together(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return each tensor with those of all ranks, in their order, one after another along the first dimension.

        Lengths may differ. All tensors travel in one exchange.
        """
        if self.n == 1:
            return tensors
        own = [tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors]
        sizes = self.gathered(torch.tensor([len(each) for each in own])).tolist()
        longest = max(map(sum, sizes))
        room = torch.cat([*own, own[0].new_empty(longest - sum(map(len, own)))])
        parts = [
            everything[: sum(size)].split(size)
            for everything, size in zip(self.gathered(room), sizes, strict=True)
        ]  # fmt: skip
        return tuple(
            torch.cat(bytes_).view(tensor.dtype).view(-1, *tensor.shape[1:])
            for bytes_, tensor in zip(zip(*parts, strict=True), tensors, strict=True)
        )

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the tensors (n, ...) of all ranks, in their order. All must have one shape."""
        out = tensor.new_empty(self.n * len(tensor), *tensor.shape[1:])
        with _exchange(self):
            _all_gather(out, tensor.contiguous())
        return out.view(self.n, *tensor.shape)

    def brought_to_first(self, share: Tensor, n_items: int) -> Tensor:
        """Return on the first rank all `n_items` items, in the processor's memory; elsewhere the share of this rank."""
        mine = share.detach().cpu().contiguous()
        if self.n == 1:
            return mine
        with _exchange(self):
            if not self.is_first:
                dist.send(mine, 0)
                return mine
            whole = mine.new_empty(n_items, *mine.shape[1:])
            whole[self.share(n_items)] = mine
            for number in range(1, self.n):
                dist.recv(whole[Ranks(number, self.n).share(n_items)], number)
        return whole

    def first_says(self, value: Any = None) -> Any:
        """Return the JSON-able value of the first rank on every rank. Others wait as long as the first rank works."""
        if self.n == 1:
            return value
        key = f"said/{next(_messages)}"
        if self.is_first:
            _keys().set(key, json.dumps(value))
        while not _keys().check([key]):
            if _keys().check(["ended/0"]):
                raise ToldElsewhere
            time.sleep(0.05)
        return json.loads(_keys().get(key))


ALONE = Ranks()
"""One process."""


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the ranks that `torchrun` has started, for the block.

    An error ends all ranks. Only the first to meet one raises it; the others raise ToldElsewhere.
    """
    store, number, n = next(iter(rendezvous("env://", timeout=PATIENCE)))
    with _joined(store, number, n) as ranks:
        yield ranks
    dist.destroy_process_group()


@contextlib.contextmanager
def joined_at(host: str, port: int, number: int, n: int) -> Iterator[Ranks]:
    """Join ranks that meet at an address, for the block, as `joined` does. The process may join others afterwards."""
    try:
        store = TCPStore(host, port, is_master=False, timeout=PATIENCE)
    except RuntimeError as error:
        raise UserError(
            f"This machine cannot reach {host}, port {port}, where {n} workers meet that train together.\n"
            "Open the network between them, or train without ranks."
        ) from error
    try:
        with _joined(store, number, n) as ranks:
            yield ranks
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def meeting_point(host: str) -> TCPStore:
    """Return keys for ranks to meet by, at a free port of this machine. They are there as long as the object is."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)


@contextlib.contextmanager
def _joined(store: Store, number: int, n: int) -> Iterator[Ranks]:
    global _store, _messages
    _store, _messages = PrefixStore("saeflow", store), itertools.count()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=n, timeout=PATIENCE)
    try:
        yield Ranks(number, n)
    except BaseException as error:
        if not _speaks(number):
            raise ToldElsewhere from error
        raise


def _keys() -> Store:
    assert _store is not None, "there are several ranks only inside of `joined`"
    return _store


def _speaks(number: int) -> bool:
    """True if this rank, which ends by an error, is the first one to say why."""
    try:
        _keys().set(f"ended/{number}", "")
        return int(_keys().add("told", 1)) == 1
    except RuntimeError:  # without `torchrun` the first rank keeps the store, and has taken it along
        return number <= 1


@contextlib.contextmanager
def _exchange(ranks: Ranks) -> Iterator[None]:
    """Explain an error inside by the rank that is gone, if one is."""
    try:
        yield
    except RuntimeError as error:
        lost, ended = _roll_call(ranks)
        if lost:
            which = f"Rank {lost[0]} was" if len(lost) == 1 else f"Ranks {', '.join(map(str, lost))} were"
            raise RankLost(
                f"{which} lost, of {ranks.n} that train together: ended, or out of reach. So all have stopped.\n"
                "Nothing up to the last checkpoint is lost: run the same command again, with any number of ranks."
            ) from error
        if ended:
            raise ToldElsewhere from error
        raise


def _roll_call(ranks: Ranks) -> tuple[list[int], list[int]]:
    """Return the ranks that do not answer, and those that have ended with a message of their own."""
    every, ended = set(range(ranks.n)), list[int]()
    answered = {ranks.number}
    try:
        _keys().set(f"alive/{ranks.number}", "")
        end = time.monotonic() + _ROLL_CALL_SECONDS
        while answered != every and time.monotonic() < end:
            ended = [number for number in every if _keys().check([f"ended/{number}"])]
            answered |= {number for number in every if _keys().check([f"alive/{number}"])} | set(ended)
            time.sleep(0.05)
    except RuntimeError:  # without `torchrun` the first rank keeps the store, and has taken it along
        return [0], []
    return sorted(every - answered), ended
