"""An SAE whose folder is spoilt in a way that people meet is told what it looks like; a sound one is told nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saeflow.recipe.settings import SAEConfig
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.readings import best_reading

D, N = 24, 24
"""As many features as numbers, so that a transposed matrix fits."""


def planted(architecture: str = "jumprelu", n_features: int = N, n: int = 2000) -> tuple[SparseAutoencoder, Tensor]:
    """An autoencoder of orthogonal directions, a rotation, and tokens in which few of them are active."""
    dice = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(D, D, generator=dice)).Q[:n_features]
    active = (torch.rand(n, n_features, generator=dice) < 0.15) * (2 + 3 * torch.rand(n, n_features, generator=dice))
    mean = 1.5 * torch.randn(D, generator=dice)
    x = active @ directions + mean + 0.05 * torch.randn(n, D, generator=dice)
    sae = SparseAutoencoder(SAEConfig(architecture=architecture, n_features=n_features, k=4, unit_norm=False), D)
    with torch.no_grad():
        sae.W_enc.copy_(directions)
        sae.W_dec.copy_(directions)
        sae.b_enc.zero_()
        sae.b_dec.copy_(mean)
        sae.threshold.fill_(1.0)
    return sae.eval(), x


def unexplained(sae: SparseAutoencoder, x: Tensor) -> float:
    return float((sae.reconstruct(x) - x).square().sum() / (x - x.mean(0)).square().sum())


def lengthened(sae: SparseAutoencoder) -> Tensor:
    """Decoder rows of lengths 0.05 to 20; the values are divided by them."""
    lengths = torch.logspace(math.log10(0.05), math.log10(20), len(sae.b_enc))
    sae.W_dec.mul_(lengths[:, None])
    sae.W_enc.div_(lengths[:, None])
    sae.b_enc.div_(lengths)
    return lengths


def thresholds_by_norm(sae: SparseAutoencoder) -> None:
    """As they are compared with values in units of contributions: nothing was divided by the lengths."""
    lengthened(sae)


def folded_twice(sae: SparseAutoencoder) -> None:
    """The decoder is folded; the threshold of a BatchTopK, already in its units, was folded, too."""
    sae.threshold.copy_(torch.logspace(-2, 2, len(sae.b_enc)))


def transposed(sae: SparseAutoencoder) -> None:
    sae.W_dec.copy_(sae.W_dec.t().clone())


def bias_forgotten(sae: SparseAutoencoder) -> None:
    """Trained without subtracting the bias, read as one that subtracts it."""
    sae.b_enc.sub_(sae.W_enc @ sae.b_dec)


def bias_twice(sae: SparseAutoencoder) -> None:
    sae.b_enc.add_(sae.W_enc @ sae.b_dec)


SPOILT: dict[str, tuple[Callable[[SparseAutoencoder], None], str]] = {
    "thresholds by norm": (thresholds_by_norm, "thresholds have to be divided by the lengths of the decoder's rows"),
    "threshold folded twice": (folded_twice, "folded into the thresholds twice: one for all features"),
    "transposed decoder": (transposed, "the decoder is transposed"),
    "bias not subtracted": (bias_forgotten, "the decoder bias is not subtracted"),
    "bias subtracted": (bias_twice, "the decoder bias is subtracted"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_autoencoder_is_told_what_it_looks_like(name: str) -> None:
    sae, x = planted()
    with torch.no_grad():
        SPOILT[name][0](sae)
    looks_like = best_reading(sae, x, x, unexplained(sae, x))
    assert looks_like is not None
    assert SPOILT[name][1] in looks_like[0]
    assert looks_like[1] < 0.1


def test_a_missing_factor_is_told_with_its_number() -> None:
    sae, x = planted()
    factor = math.sqrt(D) / x.norm(dim=1).mean().item()
    small = x / 40
    with torch.no_grad():  # trained on activations of length root(D)
        for name in ("b_enc", "b_dec", "threshold"):
            getattr(sae, name).mul_(factor)
    looks_like = best_reading(sae, small, small, unexplained(sae, small))
    assert looks_like is not None
    assert f"set sae.input_scale to {40 * factor:.6g}" in looks_like[0]
    assert looks_like[1] < 0.05


@pytest.mark.parametrize("architecture", ["relu", "topk", "abstopk", "batchtopk", "jumprelu"])
def test_a_sound_autoencoder_is_told_nothing(architecture: str) -> None:
    sae, x = planted(architecture)
    assert unexplained(sae, x) < 0.2
    assert best_reading(sae, x, x, unexplained(sae, x)) is None


def test_a_random_autoencoder_is_told_nothing() -> None:
    sae, x = planted()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    assert best_reading(sae, x, x, unexplained(sae, x)) is None


def test_nothing_is_changed_by_trying() -> None:
    sae, x = planted()
    before = copy.deepcopy(sae.state_dict())
    best_reading(sae, x, x, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
