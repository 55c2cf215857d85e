"""Values by feature: sorted from the order of rows, and what is counted of each feature."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saeflow.activations.sparse_values import SparseValues
from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae import kernels
from saeflow.sae.kernels import Doubles, Floats, Ids, Offsets


class FeatureMajor(NamedTuple):
    """Entries by feature; inside a feature in ascending order of row."""

    feature_starts: Offsets
    """(F + 1): feature f owns entries feature_starts[f] to feature_starts[f + 1]."""
    rows: Ids
    values: Floats


class FeatureStatistics(NamedTuple):
    """Number, sum, sum of squares and maximum of each feature's non-zero values, (F) each."""

    n_tokens: NDArray[np.int64]
    sum: Doubles
    sum_squares: Doubles
    max: Floats


def feature_major(sparse: SparseValues, n_features: int, threads: int = 1) -> FeatureMajor:
    """Return the entries sorted by feature, then row."""
    starts, rows, values = sorted_by_feature(
        sparse.row_starts, sparse.feature_ids, sparse.values[None], n_features, threads
    )
    return FeatureMajor(starts, rows, values[0])


def sorted_by_feature(
    row_starts: Offsets, ids: Ids, values: Floats, n_features: int, threads: int
) -> tuple[Offsets, Ids, Floats]:
    """Return feature starts (F + 1), rows (nnz) and values (n, nnz) in the order of features, by a stable sort."""
    parts = ranges(len(row_starts) - 1, max(-(-len(row_starts) // threads), 1))
    counts = np.array(
        [np.bincount(ids[row_starts[a] : row_starts[b]], minlength=n_features) for a, b in parts]
        or [np.zeros(n_features, np.int64)]
    )
    feature_starts = np.concatenate([[0], counts.sum(0).cumsum()]).astype(np.int64)
    positions = feature_starts[:-1] + np.concatenate([np.zeros((1, n_features), np.int64), counts[:-1].cumsum(0)])
    rows, out = np.empty(len(ids), np.int32), np.empty_like(values)

    def place_part(part: int) -> None:
        kernels.transpose(*parts[part], row_starts, ids, values, positions[part], rows, out)

    in_parallel(place_part, range(len(parts)), threads)
    return feature_starts, rows, out


def feature_statistics(sparse: SparseValues, n_features: int) -> FeatureStatistics:
    """Return each feature's statistics; its values are added in the order of rows."""
    out = FeatureStatistics(
        np.zeros(n_features, np.int64), np.zeros(n_features), np.zeros(n_features), np.zeros(n_features, np.float32)
    )
    kernels.statistics(sparse.feature_ids, sparse.values, *out)
    return out
