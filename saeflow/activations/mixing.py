"""How well a feed mixes: how many tokens of its own document a token meets in its batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saeflow.activations.epoch import Block
from saeflow.activations.feed import Feed

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
    return feed.selection.owners(block.part.index, slice(block.start, block.stop))


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
