"""Sparse rows of NumPy and of torch are the same thing."""

import numpy as np
import torch

from saeflow.activations.sparse_values import SparseRows, concatenated, no_values, values_above_zero

DENSE = np.array([[0, 2, 0, 1], [0, 0, 0, 0], [3, 0, 0, -1]], np.float32)


def test_entries_know_their_rows_in_numpy_and_in_torch():
    found = values_above_zero(DENSE)
    assert found.rows.tolist() == [0, 0, 2]
    assert found.feature_ids.tolist() == [1, 3, 0]
    assert SparseRows(*map(torch.from_numpy, found)).rows.tolist() == [0, 0, 2]


def test_consecutive_rows_put_together_are_the_rows_of_the_whole():
    parts = [values_above_zero(part) for part in (DENSE[:1], DENSE[1:2], DENSE[2:])]
    for one, other in zip(concatenated([no_values(), *parts]), values_above_zero(DENSE), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [len(array) for array in concatenated([])] == [1, 0, 0]
