"""The files of a part: which features each may hold, and that together they hold everything once."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeflow.activations.sparse_values import SparseRows
from saeflow.features import files
from saeflow.features.schema import VALUES
from saeflow.sae.exact import feature_major

N_FEATURES = 40


@pytest.mark.parametrize(("per_token", "n_files"), [(0, 1), (1, 2), (9, 18), (N_FEATURES, 40)])
def test_values_by_feature_lie_in_ranges_of_features_that_hold_everything_once(
    tmp_path: Path, per_token: int, n_files: int
) -> None:
    dice = np.random.default_rng(per_token)
    token_ids = np.arange(100, 300, 2)
    chosen = np.sort([dice.choice(N_FEATURES, per_token, replace=False) for _ in token_ids], axis=1).astype(np.int32)
    starts = np.arange(len(token_ids) + 1, dtype=np.int64) * per_token
    sparse = SparseRows(starts, chosen.ravel(), dice.random(chosen.size, np.float32))
    with patch.object(files, "FILE_VALUES", 50):
        files.write_feature_major(tmp_path, token_ids, feature_major(sparse, N_FEATURES))
    found = []
    for path in sorted(tmp_path.glob("feature_major/*/*/*.parquet"), key=lambda path: _ends(path)[0]):
        table = pq.read_table(path, partitioning=None)
        assert table.schema.equals(VALUES["feature_major"])
        assert all(_ends(path)[0] <= each <= _ends(path)[1] for each in table["feature_id"].to_pylist())
        found.append((_ends(path), table))
    assert [each for (low, high), _ in found for each in range(low, high + 1)] == list(range(N_FEATURES))
    assert len(found) == pytest.approx(n_files, abs=2)
    rows = pa.concat_tables(table for _, table in found).to_pylist()
    expected = zip(
        chosen.ravel().tolist(), np.repeat(token_ids, per_token).tolist(), sparse.values.tolist(), strict=True
    )
    assert [tuple(row.values()) for row in rows] == sorted(expected)


def _ends(path: Path) -> tuple[int, int]:
    low, high = re.findall(r"(?:low|high)=(\d+)", str(path))
    return int(low), int(high)
