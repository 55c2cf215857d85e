"""The plan of an epoch: which rows a training meets, and in which order. Pure functions of counts, seed and epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from saeflow.recipe.settings import FeedConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import human_bytes
from saeflow.store.records import PartRecord


def fit_pool(config: FeedConfig, sequence_bytes: int) -> tuple[int, int]:
    """Return the sequences in a block, and the blocks in a pool: half of the memory, which is mixed.

    `sequence_bytes` are the stored activations of one sequence at all sites. Raises UserError if there is no room for
    one block that is read and one that is mixed.
    """
    sequences = max(1, config.block_bytes // sequence_bytes)
    blocks = config.pool_bytes // 2 // (sequences * sequence_bytes)
    if blocks < 1:
        need, most = 2 * sequences * sequence_bytes, config.pool_bytes // 2
        or_smaller = f", or feed.block_bytes to at most {human_bytes(most)}" if most >= sequence_bytes else ""
        raise UserError(
            f"feed.pool_bytes is {human_bytes(config.pool_bytes)}, but one block being mixed and one being read take "
            f"{human_bytes(need)}.\n"
            f"Set feed.pool_bytes to at least {human_bytes(need)}{or_smaller}."
        )
    return sequences, blocks


@dataclass(frozen=True)
class Pool:
    """Blocks that are in memory together, and the batches of global row numbers drawn from them."""

    blocks: np.ndarray
    batches: list[np.ndarray]


def plan_pools(n_blocks: int, pool_blocks: int, seed: int, epoch: int = 0) -> list[np.ndarray]:
    """Return all blocks in random order, in pools of at most `pool_blocks`. Inside a pool they ascend."""
    order = np.random.default_rng([seed, epoch]).permutation(n_blocks)
    whole = n_blocks // pool_blocks * pool_blocks
    full = np.sort(order[:whole].reshape(-1, pool_blocks), axis=1)
    return [*full, np.sort(order[whole:])] if whole < n_blocks else [*full]


def plan_epoch(
    rows_of: Callable[[int], np.ndarray], n_blocks: int, pool_blocks: int, batch_rows: int, seed: int, epoch: int = 0,
    first_pool: int = 0,
) -> Iterator[Pool]:  # fmt: skip
    """Yield every row once, in pools of at most `pool_blocks` randomly chosen blocks, mixed inside each pool.

    `rows_of` gives a block's row numbers. Batches of one pool differ in size by at most one row. The same arguments
    give the same plan on any machine. Pools before `first_pool` cost nothing.
    """
    for number, blocks in enumerate(plan_pools(n_blocks, pool_blocks, seed, epoch)):
        if number < first_pool:
            continue
        rows = np.concatenate([rows_of(int(block)) for block in blocks])
        rows = np.random.default_rng([seed, epoch, number]).permutation(rows)
        batches = np.array_split(rows, -(-len(rows) // batch_rows)) if len(rows) else []
        yield Pool(blocks, list(batches))


def batches_of_pools(pools: Sequence[np.ndarray], counts: np.ndarray, batch_rows: int) -> np.ndarray:
    """Return the number of batches of each pool, from the selected rows of every block."""
    return np.array([-(-int(counts[blocks].sum()) // batch_rows) for blocks in pools], np.int64)


@dataclass(frozen=True)
class Block:
    """A run of sequences inside one part."""

    part: PartRecord
    start: int
    stop: int


class TrainingBlocks:
    """The training sequences of all parts, cut into blocks. Held-out sequences, at the end of each part, stay out.

    Only one number per part is kept, since there may be millions of blocks.
    """

    def __init__(self, parts: Sequence[PartRecord], block_sequences: int) -> None:
        self.parts = [part for part in parts if part.counts["n_train_sequences"]]
        self.block_sequences = block_sequences
        n_blocks = [-(-part.counts["n_train_sequences"] // block_sequences) for part in self.parts]
        self._ends = np.cumsum(n_blocks, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Block:
        place = int(np.searchsorted(self._ends, number, side="right"))
        part = self.parts[place]
        start = (number - int(self._ends[place - 1] if place else 0)) * self.block_sequences
        return Block(part, start, min(start + self.block_sequences, part.counts["n_train_sequences"]))

    def sums(self, of_sequences: Callable[[int], np.ndarray]) -> np.ndarray:
        """Sum over each block, int64. `of_sequences` gives the numbers (S,) of a part's sequences by its index."""
        found = [self._sums(part, of_sequences(part.index)) for part in self.parts]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _sums(self, part: PartRecord, each: np.ndarray) -> np.ndarray:
        n_train = part.counts["n_train_sequences"]
        return np.add.reduceat(each[:n_train], np.arange(0, n_train, self.block_sequences), dtype=np.int64)
