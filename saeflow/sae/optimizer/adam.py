"""Adam with moments in 8 bits (Dettmers et al. 2022, arXiv 2110.02861), on the processor and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.recipe.settings import TrainConfig
from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae.kernels import Floats, Matrix
from saeflow.sae.optimizer import codes, kernels
from saeflow.sae.parameters import SAEParameters

MOMENT_BYTES = {"float32": 8.0, "8bit": 2 + 2 * 4 / codes.BLOCK_COLUMNS}
"""Bytes that both moments of a weight take, by `train.moments`."""


def optimizer_of(sae: SAEParameters, config: TrainConfig) -> torch.optim.Adam:
    """Return the optimizer that a training asks for."""
    betas = config.beta1, config.beta2
    if config.moments == "float32":
        return torch.optim.Adam(sae.parameters(), betas=betas, fused=True)
    return EightBitAdam(sae.parameters(), betas, sae.threads)


class EightBitAdam(torch.optim.Adam):
    """Adam whose moments of matrices (F, D) lie in 8 bits. Those of vectors stay in float32, and torch updates them.

    `exp_avg` and `exp_avg_sq` of a matrix hold codes (F, D), uint8; `exp_avg_scale` and `exp_avg_sq_scale` hold the
    largest magnitude of each block (F, ceil(D / 256)).
    """

    def __init__(self, parameters: Iterable[Tensor], betas: tuple[float, float], threads: int = 1) -> None:
        super().__init__(parameters, betas=betas, fused=True)
        self.threads = threads

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take a step of every parameter that has a gradient."""
        given = [(each, each.grad) for each in self.param_groups[0]["params"] if each.dim() == 2]
        for matrix, _ in given:
            matrix.grad = None
        super().step()
        for matrix, gradient in given:
            matrix.grad = gradient
            if gradient is not None:
                self._step_matrix(matrix, gradient)

    def _step_matrix(self, weights: Tensor, gradient: Tensor) -> None:
        state = begun_state(self, weights)
        state["step"] += 1
        moments = [state[name] for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")]
        constants = _constants(self.param_groups[0], int(state["step"]))
        if weights.device.type != "cpu":
            from saeflow.sae.gpu.rows.dense import step_rows  # which imports triton

            step_rows(weights.detach(), gradient, moments, constants)
            return
        w, g, m, v, m_scale, v_scale = (each.detach().numpy() for each in (weights, gradient.contiguous(), *moments))
        maps, least, ends = _tables()
        numbers = np.array(constants, np.float32)

        def step_some(rows: tuple[int, int]) -> None:
            kernels.step_range(*rows, w, g, m, v, m_scale, v_scale, maps, least, ends, numbers)

        in_parallel(step_some, ranges(len(weights), kernels.ROWS_OF_WORKER), self.threads)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state. torch alone would turn codes into the type of the weights."""
        super().load_state_dict(state_dict | {"state": {}})
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            if number in state_dict["state"]:
                given = state_dict["state"][number]
                self.state[parameter] = {name: value.to(parameter.device, copy=True) for name, value in given.items()}


def begun_state(adam: torch.optim.Adam, parameter: Tensor) -> dict[str, Tensor]:
    """Return the optimizer's state of a parameter, before the first step if it has none yet."""
    state: dict[str, Tensor] = adam.state[parameter]
    if not state:
        make, place = torch.zeros_like, parameter.device
        state["step"] = torch.zeros((), device=place)
        in_codes = isinstance(adam, EightBitAdam) and parameter.dim() == 2
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = make(parameter, dtype=torch.uint8 if in_codes else torch.float32, requires_grad=False)
        for name in ("exp_avg_scale", "exp_avg_sq_scale") if in_codes else ():
            state[name] = torch.zeros(len(parameter), codes.n_blocks(parameter.shape[1]), device=place)
    return state


def _constants(group: dict[str, Any], step: int) -> tuple[float, ...]:
    """Return what `kernels.step_range` takes."""
    beta1, beta2 = group["betas"]
    corrections = 1 - beta1**step, math.sqrt(1 - beta2**step)
    kept = group["eps"], 1 - beta1, 1 - beta2, beta2, codes.most_ratio(beta1, beta2)
    return group["lr"] / corrections[0], corrections[1], *kept


@cache
def _tables() -> tuple[Floats, Matrix, Floats]:
    """Return the numbers that codes stand for, the least codes, and where codes end, of signed and unsigned ones."""
    edge = torch.tensor([torch.inf])
    kinds = True, False
    tables = (
        [codes.quantisation_map(signed) for signed in kinds],
        [codes.least_codes(signed) for signed in kinds],
        [torch.cat([codes.midpoints(signed), edge]) for signed in kinds],
    )
    maps, least, ends = (torch.stack(each).numpy() for each in tables)
    return maps, least, ends
