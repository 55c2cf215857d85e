"""Shuffled batches from a store larger than memory, read ahead by Dask threads; and how well they are mixed."""

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

from saeflow.activations.epoch import Block, Pool, TrainingBlocks, batches_of_pools, fit_pool, plan_epoch, plan_pools
from saeflow.activations.lengths import LongVectors, longest_allowed, without_long
from saeflow.activations.shards import StoredArray, open_site
from saeflow.activations.upload import Room
from saeflow.corpus.selection import TokenSelection
from saeflow.model.sites import Site
from saeflow.recipe.settings import FeedConfig
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord

_MOST_OPEN = 128
"""Arrays of all sites that are kept open. Opening one takes two milliseconds."""


@dataclass(frozen=True)
class TokenLocation:
    """Where an activation is stored. Sequences are counted through the whole store."""

    part: int
    sequence: int
    position: int

    def __str__(self) -> str:
        return f"part {self.part}, sequence {self.sequence}, position {self.position}"


class Feed:
    """Shuffled batches (B, D) of the selected training tokens, of one site or of several that are aligned.

    Half of `pool_bytes` is mixed while the other half is read. Raises UserError if half cannot hold one block.
    """

    def __init__(
        self, selection: TokenSelection, target: Artefact, sites: Site | Sequence[Site], config: FeedConfig,
        generation: int | None = None,
    ) -> None:  # fmt: skip
        self.config, self.selection, self.target = config, selection, target
        self.sites = [sites] if isinstance(sites, Site) else list(sites)
        parts = (target.generation(generation) or target.published()).parts
        self._array = _opener(target, parts)
        first = parts[: max(1, _MOST_OPEN // len(self.sites))]  # a missing array shows at the start, if parts are few
        arrays = [self._array(part.index, site) for part in first for site in self.sites]
        self.dtype: torch.dtype = arrays[0].dtype
        self._row_bytes = sum(site.width for site in self.sites) * self.dtype.itemsize
        block_sequences, self.pool_blocks = fit_pool(config, selection.length * self._row_bytes)
        self.blocks = TrainingBlocks(parts, block_sequences)
        self.stride = block_sequences * selection.length
        limit = longest_allowed(selection, target, self.site)
        self._long = None if limit is None else LongVectors(target, parts, self.site, limit)
        self._n_too_long = 0
        self.counts = self.blocks.sums(self._counts)
        """Selected tokens of each block."""
        self.n_bytes_read = 0
        """Stored bytes of the blocks that were read so far."""
        self._kept: tuple[tuple[Block, ...], list[Tensor], np.ndarray] | None = None
        if not self.n_rows:
            raise UserError(
                f"{selection.source.id} has no training tokens. Read more documents, lower corpus.held_out, or skip "
                "fewer tokens (activations.skip_positions, skip_special, skip_norms_above, roles)."
            )

    def _counts(self, index: int) -> np.ndarray:
        """Return int64 (S,): selected tokens of every sequence of a part."""
        if self._long is None:
            return self.selection.counts(index)
        mask = self.selection.mask(index)
        short, train = (
            self._long.without(mask, index),
            slice(0, self.selection.parts[index].counts["n_train_sequences"]),
        )
        self._n_too_long += int(mask[train].sum() - short[train].sum())
        return np.asarray(short.sum(1))

    @property
    def left_out(self) -> dict[str, int]:
        """Training tokens that settings or forgotten documents leave out; nothing if no setting does."""
        if not self.selection.facts:
            return {}
        n_tokens = sum(part.counts["n_train_tokens"] for part in self.blocks.parts)
        found = {"n_left_out": n_tokens - self.n_rows}
        return found if self._long is None else found | {"n_left_out_by_length": self._n_too_long}

    def _mask(self, index: int, rows: slice = slice(None)) -> np.ndarray:
        """Return bool (s, T): the selected tokens of these sequences of a part."""
        mask = self.selection.mask(index, rows)
        return mask if self._long is None else self._long.without(mask, index, rows.start or 0)

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
        """Return the row numbers of a block's selected tokens. Block n owns the numbers from n × stride on."""
        return np.arange(self.counts[number]) + number * self.stride

    def pools(self, epoch: int, first_pool: int = 0) -> Iterator[Pool]:
        about = self.config
        return plan_epoch(
            self._rows, len(self.blocks), self.pool_blocks, about.batch_rows, about.seed, epoch, first_pool
        )

    def batches(self, skip: int = 0) -> Generator[Tensor, None, None]:
        """Yield batches (B, D) of the first site in the stored precision, without end, after the first `skip`."""
        aligned = self.aligned(skip)
        try:
            for values in aligned:
                yield values[0]
        finally:
            aligned.close()

    def aligned(self, skip: int = 0, room: Room | None = None) -> Generator[tuple[Tensor, ...], None, None]:
        """Yield batches of all sites: one tensor (B, D) per site, with the same tokens in the same rows.

        `room`, if given, is asked for each batch's memory.
        """
        planned = self._planned(skip)
        n_rows = min(self.pool_blocks, len(self.blocks)) * self.stride
        halves = itertools.cycle([self._room(n_rows), self._room(n_rows)])
        with ThreadPoolExecutor(1, "saeflow-feed") as ahead:
            pending = self._submit(ahead, planned, halves)
            while pending is not None:
                values, batches = pending.result()
                pending = self._submit(ahead, planned, halves)
                for places in batches:
                    shapes = [(len(places), site.width) for site in self.sites]
                    outs = room(shapes, self.dtype) if room else [None for _ in shapes]
                    yield tuple(_take_rows(each, places, out) for each, out in zip(values, outs, strict=True))

    def locate(self, batch: int, row: int) -> TokenLocation:
        """Return where row `row` of batch number `batch` is stored. Reads the masks of one block, no activations."""
        number, nth = divmod(int(next(self._planned(batch)).batches[0][row]), self.stride)
        block = self.blocks[number]
        selection = self._mask(block.part.index, slice(block.start, block.stop)).reshape(-1).nonzero()[0]
        sequence, position = divmod(int(selection[nth]), self.selection.length)
        return TokenLocation(block.part.index, block.part.counts["first_sequence"] + block.start + sequence, position)

    def _room(self, n_rows: int) -> list[Tensor]:
        """Memory to fill again and again, since getting fresh pages takes longer than filling them."""
        return [torch.empty(n_rows, site.width, dtype=self.dtype) for site in self.sites]

    def _planned(self, skip: int) -> Iterator[Pool]:
        """Yield the pools after the first `skip` batches. Skipped batches are only counted."""
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
        """Return the pool's values by site, with blocks end to end, and its batches as places in them."""
        values, starts = self._values(pool.blocks, room)
        shift = starts - pool.blocks * self.stride
        places = [batch + shift[np.searchsorted(pool.blocks, batch // self.stride)] for batch in pool.batches]
        return values, places

    def _values(self, numbers: np.ndarray, room: list[Tensor]) -> tuple[list[Tensor], np.ndarray]:
        """Read the blocks into `room`, and return where each begins. A store that fits in one pool is read once."""
        blocks = tuple(self.blocks[int(number)] for number in numbers)
        if self._kept is not None and self._kept[0] == blocks:
            return self._kept[1:]
        ends = self.counts[numbers].cumsum()
        starts = np.concatenate([[0], ends[:-1]])
        values = [each[: int(ends[-1])] for each in room]

        def read(place: int) -> None:
            self._read_block(blocks[place], [each[starts[place] : ends[place]] for each in values])

        # A bare graph of numbers: `delayed` would inspect every tensor in it, which takes longer than reading.
        names = [f"block-{place}" for place in range(len(blocks))]
        get({name: (read, at) for at, name in enumerate(names)}, names, num_workers=self.target.storage.n_readers)
        n_sequences = sum(block.stop - block.start for block in blocks)
        self.n_bytes_read += n_sequences * self.selection.length * self._row_bytes
        if len(blocks) == len(self.blocks):
            self._kept = blocks, values, starts
        return values, starts

    def _read_block(self, block: Block, out: list[Tensor]) -> None:
        """Fill `out` with the selected tokens of the block, one tensor per site."""
        rows = slice(block.start, block.stop)
        whole = len(out[0]) == (block.stop - block.start) * self.selection.length
        chosen = None if whole else torch.from_numpy(self._mask(block.part.index, rows).reshape(-1).nonzero()[0])
        for site, room in zip(self.sites, out, strict=True):
            array = self._array(block.part.index, site)
            if chosen is None:
                array.read_into(rows, room)
            else:
                torch.index_select(array.read(rows).reshape(-1, site.width), 0, chosen, out=room)


def _opener(target: Artefact, parts: Sequence[PartRecord]) -> Callable[[int, Site], StoredArray]:
    """Return a function that opens the array of a part (by index) and site. The last ones stay open."""
    records = {part.index: part for part in parts}

    @lru_cache(_MOST_OPEN)
    def opened(index: int, site: Site) -> StoredArray:
        return open_site(target, records[index], site)

    return opened


def _take_rows(values: Tensor, places: np.ndarray, out: Tensor | None = None) -> Tensor:
    """Take rows of a pool with one core, to `out` if given. torch would take all cores away from reading ahead."""
    bits = torch.int16 if values.dtype.itemsize == 2 else torch.int32
    source = values.view(bits).numpy()
    if out is None:
        return torch.from_numpy(np.take(source, places, axis=0)).view(values.dtype)
    np.take(source, places, axis=0, out=out.view(bits).numpy(), mode="clip")  # other modes write to a buffer first
    return out


def held_out_rows(selection: TokenSelection, target: Artefact, site: Site, max_tokens: int) -> Iterator[Tensor]:
    """Yield selected held-out activations (n, D) float32, some at a time, at most `max_tokens` in all."""
    return (rows for (rows,) in aligned_held_out_rows(selection, target, [site], max_tokens))


def aligned_held_out_rows(
    selection: TokenSelection, target: Artefact, sites: Sequence[Site], max_tokens: int
) -> Iterator[tuple[Tensor, ...]]:
    """Yield held-out activations of several sites: one tensor (n, D) per site, the same tokens in the same rows.

    Tokens come in the order of the store. At most one shard of each site is in memory. Those whose vectors are too long
    at the first site are passed over, but count towards `max_tokens`.
    """
    left, limit = max_tokens, longest_allowed(selection, target, sites[0])
    for part in target.published().parts:
        first, n = part.counts["n_train_sequences"], part.counts["n_sequences"]
        if left <= 0 or first == n:
            continue
        stored = [open_site(target, part, site) for site in sites]
        mask = selection.mask(part.index, slice(first, None))
        step = max(array.shard for array in stored)
        edges = [first, *range((first // step + 1) * step, n, step), n]
        for start, stop in itertools.pairwise(edges):
            chosen = mask[start - first : stop - first].reshape(-1).nonzero()[0][:left]
            if len(chosen):
                rows = slice(start, start + int(chosen[-1]) // selection.length + 1)
                values = [array.read(rows).flatten(0, 1)[torch.from_numpy(chosen)] for array in stored]
                yield tuple(each.float() for each in without_long(values, limit))
                left -= len(chosen)


_SAMPLED_POOLS = 4


@dataclass(frozen=True)
class BatchMixing:
    """Tokens of its own document that a token meets in a batch: three ways of choosing the batch."""

    feed: float
    random_blocks: float
    """In pools of randomly chosen blocks."""
    perfect: float
    """In a perfect shuffle of the whole store."""

    def __str__(self) -> str:
        return (
            f"a token meets {self.feed:.2f} others of its document in a batch "
            f"({self.random_blocks:.2f} from blocks at random, {self.perfect:.2f} from a perfect shuffle)"
        )


def measure_mixing(feed: Feed) -> BatchMixing:
    """Measure how well batches are mixed on a few pools. Reads the documents of their tokens, no activations."""
    planned = list(itertools.islice(feed.pools(0), _SAMPLED_POOLS))
    owners = {int(n): _owners(feed, feed.blocks[n]) for pool in planned for n in pool.blocks}
    batches = [
        np.array([owners[row // feed.stride][row % feed.stride] for row in batch.tolist()])
        for pool in planned
        for batch in pool.batches[:2]
    ]
    return BatchMixing(met_partners(batches), _random_blocks(feed, owners), _perfect(feed, owners))


def _owners(feed: Feed, block: Block) -> np.ndarray:
    """Return the document_id of the selected tokens of a block."""
    rows = slice(block.start, block.stop)
    return feed.selection.owners(block.part.index, rows, feed._mask(block.part.index, rows))


def _random_blocks(feed: Feed, owners: dict[int, np.ndarray]) -> float:
    dice = np.random.default_rng([feed.config.seed, 1 << 32])
    numbers = sorted(owners)
    expected = []
    for _ in range(2 * _SAMPLED_POOLS):
        chosen = dice.permutation(numbers)[: feed.pool_blocks]
        sizes = np.unique(np.concatenate([owners[int(n)] for n in chosen]), return_counts=True)[1]
        expected.append(expected_partners(sizes, feed.config.batch_rows))
    return float(np.mean(expected))


def _perfect(feed: Feed, owners: dict[int, np.ndarray]) -> float:
    """Expect it for the whole store, as if all documents were as large as those of the sample."""
    sizes = np.unique(np.concatenate(list(owners.values())), return_counts=True)[1]
    others = float((sizes * (sizes - 1)).sum()) / max(int(sizes.sum()), 1)
    return others * (feed.config.batch_rows - 1) / max(feed.n_rows - 1, 1)


def expected_partners(sizes: np.ndarray, batch_rows: int) -> float:
    """Expect the partners of a token in a random batch of rows from documents of these sizes.

    Of M rows, c of them of its document, a batch of B holds on average (c - 1) (B - 1) / (M - 1) of the others
    (hypergeometric mean).
    """
    n_rows = int(sizes.sum())
    if n_rows < 2:
        return 0.0
    others = float((sizes * (sizes - 1)).sum()) / n_rows
    return others * (min(batch_rows, n_rows) - 1) / (n_rows - 1)


def met_partners(batches: Sequence[np.ndarray]) -> float:
    """Count the partners of a token on average. Each batch is given as the documents of its rows."""
    sizes = [np.unique(batch, return_counts=True)[1] for batch in batches]
    met = sum(int((each * (each - 1)).sum()) for each in sizes)
    return met / max(sum(int(each.sum()) for each in sizes), 1)
