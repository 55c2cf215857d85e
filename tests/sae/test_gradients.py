"""Sums of entries by feature."""

import torch

from saeflow.sae.gradients import summed_in_order


def test_sums_in_order_are_sums_by_feature():
    generator = torch.Generator().manual_seed(2)
    ids, numbers = torch.randint(0, 7, (50,), generator=generator), torch.randn(50, generator=generator)
    wanted = torch.zeros(9, dtype=torch.float64).index_add_(0, ids, numbers.double())
    torch.testing.assert_close(summed_in_order(ids, numbers, 9).double(), wanted)
