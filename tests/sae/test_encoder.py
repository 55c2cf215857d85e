"""The encoder product: its error stays within its bound."""

import numpy as np
import pytest
import torch

from saeflow.sae.encoder import SparseInputEncoder, multiply_nonzero, packed
from tests.support.uneven_saes import D, an_autoencoder, some_activations


@pytest.mark.parametrize("share_of_zeros", [0.0, 0.9])
@pytest.mark.parametrize("width", [3, 64, 500])
def test_the_screen_never_errs_by_more_than_its_bound(width, share_of_zeros):
    sae, x = an_autoencoder("relu", width=width, n_features=320), some_activations(64, torch.float32, width)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < share_of_zeros] = 0
    encoder = sae.current_encoder().suited_to(x)
    assert isinstance(encoder, SparseInputEncoder) == (share_of_zeros > 0)
    rows, row_bounds = encoder.bounded(x)
    screen = encoder.pre_activations(rows).double().numpy()
    exact = (x.double() - sae.b_dec.double()) @ sae.W_enc.double().t() + sae.b_enc.double()
    error = np.abs(screen - exact.detach().numpy())
    bound = row_bounds @ encoder.bounds[:2] + encoder.bounds[2]
    assert (error <= bound + encoder.relative_error * np.abs(screen)).all()


@pytest.mark.parametrize("n_features", [32, 320, 544])
def test_the_product_of_mostly_zero_rows_is_that_of_the_weights_in_bfloat16(n_features):
    x = torch.relu(some_activations(7, torch.float32) - 4)
    x[3] = 0
    w, base = torch.randn(n_features, D, generator=torch.Generator().manual_seed(2)), torch.arange(n_features).float()
    out = np.full((7, n_features), np.nan, np.float32)
    multiply_nonzero(x.numpy(), packed(w, 1), base.numpy(), out.reshape(-1))
    wanted = x.double() @ w.bfloat16().double().t() + base
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
