"""Shuffled minibatches from a store larger than memory: a pure plan, and a reader of Dask threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from dask.base import compute
from dask.delayed import delayed
from torch import Tensor

from saeflow import arrays, tokens
from saeflow.config import FeedConfig, UserError
from saeflow.disk import human_bytes
from saeflow.model import Site
from saeflow.store import Artefact, PartRecord


@dataclass(frozen=True)
class Pool:
    """Blocks that are in memory together, and the batches of global row numbers drawn from them."""

    blocks: np.ndarray
    batches: list[np.ndarray]


def plan_epoch(
    rows_of: Sequence[np.ndarray] | Callable[[int], np.ndarray],
    n_blocks: int,
    pool_blocks: int,
    batch_rows: int,
    seed: int,
    epoch: int = 0,
) -> Iterator[Pool]:
    """Every row once, in pools of at most `pool_blocks` randomly chosen blocks, mixed inside each pool.

    `rows_of` gives a block's row numbers. Batches of one pool differ in size by at most one row. Pure:
    the same arguments give the same plan on any machine.
    """
    look = rows_of if callable(rows_of) else rows_of.__getitem__
    order = np.random.default_rng([seed, epoch]).permutation(n_blocks)
    for number, start in enumerate(range(0, n_blocks, pool_blocks)):
        blocks = np.sort(order[start : start + pool_blocks])
        rows = np.concatenate([look(int(block)) for block in blocks])
        rows = np.random.default_rng([seed, epoch, number]).permutation(rows)
        batches = np.array_split(rows, -(-len(rows) // batch_rows)) if len(rows) else []
        yield Pool(blocks, list(batches))


@dataclass(frozen=True)
class Block:
    """A run of sequences inside one part."""

    part: PartRecord
    start: int
    stop: int


def plan_blocks(parts: Sequence[PartRecord], block_sequences: int) -> list[Block]:
    """Training sequences of the parts, cut into blocks; held-out ones, which end each part, stay out."""
    return [
        Block(part, start, min(start + block_sequences, part.counts["n_train_sequences"]))
        for part in parts
        for start in range(0, part.counts["n_train_sequences"], block_sequences)
    ]


class Feed:
    """Minibatches (B, D) of the training tokens of one site, read ahead by Dask threads.

    Half of `pool_bytes` is being mixed while the other half is being read. Raises UserError when that
    half cannot hold one block.
    """

    def __init__(self, source: Artefact, target: Artefact, site: Site, config: FeedConfig) -> None:
        self.config, self.site, self.target = config, site, target
        parts = target.published().parts
        token_parts = {part.index: part for part in source.published().parts}
        length = source_length(source)
        self.arrays = {part.index: arrays.open_site(target, part, site) for part in parts}
        self.dtype = getattr(torch, str(next(iter(self.arrays.values())).attrs["dtype"]))
        item_bytes = self.dtype.itemsize
        sequence_bytes = length * site.width * item_bytes
        block_sequences = max(1, config.block_bytes // sequence_bytes)
        self.blocks = plan_blocks(parts, block_sequences)
        self.pool_blocks = config.pool_bytes // 2 // (block_sequences * sequence_bytes)
        if self.pool_blocks < 1:
            need = 2 * block_sequences * sequence_bytes
            raise UserError(
                f"feed.pool_bytes is {human_bytes(config.pool_bytes)}, but one block read and one mixed take {human_bytes(need)}.\n"
                f"Set feed.pool_bytes to at least {human_bytes(need)}, or feed.block_bytes to at most {human_bytes(config.pool_bytes // 2)}."
            )
        self.length, self.stride = length, block_sequences * length
        self._kept: tuple[tuple[Block, ...], Tensor, np.ndarray] | None = None
        self.lengths = {part.index: tokens.read_part(source, token_parts[part.index])[1].sum(1) for part in parts}
        if not self.n_rows:
            raise UserError(f"{source.id} has no training tokens. Read more documents, or lower corpus.held_out.")

    @cached_property
    def n_rows(self) -> int:
        """Unmasked training tokens in one epoch."""
        return sum(int(self.lengths[b.part.index][b.start : b.stop].sum()) for b in self.blocks)

    @cached_property
    def batches_per_epoch(self) -> int:
        return sum(len(pool.batches) for pool in self.pools(0))

    def _rows(self, number: int) -> np.ndarray:
        """Row numbers of a block's real tokens; block n owns the numbers from n × stride on."""
        block = self.blocks[number]
        lengths = self.lengths[block.part.index][block.start : block.stop]
        rows: np.ndarray = np.flatnonzero(np.arange(self.length) < lengths[:, None]) + number * self.stride
        return rows

    def pools(self, epoch: int) -> Iterator[Pool]:
        return plan_epoch(
            self._rows, len(self.blocks), self.pool_blocks, self.config.batch_rows, self.config.seed, epoch
        )

    def batches(self, skip: int = 0) -> Generator[Tensor, None, None]:
        """Batches (B, D) float32 without end, one epoch after the other, beginning after `skip` batches."""
        planned = self._planned(skip)
        n_rows = min(self.pool_blocks, len(self.blocks)) * self.stride
        halves = itertools.cycle([self._room(n_rows), self._room(n_rows)])
        batch = self._room(self.config.batch_rows)
        with ThreadPoolExecutor(1, "saeflow-feed") as ahead:
            pending = self._submit(ahead, planned, halves)
            while pending is not None:
                values, batches = pending.result()
                pending = self._submit(ahead, planned, halves)
                for places in batches:
                    taken = torch.index_select(values, 0, places, out=batch[: len(places)])
                    yield taken.to(torch.float32, copy=True)

    def _room(self, n_rows: int) -> Tensor:
        """Memory that is filled again and again: getting fresh pages takes longer than filling them."""
        return torch.empty(n_rows, self.site.width, dtype=self.dtype)

    def _planned(self, skip: int) -> Iterator[Pool]:
        epoch = 0
        while True:
            for pool in self.pools(epoch):
                if skip >= len(pool.batches):
                    skip -= len(pool.batches)
                    continue
                yield Pool(pool.blocks, pool.batches[skip:])
                skip = 0
            epoch += 1

    def _submit(
        self, ahead: ThreadPoolExecutor, planned: Iterator[Pool], halves: Iterator[Tensor]
    ) -> Future[tuple[Tensor, list[Tensor]]] | None:
        pool = next(planned, None)
        return None if pool is None else ahead.submit(self._read, pool, next(halves))

    def _read(self, pool: Pool, room: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The pool's values, blocks end to end, and its batches as places in them."""
        blocks = [self.blocks[int(number)] for number in pool.blocks]
        values, starts = self._values(tuple(blocks), room)
        shift = starts - pool.blocks * self.stride
        places = [batch + shift[np.searchsorted(pool.blocks, batch // self.stride)] for batch in pool.batches]
        return values, [torch.from_numpy(place) for place in places]

    def _values(self, blocks: tuple[Block, ...], room: Tensor) -> tuple[Tensor, np.ndarray]:
        """Values of the blocks in `room`, and where each begins. A store that fits in one pool is read once."""
        if self._kept is not None and self._kept[0] == blocks:
            return self._kept[1:]
        ends = np.cumsum([(block.stop - block.start) * self.length for block in blocks])
        starts = np.concatenate([[0], ends[:-1]])
        values = room[: int(ends[-1])]
        read = delayed(self._read_block)
        tasks = [read(block, values[a:b]) for block, a, b in zip(blocks, starts, ends, strict=True)]
        compute(*tasks, scheduler="threads", num_workers=2)
        if len(blocks) == len(self.blocks):
            self._kept = blocks, values, starts
        return values, starts

    def _read_block(self, block: Block, out: Tensor) -> None:
        values = arrays.read_rows(self.arrays[block.part.index], slice(block.start, block.stop))
        out.copy_(values.reshape(-1, self.site.width))


def source_length(source: Artefact) -> int:
    """Context length T of a token artefact."""
    return int(source.record.facts["context_length"])


def held_out_rows(source: Artefact, target: Artefact, site: Site, max_tokens: int) -> Iterator[Tensor]:
    """Unmasked held-out activations (n, D) float32, part by part, at most `max_tokens` in all."""
    token_parts = {part.index: part for part in source.published().parts}
    left = max_tokens
    for part in target.published().parts:
        start = part.counts["n_train_sequences"]
        if left <= 0 or start == part.counts["n_sequences"]:
            continue
        mask = tokens.read_part(source, token_parts[part.index])[1][start:]
        stop = start + int(np.searchsorted(mask.sum(1).cumsum(), left)) + 1
        values = arrays.read_rows(arrays.open_site(target, part, site), slice(start, stop))
        rows = values.reshape(-1, site.width)[torch.from_numpy(mask[: stop - start].reshape(-1))][:left]
        left -= len(rows)
        yield rows.float()
