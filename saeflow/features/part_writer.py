"""Write one part of a run: values in two orders, and their statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from saeflow.activations.sparse_values import SparseValues, concatenated, no_values
from saeflow.features.files import write_feature_major, write_table, write_token_major
from saeflow.features.statistics import PartStatistics
from saeflow.features.token_columns import TokenColumns
from saeflow.sae.encoding.feature_major import feature_major

SEGMENT_VALUES = 24_000_000
"""Values of one part held in memory at once; a part with more gets further pairs of files."""


class PartWriter:
    """Takes the values of consecutive tokens and fills a folder; sets `counts`, which go to the part's record."""

    def __init__(self, folder: Path, counts: dict[str, int], tokens: TokenColumns, n_features: int) -> None:
        self.folder, self.counts, self.tokens = folder, counts, tokens
        self.counts |= {"n_tokens": int(tokens.mask.sum()), "n_values": 0}
        self.statistics = PartStatistics(n_features)
        self.statistics.count_tokens(tokens)
        self._held: list[tuple[np.ndarray, SparseValues]] = []
        self._n_held = 0

    def take(self, token_ids: np.ndarray, sparse: SparseValues) -> None:
        self._held.append((token_ids, sparse))
        self._n_held += len(sparse.values)
        if self._n_held >= SEGMENT_VALUES:
            self._write()

    def close(self) -> None:
        if self._held or not self.counts["n_values"]:
            self._write()
        for name, table in self.statistics.tables().items():
            write_table(self.folder / f"{name}.parquet", table)

    def _write(self) -> None:
        ids, values = zip(*(self._held or [(np.empty(0, np.int64), no_values())]), strict=True)
        token_ids, sparse = np.concatenate(ids), concatenated(values)
        self._held, self._n_held = [], 0
        entries = feature_major(sparse, self.statistics.n_features)
        write_token_major(self.folder, token_ids, sparse)
        write_feature_major(self.folder, token_ids, entries)
        self.statistics.add(self.tokens.of(token_ids), sparse, entries)
        self.counts["n_values"] += len(sparse.values)
