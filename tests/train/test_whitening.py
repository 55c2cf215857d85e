"""Training on whitened activations; the saved SAE takes raw ones."""

from __future__ import annotations

import pytest
import torch

from saeflow.recipe.settings import SAEConfig
from saeflow.train.whitening import SHRINKAGE, whitening_of
from tests.support.small_saes import EVERY, B, D, rows, trained, values_of


def uneven_rows(n: int) -> torch.Tensor:
    """Rows whose directions vary by up to a thousandfold, around a mean far from zero."""
    dice = torch.Generator().manual_seed(4)
    return rows(n=n) @ (torch.randn(D, D, generator=dice) * torch.logspace(-2, 1, D)) + 30


def test_whitened_rows_vary_alike_in_every_direction():
    x = uneven_rows(20_000)
    whitening = whitening_of(x)
    found = torch.cov(whitening.apply(x.double().float()).T.double())
    covariance = torch.cov(x.T.double())
    values = torch.linalg.eigvalsh(covariance)
    shrunk = values / ((1 - SHRINKAGE) * values + SHRINKAGE * values.mean())
    torch.testing.assert_close(torch.linalg.eigvalsh(found), shrunk.sort().values, rtol=1e-2, atol=1e-2)
    assert (found - found.diag().diag()).abs().max() < 0.05 * found.diag().max() or shrunk.min() < 0.9
    identity = whitening.matrix.double() @ whitening.inverse.double()
    torch.testing.assert_close(identity, torch.eye(D, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", EVERY)
def test_with_the_whitening_folded_in_raw_activations_give_the_values_of_whitened_ones(name):
    raw = rows(n=B) @ torch.randn(D, D, generator=torch.Generator().manual_seed(4)) + 3
    whitening, sae = whitening_of(raw), trained(name)
    x = whitening.apply(raw)
    wanted, reconstruction = values_of(sae, x), sae.reconstruct(x)
    folded = whitening.removed_from(sae.folded(1.0))
    got = values_of(folded, raw)
    agree = (got - wanted).abs() <= 1e-3 * wanted.abs().max()
    assert agree.double().mean() > 0.998  # where two values tie, or a threshold is near, either may be right
    back = reconstruction @ whitening.inverse + whitening.mean
    near = agree.all(dim=1)
    torch.testing.assert_close(folded.reconstruct(raw)[near], back[near], rtol=1e-2, atol=0.05)


@pytest.mark.parametrize("settings", [{"architecture": "mp"}, {"target_site": "other"}])
def test_what_cannot_take_the_whitening_in_is_refused(settings):
    with pytest.raises(ValueError, match=r"Leave sae\.whiten out"):
        SAEConfig(whiten=True, **settings)


def test_rows_that_are_all_equal_have_a_whitening_without_nan():
    x = torch.full((8, D), 30.0)
    whitening = whitening_of(x)
    assert torch.equal(whitening.apply(x), torch.zeros(8, D))
    assert whitening.inverse.isfinite().all()
