"""Transcoders: they read one site and reconstruct another (Dunefsky et al. 2024, arXiv 2406.11944)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as tf

from saeflow.recipe.settings import SAEConfig
from saeflow.sae.autoencoder import SparseAutoencoder

D, D_OUT, ACTIVE = 16, 24, 3


@pytest.mark.long
def test_a_transcoder_recovers_a_known_linear_map():
    """Sparse inputs x and targets A x + b: its features are the columns of A, and it maps inputs it never saw alike."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(D_OUT, D, generator=generator), torch.randn(D_OUT, generator=generator)

    def sample(n: int = 512) -> torch.Tensor:
        present = torch.rand(n, D, generator=generator) < ACTIVE / D
        return present * torch.randn(n, D, generator=generator).abs()

    config = SAEConfig(architecture="batchtopk", n_features=2 * D, k=ACTIVE, target_site="other", seed=1)
    transcoder = SparseAutoencoder(config, D, D_OUT)
    transcoder.initialise(sample(4096).mean(0), b)
    adam = torch.optim.Adam(transcoder.parameters(), lr=1e-2, fused=True)
    for step in range(1500):
        adam.param_groups[0]["lr"] = 1e-2 * min(1.0, (1500 - step) / 700)
        x = sample()
        loss, _ = transcoder.training_loss(x, 1 / 32, 20_000, target=x @ a.t() + b)
        adam.zero_grad()
        loss.backward()
        adam.step()
        transcoder.after_step()

    cosines = tf.normalize(a.t(), dim=1) @ transcoder.W_dec.detach().t()
    assert cosines.max(1).values.min() > 0.98
    x = sample(2000)
    wanted = x @ a.t() + b
    missed = (transcoder.eval().reconstruct(x) - wanted).square().sum()
    assert missed < 0.02 * (wanted - wanted.mean(0)).square().sum()
