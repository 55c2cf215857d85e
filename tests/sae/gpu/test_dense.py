"""Kernels for dense gradients give the bits that the processor gives."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from saeflow.recipe.settings import SAEConfig
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.gpu.rows import dense
from saeflow.sae.optimizer import bfloat16
from saeflow.sae.optimizer.adam import EightBitAdam, _constants, begun_state
from tests.sae.gpu import PLACE

SLOTS = "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"


@pytest.mark.parametrize("width", [7, 300])
def test_a_step_in_8_bits_is_the_processors(width: int) -> None:
    made = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(4, width, generator=made))
    adam = EightBitAdam([weights], (0.9, 0.999))
    here = weights.detach().clone().to(PLACE)
    begun = begun_state(EightBitAdam([torch.nn.Parameter(here)], (0.9, 0.999)), torch.nn.Parameter(here))
    state = [begun[name] for name in SLOTS]
    for step in range(1, 4):
        gradient = torch.randn(4, width, generator=made) * 10 ** torch.randn(4, width, generator=made)
        gradient[0] = 0
        weights.grad = gradient
        adam.step()
        dense.step_rows(here, gradient.to(PLACE), state, _constants(adam.param_groups[0], step))
    torch.testing.assert_close(here.cpu(), weights.detach(), rtol=EXACT, atol=EXACT)
    for name, mine in zip(SLOTS, state, strict=True):
        torch.testing.assert_close(mine.cpu(), adam.state[weights][name], rtol=EXACT, atol=int(EXACT > 0))


EXACT = 0.0 if PLACE == "cpu" else 1e-6
"""A GPU multiplies and adds in one operation."""


@pytest.mark.parametrize("seed", [3, -3])
def test_rounding_is_the_processors(seed: int) -> None:
    sae = SparseAutoencoder(SAEConfig(architecture="topk", n_features=5, k=2, seed=seed), 300)
    before = [getattr(sae, name).detach().clone().to(PLACE) for name in bfloat16.MATRICES]
    bfloat16.round_at_random(sae, 9)
    for which, (name, mine) in enumerate(zip(bfloat16.MATRICES, before, strict=True)):
        first, rest = mine[:2].clone(), mine[2:].clone()
        dense.round_rows(first, 0, seed, 9, which)
        dense.round_rows(rest, 2, seed, 9, which)
        assert torch.equal(torch.cat([first, rest]).cpu(), getattr(sae, name))
