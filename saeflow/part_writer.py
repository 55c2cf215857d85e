"""One part of a run on its way to the disk: values in two orders, and what is counted of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from saeflow.encoding import SparseValues, feature_major
from saeflow.feature_files import write_feature_major, write_table, write_token_major
from saeflow.marginals import Totals
from saeflow.token_facts import TokenFacts

SEGMENT_NONZEROS = 24_000_000
"""Values of one part held in memory at once; beyond, a part gets further pairs of files."""


class PartWriter:
    """Takes the values of consecutive tokens and fills a folder; `counts` are those of the part's record."""

    def __init__(self, folder: Path, counts: dict[str, int], about: TokenFacts, n_features: int) -> None:
        self.folder, self.counts, self.about = folder, counts, about
        self.counts |= {"n_tokens": int(about.mask.sum()), "n_values": 0}
        self.totals = Totals(n_features)
        self.totals.see(about)
        self._held: list[tuple[np.ndarray, SparseValues]] = []
        self._n_held = 0

    def take(self, token_ids: np.ndarray, sparse: SparseValues) -> None:
        self._held.append((token_ids, sparse))
        self._n_held += len(sparse.values)
        if self._n_held >= SEGMENT_NONZEROS:
            self._write()

    def close(self) -> None:
        if self._held or not self.counts["n_values"]:
            self._write()
        for name, table in self.totals.tables().items():
            write_table(self.folder / f"{name}.parquet", table)

    def _write(self) -> None:
        token_ids, sparse = joined(self._held)
        self._held, self._n_held = [], 0
        entries = feature_major(sparse, self.totals.n_features)
        write_token_major(self.folder, token_ids, sparse)
        write_feature_major(self.folder, token_ids, entries)
        self.totals.add(self.about.of(token_ids), sparse, entries)
        self.counts["n_values"] += len(sparse.values)


def joined(held: list[tuple[np.ndarray, SparseValues]]) -> tuple[np.ndarray, SparseValues]:
    """Batches end to end."""
    if not held:
        nothing = SparseValues(np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))
        return np.empty(0, np.int64), nothing
    counts = [np.diff(sparse.row_starts) for _, sparse in held]
    starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    ids, values = (np.concatenate([getattr(sparse, name) for _, sparse in held]) for name in ("feature_ids", "values"))
    return np.concatenate([token_ids for token_ids, _ in held]), SparseValues(starts, ids, values)
