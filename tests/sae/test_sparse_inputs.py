"""The encoder product of activations that are mostly zero."""

import numpy as np
import pytest
import torch

from saeflow.sae.encoding import sparse_inputs
from tests.support.uneven_saes import D, some_activations


@pytest.mark.parametrize("n_features", [32, 320, 544])
def test_the_product_of_mostly_zero_rows_is_that_of_the_weights_in_bfloat16(n_features):
    x = torch.relu(some_activations(7, torch.float32) - 4)
    x[3] = 0
    w, base = torch.randn(n_features, D, generator=torch.Generator().manual_seed(2)), torch.arange(n_features).float()
    out = np.full((7, n_features), np.nan, np.float32)
    sparse_inputs.product(x.numpy(), sparse_inputs.packed(w, 1), base.numpy(), out.reshape(-1))
    wanted = x.double() @ w.bfloat16().double().t() + base
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
