"""Weights rounded at random to numbers of bfloat16."""

import numpy as np
import pytest
import torch
from torch import Tensor

from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.ranks import Ranks
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.optimizer import bfloat16
from saeflow.sae.optimizer.kernels import ROUNDS, _random
from saeflow.sae.split import Split

ABOVE_ONE = 1 + 2.0**-7 / 4
"""A quarter of the way from 1 to the next number of bfloat16."""


def rounded(seed: int = 1, step: int = 1, width: int = 700, split: Split | None = None, threads: int = 1) -> Tensor:
    config = SAEConfig(architecture="topk", n_features=70, k=2, seed=seed)
    sae = SparseAutoencoder(config, width, threads=threads, **({"split": split} if split else {}))
    for name in bfloat16.MATRICES:
        getattr(sae, name).data.fill_(ABOVE_ONE)
    bfloat16.round_at_random(sae, step)
    return torch.stack([sae.W_enc, sae.W_dec]).detach()


def test_rounding_goes_to_either_neighbour_and_keeps_the_mean():
    weights = rounded()
    assert weights.unique().tolist() == [1, 1 + 2.0**-7]
    deviation = 2.0**-7 * (0.25 * 0.75 / weights.numel()) ** 0.5
    assert abs(weights.double().mean().item() - ABOVE_ONE) < 4 * deviation


def test_rounding_depends_on_seed_step_matrix_row_and_column_alone():
    weights = rounded()
    assert torch.equal(weights, rounded(threads=3))
    assert torch.equal(weights[:, :, :500], rounded(width=500))
    for other in (rounded(seed=2), rounded(seed=-1), rounded(step=2), weights.flip(0), weights.flip(1)):
        assert 0.3 < (weights != other).float().mean() < 0.45
    shares = [rounded(split=Split(features=Ranks(number, 3))) for number in range(3)]
    assert torch.equal(weights, torch.cat(shares, 1))


def test_numbers_of_bfloat16_and_negative_ones_stay_where_they_belong():
    sae = SparseAutoencoder(SAEConfig(architecture="topk", n_features=4, k=2), 6)
    bfloat16.round_to_nearest(sae)
    before = [getattr(sae, name).detach().clone() for name in bfloat16.MATRICES]
    bfloat16.round_at_random(sae, 1)
    assert all(torch.equal(getattr(sae, name), old) for name, old in zip(bfloat16.MATRICES, before, strict=True))
    sae.W_enc.data.fill_(-ABOVE_ONE)
    bfloat16.round_at_random(sae, 1)
    assert set(sae.W_enc.unique().tolist()) == {-1 - 2.0**-7, -1}


def test_a_pursuit_has_one_matrix_still():
    sae = SparseAutoencoder(SAEConfig(architecture="mp", n_features=40, k=2), 30)
    sae.W_dec.data.mul_(1.001)
    bfloat16.round_at_random(sae, 1)
    assert torch.equal(sae.W_enc, sae.W_dec)


@pytest.mark.parametrize("counters", [(0, 0, 0, 0), (699, 69, 1000, 1), (2**32 - 1,) * 4])
def test_the_random_numbers_are_philox(counters):
    """Written out from Salmon et al. 2011 with whole numbers of any size."""
    seed = 0x123456789ABCDEF0
    c, key = list(counters), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(ROUNDS):
        high, low = divmod(0xD2511F53 * c[0], 2**32)
        high_2, low_2 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high_2 ^ c[1] ^ key[0], low_2, high ^ c[3] ^ key[1], low]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    assert _random(*map(np.uint64, counters), np.uint64(seed)) == c[0]
