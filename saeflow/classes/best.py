"""Keep the values of the best features so far while all are scored, because their intervals need them again."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from saeflow.classes.values import FeatureEntries

HELD_BYTES = 1 << 30
"""Most memory for held values. Others are read from the files again."""


@dataclass
class BestEntries:
    """Entries of features by number. Which are held depends on the order of blocks, but no figure depends on it."""

    n_best: int
    most_bytes: int = HELD_BYTES
    entries: dict[int, FeatureEntries] = field(default_factory=dict)
    _scores: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, block: FeatureEntries, auroc: NDArray[np.float64]) -> None:
        """Hold the features of a block that are among the best of a class now. `auroc` (features of the block, C)."""
        if not self.n_best:
            return
        auroc = np.where(np.isfinite(auroc), auroc, -1.0)
        found = np.unique(np.argsort(-auroc, axis=0)[: self.n_best])
        with self._lock:
            self._scores |= {block.first + int(row): auroc[row] for row in found}
            features, scores = list(self._scores), np.stack(list(self._scores.values()))
            best = {features[row] for row in np.unique(np.argsort(-scores, axis=0)[: self.n_best])}
            self._scores = {feature: self._scores[feature] for feature in best}
            self.entries = {feature: each for feature, each in self.entries.items() if feature in best}
            own = (block.first + int(row) for row in found)
            self.entries |= {feature: block.of(feature) for feature in own if feature in best}
            while sum(each.n_bytes for each in self.entries.values()) > self.most_bytes:
                del self.entries[max(self.entries, key=lambda feature: self.entries[feature].n_bytes)]
