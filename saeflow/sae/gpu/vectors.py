"""Adam's step of parameters that are vectors: biases, and those of one architecture alone. Always a dense one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from saeflow.sae.gpu.guard import Guard
from saeflow.sae.gpu.rows.adam import AdamClock, update_vector
from saeflow.sae.parameters import LEAST_THRESHOLD, THRESHOLD_GAIN, SAEParameters


def update_vectors(
    sae: SAEParameters, gradients: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]],
    clock: AdamClock, guard: Guard,
) -> None:  # fmt: skip
    """Let vectors take the step that `clock.advance` has begun, by their gradients, if the guard allows it.

    `states` are Adam's.
    """
    for name, gradient in gradients.items():
        state = getattr(sae, name).detach(), states[name]["exp_avg"], states[name]["exp_avg_sq"]
        fresh = [each.clone() for each in state]
        update_vector(fresh[0], gradient, fresh[1], fresh[2], clock)
        for old, new in zip(state, fresh, strict=True):
            guard.change(old, new)


def move_thresholds(sae: SAEParameters, n_active: Tensor, k: int, sparsity: float, guard: Guard) -> None:
    """Bring jumprelu's thresholds up to date after a step, as `SAEParameters.after_step` does.

    `n_active` (): active features of a token. If they are to be k, all thresholds move together.
    """
    moved = sae.log_threshold.detach()
    if sae.config.aims_at_k:
        off = sparsity * (n_active.clamp(min=1e-6) / k).log()
        moved = moved + THRESHOLD_GAIN * off.clamp(-3.0, 3.0)
    moved = moved.clamp(min=math.log(LEAST_THRESHOLD))
    guard.change(sae.log_threshold.detach(), moved)
    guard.change(sae.threshold, torch.exp(moved))
