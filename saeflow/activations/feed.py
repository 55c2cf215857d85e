"""Shuffled minibatches from a store larger than memory, read ahead by Dask threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from dask.threaded import get
from torch import Tensor

from saeflow.activations.epoch import (
    Block,
    Blocks,
    Pool,
    batches_of_pools,
    expected_partners,
    met_partners,
    plan_epoch,
    plan_pools,
    pool_blocks,
)
from saeflow.activations.shards import Stored, open_site
from saeflow.corpus.selection import TokenSelection
from saeflow.model.sites import Site
from saeflow.recipe.settings import FeedConfig
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord

_READERS, _OBJECT_READERS = 2, 8
"""Dask threads that read blocks."""
_MOST_OPEN = 128
"""Arrays that are kept open, of all sites: one takes two milliseconds to open."""
_SAMPLED_POOLS = 4
"""Pools of which the mixing is looked at."""


@dataclass(frozen=True)
class Mixing:
    """Tokens of its own document that a token meets in its batch: in this feed, in pools of blocks chosen at random,
    and in a perfect shuffle of the whole store."""

    feed: float
    random_blocks: float
    perfect: float

    def __str__(self) -> str:
        return (
            f"a token meets {self.feed:.2f} others of its document in a batch "
            f"({self.random_blocks:.2f} from blocks at random, {self.perfect:.2f} from a perfect shuffle)"
        )


@dataclass(frozen=True)
class Place:
    """Where an activation is stored: the part, the sequence (counted through the whole store), and the position in
    it."""

    part: int
    sequence: int
    position: int

    def __str__(self) -> str:
        return f"part {self.part}, sequence {self.sequence}, position {self.position}"


class Feed:
    """Minibatches (B, D) of the used training tokens of one site, or of several, aligned.

    Half of `pool_bytes` is being mixed while the other half is being read. Raises UserError when that half cannot
    hold one block.
    """

    def __init__(
        self,
        used: TokenSelection,
        target: Artefact,
        sites: Site | Sequence[Site],
        config: FeedConfig,
        generation: int | None = None,
    ) -> None:
        self.config, self.used, self.target = config, used, target
        self.sites = [sites] if isinstance(sites, Site) else list(sites)
        parts = (target.generation(generation) or target.published()).parts
        self._array = _opener(target, parts)
        first = parts[: max(1, _MOST_OPEN // len(self.sites))]  # of few parts all: what is missing is said at the start
        arrays = [self._array(part.index, site) for part in first for site in self.sites]
        self.dtype: torch.dtype = arrays[0].dtype
        self._row_bytes = sum(site.width for site in self.sites) * self.dtype.itemsize
        block_sequences, self.pool_blocks = pool_blocks(config, used.length * self._row_bytes)
        self.blocks = Blocks(parts, block_sequences)
        self.stride = block_sequences * used.length
        self.counts = self.blocks.sums(used.counts)
        """Selected tokens of every block."""
        self.n_bytes_read = 0
        """Stored bytes of the blocks read so far."""
        self._kept: tuple[tuple[Block, ...], list[Tensor], np.ndarray] | None = None
        if not self.n_rows:
            raise UserError(f"{used.source.id} has no training tokens. Read more documents, or lower corpus.held_out.")

    @property
    def site(self) -> Site:
        return self.sites[0]

    @property
    def n_rows(self) -> int:
        """Selected training tokens in one epoch."""
        return int(self.counts.sum())

    @cached_property
    def batches_per_epoch(self) -> int:
        return int(batches_of_pools(self._pools(0), self.counts, self.config.batch_rows).sum())

    def _pools(self, epoch: int) -> list[np.ndarray]:
        return plan_pools(len(self.blocks), self.pool_blocks, self.config.seed, epoch)

    def _rows(self, number: int) -> np.ndarray:
        """Row numbers of a block's used tokens; block n owns the numbers from n × stride on."""
        return np.arange(self.counts[number]) + number * self.stride

    def pools(self, epoch: int, first_pool: int = 0) -> Iterator[Pool]:
        about = self.config
        return plan_epoch(
            self._rows, len(self.blocks), self.pool_blocks, about.batch_rows, about.seed, epoch, first_pool
        )

    def batches(self, skip: int = 0) -> Generator[Tensor, None, None]:
        """Batches (B, D) of the first site, in the precision of the disk, without end, beginning after `skip`
        batches."""
        aligned = self.aligned(skip)
        try:
            for values in aligned:
                yield values[0]
        finally:
            aligned.close()

    def aligned(self, skip: int = 0) -> Generator[tuple[Tensor, ...], None, None]:
        """The same for all sites: one tensor (B, D) a site, the same tokens in the same rows."""
        planned = self._planned(skip)
        n_rows = min(self.pool_blocks, len(self.blocks)) * self.stride
        halves = itertools.cycle([self._room(n_rows), self._room(n_rows)])
        with ThreadPoolExecutor(1, "saeflow-feed") as ahead:
            pending = self._submit(ahead, planned, halves)
            while pending is not None:
                values, batches = pending.result()
                pending = self._submit(ahead, planned, halves)
                for places in batches:
                    yield tuple(_taken(each, places) for each in values)

    def whereabouts(self, batch: int, row: int) -> Place:
        """Where row `row` of batch number `batch` is stored: from the plan, the masks of one block, and no
        activations."""
        number, nth = divmod(int(next(self._planned(batch)).batches[0][row]), self.stride)
        block = self.blocks[number]
        used = self.used.mask(block.part.index, slice(block.start, block.stop)).reshape(-1).nonzero()[0]
        sequence, position = divmod(int(used[nth]), self.used.length)
        return Place(block.part.index, block.part.counts["first_sequence"] + block.start + sequence, position)

    def _room(self, n_rows: int) -> list[Tensor]:
        """Memory that is filled again and again: getting fresh pages takes longer than filling them."""
        return [torch.empty(n_rows, site.width, dtype=self.dtype) for site in self.sites]

    def _planned(self, skip: int) -> Iterator[Pool]:
        """Pools from the batch on that comes after `skip`; what is skipped is only counted."""
        for epoch in itertools.count():
            ends = batches_of_pools(self._pools(epoch), self.counts, self.config.batch_rows).cumsum()
            if skip >= ends[-1]:
                skip -= int(ends[-1])
                continue
            first = int(np.searchsorted(ends, skip, side="right"))
            skip -= int(ends[first - 1]) if first else 0
            for pool in self.pools(epoch, first):
                yield Pool(pool.blocks, pool.batches[skip:])
                skip = 0

    def _submit(
        self, ahead: ThreadPoolExecutor, planned: Iterator[Pool], halves: Iterator[list[Tensor]]
    ) -> Future[tuple[list[Tensor], list[np.ndarray]]] | None:
        pool = next(planned, None)
        return None if pool is None else ahead.submit(self._read, pool, next(halves))

    def _read(self, pool: Pool, room: list[Tensor]) -> tuple[list[Tensor], list[np.ndarray]]:
        """The pool's values by site, blocks end to end, and its batches as places in them."""
        values, starts = self._values(pool.blocks, room)
        shift = starts - pool.blocks * self.stride
        places = [batch + shift[np.searchsorted(pool.blocks, batch // self.stride)] for batch in pool.batches]
        return values, places

    def _values(self, numbers: np.ndarray, room: list[Tensor]) -> tuple[list[Tensor], np.ndarray]:
        """Values of the blocks in `room`, and where each begins. A store that fits in one pool is read once."""
        blocks = tuple(self.blocks[int(number)] for number in numbers)
        if self._kept is not None and self._kept[0] == blocks:
            return self._kept[1:]
        ends = self.counts[numbers].cumsum()
        starts = np.concatenate([[0], ends[:-1]])
        values = [each[: int(ends[-1])] for each in room]

        def read(place: int) -> None:
            self._read_block(blocks[place], [each[starts[place] : ends[place]] for each in values])

        # A bare graph of numbers: `delayed` would look into every tensor handed to it, which takes longer than reading.
        names = [f"block-{place}" for place in range(len(blocks))]
        get(
            {name: (read, place) for place, name in enumerate(names)},
            names,
            num_workers=_OBJECT_READERS if self.target.objects else _READERS,
        )
        n_sequences = sum(block.stop - block.start for block in blocks)
        self.n_bytes_read += n_sequences * self.used.length * self._row_bytes
        if len(blocks) == len(self.blocks):
            self._kept = blocks, values, starts
        return values, starts

    def _read_block(self, block: Block, out: list[Tensor]) -> None:
        """Fill `out` with the used tokens of the block, a tensor a site."""
        rows = slice(block.start, block.stop)
        whole = len(out[0]) == (block.stop - block.start) * self.used.length
        chosen = None if whole else torch.from_numpy(self.used.mask(block.part.index, rows).reshape(-1).nonzero()[0])
        for site, room in zip(self.sites, out, strict=True):
            array = self._array(block.part.index, site)
            if chosen is None:
                array.read_into(rows, room)
            else:
                torch.index_select(array.read(rows).reshape(-1, site.width), 0, chosen, out=room)

    def mixing(self) -> Mixing:
        """How well batches are mixed, from a sample of pools; reads the documents of their tokens, no activations."""
        planned = list(itertools.islice(self.pools(0), _SAMPLED_POOLS))
        owners = {int(n): self._owners(self.blocks[n]) for pool in planned for n in pool.blocks}
        batches = [
            np.array([owners[row // self.stride][row % self.stride] for row in batch.tolist()])
            for pool in planned
            for batch in pool.batches[:2]
        ]
        chosen = np.random.default_rng([self.config.seed, 1 << 32])
        known = sorted(owners)
        sizes = []
        for _ in range(2 * _SAMPLED_POOLS):
            some = chosen.permutation(known)[: self.pool_blocks]
            sizes.append(np.unique(np.concatenate([owners[int(n)] for n in some]), return_counts=True)[1])
        random_blocks = float(np.mean([expected_partners(each, self.config.batch_rows) for each in sizes]))
        return Mixing(met_partners(batches), random_blocks, self._perfect(owners))

    def _owners(self, block: Block) -> np.ndarray:
        """document_id of the used tokens of a block."""
        return self.used.owners(block.part.index, slice(block.start, block.stop))

    def _perfect(self, owners: dict[int, np.ndarray]) -> float:
        """For the whole store, as if its documents were as large as those of the sample."""
        sizes = np.unique(np.concatenate(list(owners.values())), return_counts=True)[1]
        sampled = int(sizes.sum())
        others = float((sizes * (sizes - 1)).sum()) / max(sampled, 1)
        return others * (self.config.batch_rows - 1) / max(self.n_rows - 1, 1)


def _opener(target: Artefact, parts: Sequence[PartRecord]) -> Callable[[int, Site], Stored]:
    """Opens the array of a part, by its index, and site; the last ones stay open."""
    records = {part.index: part for part in parts}

    @lru_cache(_MOST_OPEN)
    def opened(index: int, site: Site) -> Stored:
        return open_site(target, records[index], site)

    return opened


def _taken(values: Tensor, places: np.ndarray) -> Tensor:
    """Rows of a pool, by one core: torch would call all of them away from reading ahead."""
    bits = values.view(torch.int16 if values.dtype.itemsize == 2 else torch.int32).numpy()
    return torch.from_numpy(np.take(bits, places, axis=0)).view(values.dtype)


def held_out_rows(used: TokenSelection, target: Artefact, site: Site, max_tokens: int) -> Iterator[Tensor]:
    """Selected held-out activations (n, D) float32, some at a time, at most `max_tokens` in all."""
    return (rows for (rows,) in aligned_held_out_rows(used, target, [site], max_tokens))


def aligned_held_out_rows(
    used: TokenSelection, target: Artefact, sites: Sequence[Site], max_tokens: int
) -> Iterator[tuple[Tensor, ...]]:
    """The same for several sites: one tensor (n, D) a site, the same tokens in the same rows.

    In the order of the store; no more is held at once than a shard of each site.
    """
    left = max_tokens
    for part in target.published().parts:
        first, n = part.counts["n_train_sequences"], part.counts["n_sequences"]
        if left <= 0 or first == n:
            continue
        stored = [open_site(target, part, site) for site in sites]
        mask = used.mask(part.index, slice(first, None))
        step = max(array.shard for array in stored)
        edges = [first, *range((first // step + 1) * step, n, step), n]
        for start, stop in itertools.pairwise(edges):
            chosen = mask[start - first : stop - first].reshape(-1).nonzero()[0][:left]
            if len(chosen):
                rows = slice(start, start + int(chosen[-1]) // used.length + 1)
                yield tuple(array.read(rows).flatten(0, 1)[torch.from_numpy(chosen)].float() for array in stored)
                left -= len(chosen)
