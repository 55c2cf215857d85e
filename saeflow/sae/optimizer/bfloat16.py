"""Weights that are numbers of bfloat16.

After each step every weight is rounded up or down at random, with the probability that keeps the mean, so that changes
much smaller than the distance of two numbers add up all the same (Gupta et al. 2015, arXiv 1502.02551).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae.optimizer import kernels
from saeflow.sae.parameters import SAEParameters

MATRICES = "W_enc", "W_dec"
"""Parameters whose rows are features. Biases and thresholds stay in float32."""
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of a weight where the kernels of a GPU train it, by `train.weights`. On the processor it is always 4."""


@torch.no_grad()
def round_to_nearest(sae: SAEParameters) -> None:
    """Round both matrices to the nearest numbers of bfloat16: before the first step, and where rows begin anew."""
    for name in MATRICES:
        weight = getattr(sae, name)
        weight.copy_(weight.bfloat16())


def store_narrow(sae: SAEParameters) -> None:
    """Store both matrices as bfloat16, as the kernels of a GPU read them. `sae.float()` takes that back."""
    for name in MATRICES:
        weight = getattr(sae, name)
        weight.data = weight.data.bfloat16()


@torch.no_grad()
def round_at_random(sae: SAEParameters, step: int) -> None:
    """Round both matrices, in float32, after the step of this number; the first is 1.

    The bits depend on the seed of the SAE, the step, the matrix, the feature and the column alone. So they are those of
    a training that was not interrupted, and of the kernels.
    """
    first = sae.split.features.share(sae.config.n_features).start
    for which, name in enumerate(MATRICES):
        _round(getattr(sae, name).detach(), first, sae.config.seed, step, which, sae.threads)
    if sae.traits.pursues:
        sae.W_enc.copy_(sae.W_dec)


def _round(weight: Tensor, first: int, seed: int, step: int, which: int, threads: int) -> None:
    if weight.device.type != "cpu":
        from saeflow.sae.gpu.rows.dense import round_rows  # which imports triton

        round_rows(weight, first, seed, step, which)
        return
    bits, key = weight.numpy().view(np.uint32), np.uint64(seed % 2**64)

    def round_some(rows: tuple[int, int]) -> None:
        kernels.round_range(*rows, bits, first, step, which, key)

    in_parallel(round_some, ranges(len(weight), kernels.ROWS_OF_WORKER), threads)
