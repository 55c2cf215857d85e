"""The encoder product: its error stays within its bound."""

import numpy as np
import pytest
import torch

from saeflow.sae.encoding.encoder import SparseInputEncoder
from tests.support.uneven_saes import an_autoencoder, some_activations


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
