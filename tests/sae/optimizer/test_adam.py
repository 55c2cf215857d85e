"""Adam with moments in 8 bits, beside the slow and obvious version of it and beside torch's Adam."""

import copy

import pytest
import torch

from saeflow.recipe.settings import SAEConfig, TrainConfig
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.optimizer import codes
from saeflow.sae.optimizer.adam import MOMENT_BYTES, EightBitAdam, optimizer_of

LR, BETAS, EPS = 1e-2, (0.9, 0.99), 1e-8
SLOTS = "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"


def coded(numbers: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return what numbers (F, D) become in 8 bits: each block by the largest in it, then the nearest of 256."""
    found = []
    for block in numbers.split(codes.BLOCK_COLUMNS, 1):
        scale = block.abs().amax(1, keepdim=True).clamp(min=1e-30)
        distances = (block / scale)[..., None] - codes.quantisation_map(signed)
        found.append(codes.quantisation_map(signed)[distances.abs().argmin(-1)] * scale)
    return torch.cat(found, 1)


def gradients(n_steps: int, *shape: int) -> torch.Tensor:
    """Return gradients of very different sizes, of which the first row has none."""
    made = torch.Generator().manual_seed(0)
    drawn = torch.randn(n_steps, *shape, generator=made) * 10 ** (3 * torch.randn(shape, generator=made))
    drawn[:, 0] = 0
    return drawn


@pytest.mark.parametrize("width", [5, 256, 300])
def test_steps_are_those_of_adam_whose_moments_go_through_8_bits_after_each(width):
    weights, bias = torch.nn.Parameter(torch.ones(3, width)), torch.nn.Parameter(torch.ones(3))
    adam = EightBitAdam([weights, bias], BETAS)
    adam.param_groups[0]["lr"] = LR
    w, m, v = weights.detach().clone(), torch.zeros(3, width), torch.zeros(3, width)
    for step, gradient in enumerate(gradients(5, 3, width), 1):
        weights.grad, bias.grad = gradient, gradient[:, 0] + 1
        adam.step()
        assert weights.grad is gradient
        most = codes.most_ratio(*BETAS) * v.sqrt()
        m = m.clamp(-most, most).lerp(gradient, 1 - BETAS[0])
        v = BETAS[1] * v + (1 - BETAS[1]) * gradient.square()
        w -= LR / (1 - BETAS[0] ** step) * m / (v.sqrt() / (1 - BETAS[1] ** step) ** 0.5 + EPS)
        m, v = coded(m, True), coded(v, False)
        torch.testing.assert_close(weights.detach(), w, rtol=1e-5, atol=1e-6)
    state = adam.state[weights]
    torch.testing.assert_close(codes.decoded(state["exp_avg"], state["exp_avg_scale"], True), m, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(
        codes.decoded(state["exp_avg_sq"], state["exp_avg_sq_scale"], False), v, rtol=1e-5, atol=1e-12
    )
    assert {name: state[name].dtype for name in SLOTS} == dict(
        zip(SLOTS, [torch.uint8, torch.uint8, torch.float32, torch.float32], strict=True)
    )
    torch.testing.assert_close(bias.detach()[0], torch.tensor(1 - 5 * LR))
    assert adam.state[bias]["exp_avg"].dtype == torch.float32


def test_threads_change_no_bit_and_a_state_taken_over_goes_on_alike():
    several = gradients(4, 200, 270)
    ends = []
    for threads, interrupted in ((1, False), (3, False), (1, True)):
        weights = torch.nn.Parameter(torch.ones(200, 270))
        adam = EightBitAdam([weights], BETAS, threads)
        for step, gradient in enumerate(several):
            if interrupted and step == 2:
                state = copy.deepcopy(adam.state_dict())
                adam = EightBitAdam([weights], BETAS, threads)
                adam.load_state_dict(state)
            adam.param_groups[0]["lr"], weights.grad = LR, gradient
            adam.step()
        ends.append([weights.detach(), *adam.state[weights].values()])
    for other in ends[1:]:
        assert all(map(torch.equal, ends[0], other))


def test_moments_take_two_bytes_a_weight_and_a_scale_for_256():
    sae = SparseAutoencoder(SAEConfig(architecture="topk", n_features=64, k=2), 512)
    adam = optimizer_of(sae, TrainConfig(moments="8bit"))
    sae.training_loss(torch.randn(8, 512))[0].backward()
    adam.step()
    n_bytes = sum(each.nbytes for each in adam.state[sae.W_enc].values() if each.dim())
    assert n_bytes == sae.W_enc.numel() * MOMENT_BYTES["8bit"]
    assert type(optimizer_of(sae, TrainConfig())) is torch.optim.Adam
