"""Exact encoding: every value is that of float64 arithmetic, rounded to 11 bits, in any batch and on any device."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.activations.sparse_values import SparseValues
from saeflow.sae.encoder import Encoder, SparseInputEncoder
from saeflow.sae.exact import encode_on_accelerator, feature_major, feature_statistics, rounded
from tests.support.uneven_saes import (
    ARCHITECTURES,
    STORED,
    D,
    F,
    K,
    an_autoencoder,
    dense,
    encode_densely,
    some_activations,
)


def slow_and_obvious(sae, x):
    """Dense float64 values, and how near each is to a decision (relative distance)."""
    w, b_enc, b_dec = (p.detach().double().numpy() for p in (sae.W_enc, sae.b_enc, sae.b_dec))
    pre = (x.double().numpy() - b_dec) @ w.T + b_enc
    cut = np.full((len(pre), 1), {"batchtopk": float(sae.threshold)}.get(sae.config.architecture, 0.0))
    keep = pre > cut
    if sae.config.architecture == "abstopk":
        order = np.sort(abs(pre), axis=1)[:, ::-1]
        keep, cut = abs(pre) >= order[:, [K - 1]], np.sign(pre) * (order[:, [K - 1]] + order[:, [K]]) / 2
    if sae.config.architecture == "topk":
        order = np.sort(pre, axis=1)[:, ::-1]
        keep &= pre >= order[:, [K - 1]]
        cut = (order[:, [K - 1]] + order[:, [K]]) / 2
    return np.where(keep, pre, 0), np.abs(pre - cut) < 1e-9 * np.abs(pre).max()


def to_11_bits(values):
    significand, exponent = np.frexp(values)
    return np.ldexp(np.rint(significand * 2048) / 2048, exponent).astype(np.float32)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gated", "jumprelu"])
@pytest.mark.parametrize("product", [torch.bfloat16, torch.float32])
def test_what_an_accelerator_screens_is_what_a_dense_product_in_float64_gives(architecture, product):
    sae = an_autoencoder(architecture, product)
    x = some_activations(700)
    x[13:20] = x[12]
    function = sae.activation_function()
    cut = torch.from_numpy(function.thresholds)
    encoder = Encoder(sae.W_enc, sae.b_enc, sae.b_in, product, cut if function.thresholds.any() else None)
    screened = encode_on_accelerator(x, encoder, function)
    whole = encode_densely(sae, x)
    assert len(screened.values) > 500
    for one, other in zip(screened, whole, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_of_equal_pre_activations_an_accelerator_keeps_the_lower_features(architecture):
    sae = an_autoencoder(architecture)
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_enc[:20].repeat(10, 1))
        sae.b_enc.copy_(sae.b_enc[:20].repeat(10))
    x = some_activations(50)
    encoder = Encoder(sae.W_enc, sae.b_enc, sae.b_in, torch.bfloat16)
    screened = encode_on_accelerator(x, encoder, sae.activation_function())
    np.testing.assert_array_equal(screened.feature_ids, sae.encode_sparse(x).feature_ids)
    assert len(encode_on_accelerator(x[:0], encoder, sae.activation_function()).values) == 0


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("product", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encoding_equals_float64_over_all_features_rounded_to_11_bits(architecture, product, dtype):
    sae, x = an_autoencoder(architecture, product), some_activations(300, dtype)
    values, near_cut = slow_and_obvious(sae, x)
    wanted = to_11_bits(values)
    near_tie = to_11_bits(values * (1 + 1e-9)) != to_11_bits(values * (1 - 1e-9))
    got = dense(sae.encode_sparse(x))
    clear = ~(near_cut | near_tie)
    assert clear.mean() > 0.999
    np.testing.assert_array_equal(got[clear], wanted[clear])
    assert (got != 0).sum() > 300


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 150), max_size=5), threads=st.integers(1, 3))
def test_a_token_is_encoded_alike_in_any_batch_and_on_any_number_of_threads(architecture, cuts, threads):
    sae, x = an_autoencoder(architecture), some_activations(150)
    whole = sae.encode_sparse(x)
    sae.threads = threads
    parts = [sae.encode_sparse(part) for part in x.tensor_split(sorted(cuts))]
    np.testing.assert_array_equal(np.concatenate([p.feature_ids for p in parts]), whole.feature_ids)
    np.testing.assert_array_equal(np.concatenate([p.values for p in parts]), whole.values)
    np.testing.assert_array_equal(np.concatenate([np.diff(p.row_starts) for p in parts]), np.diff(whole.row_starts))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_kernels_the_result_is_the_same(architecture):
    sae, x = an_autoencoder(architecture), some_activations(100)
    quick = sae.encode_sparse(x)
    sae.use_kernels = False
    for a, b, c in zip(quick, sae.encode_sparse(x), encode_densely(sae, x), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mostly_zero_rows_are_encoded_as_exactly_as_others(architecture, dtype):
    sae, x = an_autoencoder(architecture, n_features=288), torch.relu(some_activations(300, dtype) - 3)
    assert isinstance(sae.current_encoder().suited_to(x), SparseInputEncoder)
    quick = sae.encode_sparse(x)
    assert len(quick.values) > 300
    for a, b in zip(quick, encode_densely(sae, x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_of_equal_magnitudes_the_lower_features_are_kept_whatever_their_signs():
    sae = an_autoencoder("abstopk")
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.b_enc.zero_()
        sae.W_enc.copy_(sae.W_enc[:1].expand(F, D) * torch.tensor([1.0, -1.0]).repeat(F // 2)[:, None])
    sparse = sae.encode_sparse(some_activations(20))
    values = sparse.values.reshape(20, K)
    np.testing.assert_array_equal(sparse.feature_ids.reshape(20, K), np.tile(np.arange(K), (20, 1)))
    np.testing.assert_array_equal(values, values[:, :1] * np.resize([1, -1], K))
    assert (values < 0).any(axis=1).all()


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_equal_values_go_to_the_lower_features(architecture):
    sae = an_autoencoder(architecture)
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_enc[:1].expand(F, D))
        sae.b_enc.fill_(100.0)
    ids = sae.encode_sparse(some_activations(20)).feature_ids.reshape(20, K)
    np.testing.assert_array_equal(ids, np.tile(np.arange(K), (20, 1)))


def test_rounding_goes_to_even_and_keeps_tiny_and_huge_values():
    ulp = 2.0**-10
    given = torch.tensor([1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.51 * ulp, 1e-30, 60000.0 * 1000], dtype=torch.float64)
    wanted = [1.0, 1 + 2 * ulp, 1 + ulp, to_11_bits(np.float64(1e-30)), to_11_bits(np.float64(6e7))]
    np.testing.assert_array_equal(rounded(given), np.float32(wanted))
    assert (rounded(given).numpy() > 0).all()


def test_nothing_in_nothing_out():
    for architecture in ARCHITECTURES:
        sae = an_autoencoder(architecture)
        empty = sae.encode_sparse(some_activations(0))
        assert [len(part) for part in empty] == [1, 0, 0]
        assert feature_statistics(empty, F).n_tokens.sum() == 0
        assert feature_major(empty, F).feature_starts.tolist() == [0] * (F + 1)
        assert sae.decode(empty).shape == (0, D)


@pytest.mark.parametrize("architecture", ["batchtopk", "abstopk"])
def test_statistics_and_the_feature_major_order_are_those_of_the_dense_matrix(architecture):
    sparse = an_autoencoder(architecture).encode_sparse(some_activations(500))
    matrix = dense(sparse).astype(np.float64)
    statistics = feature_statistics(sparse, F)
    np.testing.assert_array_equal(statistics.n_tokens, (matrix != 0).sum(0))
    np.testing.assert_allclose(statistics.sum, matrix.sum(0), rtol=1e-12, atol=1e-12 * abs(matrix).sum())
    np.testing.assert_allclose(statistics.sum_squares, (matrix**2).sum(0), rtol=1e-12)
    np.testing.assert_array_equal(
        statistics.strongest, np.where(matrix.max(0) >= -matrix.min(0), matrix.max(0), matrix.min(0))
    )
    features, rows = matrix.T.nonzero()
    by_feature = feature_major(sparse, F)
    np.testing.assert_array_equal(by_feature.rows, rows)
    np.testing.assert_array_equal(by_feature.values, matrix.T[features, rows])
    np.testing.assert_array_equal(np.diff(by_feature.feature_starts), (matrix != 0).sum(0))


def test_feature_major_may_have_features_that_never_fire():
    sparse = SparseValues(np.array([0, 1, 2]), np.array([4, 4], np.int32), np.array([1, 2], np.float32))
    assert feature_major(sparse, 6).feature_starts.tolist() == [0, 0, 0, 0, 0, 2, 2]
