"""Values that kernels encode are the processor's, bit for bit, whatever was guessed and with however little room."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from saeflow.activations.sparse_values import SparseValues
from saeflow.recipe.settings import SAEConfig
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.gpu import encode
from saeflow.sae.gpu.choice import guess
from saeflow.sae.pursuit import pursue
from tests.sae.gpu import PLACE
from tests.support import uneven_saes
from tests.support.uneven_saes import D, some_activations

ARCHITECTURES = ["topk", "abstopk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated"]
ROWS, F = 12, 90
"""Triton's interpreter runs a program for each candidate."""


def an_autoencoder(architecture: str, product: torch.dtype = torch.bfloat16) -> SparseAutoencoder:
    sae: SparseAutoencoder = uneven_saes.an_autoencoder(architecture, product, n_features=F)
    return sae


@pytest.fixture
def screened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows at a time a stored product has screened."""
    counts, real = list[int](), encode.screened

    def counting(x: Tensor, *about: object) -> tuple[Tensor, Tensor]:
        counts.append(len(x))
        return real(x, *about)  # type: ignore[arg-type]

    monkeypatch.setattr(encode, "screened", counting)
    return counts


def by_kernels(sae: SparseAutoencoder, x: Tensor) -> SparseValues:
    """Encode as an SAE on a GPU does."""
    sae = sae.to(PLACE)
    function = sae.activation_function()
    encoder = sae.current_encoder(sae._cut(function))
    return encode.encode_by_kernels(x.to(PLACE), encoder, function)


def assert_equal(found: SparseValues, wanted: SparseValues) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("product", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_are_those_of_the_processor(architecture: str, product: torch.dtype, screened: list[int]) -> None:
    sae, x = an_autoencoder(architecture, product), some_activations(ROWS)
    wanted = sae.encode_sparse(x)
    assert len(wanted.values) > 25
    assert_equal(by_kernels(sae, x), wanted)
    assert sum(screened) < ROWS / 2


@pytest.mark.parametrize("architecture", ["topk", "abstopk", "batchtopk", "jumprelu"])
def test_pre_activations_that_the_product_cannot_tell_apart_are_told_apart(architecture: str) -> None:
    """All features are within the error of bfloat16, around the threshold if there is one."""
    sae, x = an_autoencoder(architecture), some_activations(4)
    with torch.no_grad():
        made = torch.Generator().manual_seed(5)
        sae.W_enc.copy_(sae.W_enc[:1] * (1 + 1e-3 * torch.randn(F, 1, generator=made)))
        sae.b_enc.zero_()
        x[1:] = x[:1] * torch.tensor([[1.0], [1.001], [0.999]])
        pre = (x[:1].float() - sae.b_in) @ sae.W_enc.T
        if pre.mean() < 0:
            sae.W_enc.neg_()
        sae.threshold.fill_(pre.abs().median())
    wanted = sae.encode_sparse(x)
    assert len(wanted.values) > 20
    assert_equal(by_kernels(sae, x), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_may_have_any_stored_precision_and_any_lengths(dtype: torch.dtype) -> None:
    x = some_activations(ROWS, dtype)
    x[3] *= 1000
    x[5] /= 1000
    x[7:9] = 0
    for architecture in ("topk", "batchtopk"):
        sae = an_autoencoder(architecture)
        assert_equal(by_kernels(sae, x), an_autoencoder(architecture).encode_sparse(x))


@pytest.mark.parametrize("ratio", [0.0, 1e30])
@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_a_wrong_guess_changes_no_value(
    architecture: str, ratio: float, monkeypatch: pytest.MonkeyPatch, screened: list[int]
) -> None:
    sae, x = an_autoencoder(architecture), some_activations(ROWS)
    wanted = sae.encode_sparse(x)
    monkeypatch.setattr(guess, "next_ratio", lambda kth, lengths: torch.tensor([ratio], device=PLACE))
    assert_equal(by_kernels(sae, x), wanted)
    assert sum(screened) == (0 if ratio == 0 else ROWS)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_rows_with_more_candidates_than_fit_are_screened_by_a_stored_product(
    architecture: str, monkeypatch: pytest.MonkeyPatch, screened: list[int]
) -> None:
    sae, x = an_autoencoder(architecture), some_activations(ROWS)
    wanted = sae.encode_sparse(x)
    monkeypatch.setattr(encode, "LEAST_ROOM", 8)
    monkeypatch.setattr(encode._Screen, "capacity", lambda self: 8)
    assert_equal(by_kernels(sae, x), wanted)
    assert sum(screened) > ROWS / 2


def test_where_most_features_fire_nothing_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = an_autoencoder("relu"), some_activations(ROWS)
    wanted = sae.encode_sparse(x)
    monkeypatch.setattr(encode, "MOST_ROOM", 64)
    monkeypatch.setattr(encode._Screen, "candidates", None)
    assert_equal(by_kernels(sae, x), wanted)


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_of_equal_pre_activations_the_lower_features_are_kept(architecture: str) -> None:
    sae = an_autoencoder(architecture)
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_enc[:18].repeat(5, 1))
        sae.b_enc.copy_(sae.b_enc[:18].repeat(5))
    x = some_activations(ROWS)
    wanted = sae.encode_sparse(x)
    assert_equal(by_kernels(sae, x), wanted)


def test_a_token_is_encoded_alike_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = an_autoencoder("batchtopk"), some_activations(ROWS)
    wanted = sae.encode_sparse(x)
    monkeypatch.setattr(encode, "CHUNK_ROWS", 7)
    assert_equal(by_kernels(sae, x), wanted)
    assert len(by_kernels(sae, x[:0]).values) == 0


def test_a_transcoder_and_a_dictionary_whose_features_may_all_fire_are_encoded_too() -> None:
    x = some_activations(8)
    for about in ({"target_site": "there", "k": 4}, {"k": 20}):
        config = SAEConfig.model_validate({"architecture": "topk", "n_features": 20, "seed": 1, **about})
        sae = SparseAutoencoder(config, D, 9 if "target_site" in about else None).eval()
        sae.product_dtype = torch.bfloat16
        wanted = sae.encode_sparse(x)
        assert len(wanted.values) > 20
        assert_equal(by_kernels(sae, x), wanted)


def test_a_pursuit_takes_the_same_steps() -> None:
    config = SAEConfig.model_validate({"architecture": "mp", "n_features": F, "k": 3, "seed": 2})
    sae = SparseAutoencoder(config, D).eval()
    sae.product_dtype = torch.bfloat16
    x = some_activations(10)
    wanted = sae.encode_sparse(x)
    sae = sae.to(PLACE)
    function, encoder = sae.activation_function(), sae.current_encoder()

    def choose(residual: Tensor) -> SparseValues:
        return encode.encode_by_kernels(residual, encoder, function)

    with torch.no_grad():
        found = pursue(x.to(PLACE), sae.W_dec.detach(), sae.b_dec.detach(), 3, sae.pursuit_end, choose)
    assert_equal(found, wanted)
