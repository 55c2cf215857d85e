"""One part of a run on its way to the disk: values in two orders, and what is counted of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from saeflow.features.files import write_feature_major, write_table, write_token_major
from saeflow.features.statistics import Totals
from saeflow.features.token_columns import TokenFacts
from saeflow.sae import encoder
from saeflow.sae.encoder import SparseValues, feature_major

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
        nothing = np.empty(0, np.int64), SparseValues(*encoder.nothing())
        ids, values = zip(*(self._held or [nothing]), strict=True)
        token_ids, sparse = np.concatenate(ids), SparseValues(*encoder.joined(list(values)))
        self._held, self._n_held = [], 0
        entries = feature_major(sparse, self.totals.n_features)
        write_token_major(self.folder, token_ids, sparse)
        write_feature_major(self.folder, token_ids, entries)
        self.totals.add(self.about.of(token_ids), sparse, entries)
        self.counts["n_values"] += len(sparse.values)
