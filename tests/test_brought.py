"""Activations that no model gives: people's own tables, and made ones."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeflow.brought import make_table, read_table
from saeflow.config import SyntheticConfig, UserError

LABELS = ["猫", "happy cat", 'a "quoted", word']
VALUES = np.array([[0.5, -1.25], [3, 0], [1e-3, 1e4]], np.float32)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet"])
def test_a_table_with_labels_is_read_from_every_format(tmp_path, name):
    path = tmp_path / name
    if name == "t.parquet":
        pq.write_table(pa.table({"phrase": LABELS, "n1": VALUES[:, 0], "n2": VALUES[:, 1]}), path)
    else:
        mark = "," if name == "t.csv" else "\t"
        quoted = ['"' + label.replace('"', '""') + '"' for label in LABELS]
        lines = [mark.join([label, *map(str, row)]) for label, row in zip(quoted, VALUES.tolist(), strict=True)]
        path.write_text("\n".join([mark.join(["phrase", "n1", "n2"]), *lines]) + "\n", "utf-8")
    table = read_table(str(path))
    assert table.labels == LABELS
    np.testing.assert_array_equal(table.values, VALUES)
    assert table.values.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_an_array_is_read_in_float32_and_its_rows_are_numbered(tmp_path, dtype):
    np.save(tmp_path / "t.npy", VALUES.astype(dtype))
    table = read_table(str(tmp_path / "t.npy"))
    np.testing.assert_array_equal(table.values, VALUES.astype(dtype).astype(np.float32))
    assert table.labels == ["row 0", "row 1", "row 2"]


def test_a_table_without_a_text_column_has_numbered_rows(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2.5\n3,4\n")
    table = read_table(str(tmp_path / "t.csv"))
    assert (table.labels, table.values.tolist()) == (["row 0", "row 1"], [[1, 2.5], [3, 4]])


def write(path, content) -> None:
    if isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.npy", np.zeros(3), r"t\.npy has shape \(3,\); a table of rows × neurons is needed"),
        ("t.npy", np.zeros((0, 3)), r"has shape \(0, 3\)"),
        ("t.npy", np.array([["a", "b"]]), r"activations\.source: t\.npy is no array of numbers"),
        ("t.npy", np.array([[None, {}]]), r"activations\.source: t\.npy is no array of numbers"),
        ("t.npy", b"not an array", r"activations\.source: t\.npy is no array of numbers"),
        ("t.csv", b"name,kind\na,b\nc,d\n", r"t\.csv has no numeric column; it has name, kind"),
        ("t.parquet", b"not a parquet file", r"activations\.source: t\.parquet cannot be read: "),
        ("t.xlsx", b"", r"t\.xlsx, but \.xlsx is none of \.csv \.tsv \.parquet \.npy"),
        ("table", b"", r"table, but no ending is none of"),
    ],
)
def test_a_table_that_is_none_is_said_in_one_message(tmp_path, name, content, says):
    write(tmp_path / name, content)
    with pytest.raises(UserError, match=says):
        read_table(str(tmp_path / name))


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(UserError, match=r"activations\.source: no file at .*none\.csv"):
        read_table(str(tmp_path / "none.csv"))


def sparse(**settings) -> SyntheticConfig:
    return SyntheticConfig(
        **{"kind": "sparse", "n_samples": 200, "n_neurons": 5, "n_true": 7, "n_active": 2} | settings
    )


def test_sparse_rows_are_sums_of_at_most_n_active_known_directions():
    table = make_table(sparse())
    assert table.values.shape == (200, 5)
    assert table.directions.shape == (7, 5)
    np.testing.assert_allclose(np.linalg.norm(table.directions, axis=1), 1, rtol=1e-5)
    left = np.full(200, np.inf)
    for pair in itertools.combinations(table.directions, 2):
        basis = np.stack(pair, 1)
        strengths = np.linalg.lstsq(basis, table.values.T, rcond=None)[0]
        rest = np.linalg.norm(basis @ strengths - table.values.T, axis=0)
        left = np.where((strengths > -1e-5).all(0), np.minimum(left, rest), left)
    assert left.max() < 1e-5
    assert np.linalg.norm(table.values, axis=1).max() > 0.5


def test_the_same_seed_makes_the_same_table_and_another_seed_another():
    one, same, other = (make_table(sparse(seed=seed)).values for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_the_toy_of_superposition_holds_more_directions_than_neurons():
    table = make_table(SyntheticConfig(kind="superposition", n_samples=500, n_neurons=2, n_true=6, density=0.05))
    assert table.directions.shape == (6, 2)
    assert table.values.shape[1] == 2
    assert 0 < len(table.values) <= 500
    assert (np.linalg.norm(table.directions, axis=1) > 0.5).sum() > 2
    assert len(table.labels) == len(table.values)
