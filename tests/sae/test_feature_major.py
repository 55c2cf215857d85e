"""Values sorted by feature, and their statistics, against the dense matrix."""

import numpy as np

from saeflow.activations.sparse_values import SparseValues
from saeflow.sae.feature_major import feature_major, feature_statistics
from tests.support.uneven_saes import ARCHITECTURES, D, F, an_autoencoder, dense, some_activations


def test_nothing_in_nothing_out():
    for architecture in ARCHITECTURES:
        sae = an_autoencoder(architecture)
        empty = sae.encode_sparse(some_activations(0))
        assert [len(part) for part in empty] == [1, 0, 0]
        assert feature_statistics(empty, F).n_tokens.sum() == 0
        assert feature_major(empty, F).feature_starts.tolist() == [0] * (F + 1)
        assert sae.decode(empty).shape == (0, D)


def test_statistics_and_the_feature_major_order_are_those_of_the_dense_matrix():
    sparse = an_autoencoder("batchtopk").encode_sparse(some_activations(500))
    matrix = dense(sparse).astype(np.float64)
    statistics = feature_statistics(sparse, F)
    np.testing.assert_array_equal(statistics.n_tokens, (matrix > 0).sum(0))
    np.testing.assert_allclose(statistics.sum, matrix.sum(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.sum_squares, (matrix**2).sum(0), rtol=1e-12)
    np.testing.assert_array_equal(statistics.max, matrix.max(0))
    features, rows = matrix.T.nonzero()
    by_feature = feature_major(sparse, F)
    np.testing.assert_array_equal(by_feature.rows, rows)
    np.testing.assert_array_equal(by_feature.values, matrix.T[features, rows])
    np.testing.assert_array_equal(np.diff(by_feature.feature_starts), (matrix > 0).sum(0))


def test_feature_major_may_have_features_that_never_fire():
    sparse = SparseValues(np.array([0, 1, 2]), np.array([4, 4], np.int32), np.array([1, 2], np.float32))
    assert feature_major(sparse, 6).feature_starts.tolist() == [0, 0, 0, 0, 0, 2, 2]
