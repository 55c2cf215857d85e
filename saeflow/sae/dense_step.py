"""The training step for batches in which so many entries matter that products of whole matrices are quicker.

So it is at the start of architectures that pay for their values: half of all pre-activations are positive then. A piece
of rows goes through everything that is needed of them while it is in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saeflow.sae import kernels
from saeflow.sae.encoder import Encoder, linear
from saeflow.sae.kernels import in_parallel, ranges
from saeflow.sae.sparse_step import Batch, Outcome, Task, Weights, pieces, without_radial

DENSEST = 0.1
"""Share of entries that matter up to which the sparse step is quicker, measured at D = 256, F = 4,096."""
_PIECE, _FEATURES = 1 << 20, 512
"""Pre-activations of the rows that a worker takes at a time, and features of a piece of the gradients."""


def run(batch: Batch, encoder: Encoder, weights: Weights, task: Task) -> Outcome:
    """What `sparse_step.run` gives, from all entries. The encoder has no cut."""
    n_rows, n_features = len(batch.low), len(weights.w_dec)
    rule, scale, every = task.rule, 2 * task.scale, slice(None)
    encoder.prepare()
    low_w_dec = kernels.converted(weights.w_dec, batch.low.dtype)
    values_low = batch.low.new_empty(n_rows, n_features)
    d_pre_low = torch.empty_like(values_low)
    residual = torch.empty_like(batch.target)

    def missed(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        rest = torch.addmm(target, values, weights.w_dec, beta=-1)
        return rest, linear(rest.to(low_w_dec.dtype), low_w_dec).float().mul_(scale)

    def forward_and_back(part: tuple[int, int]) -> tuple[float, float, Tensor, Tensor, dict[str, Tensor], Tensor]:
        rows = slice(*part)
        pre, target = encoder.pre_activations(batch.low[rows]).float(), batch.target[rows]
        values = rule.values(pre, every)
        residual[rows], g = missed(values, target)
        error, error_second, g_second = residual[rows].square().sum().item(), 0.0, None
        if (second := rule.second(pre)) is not None:
            rest, g_second = missed(second, target)
            error_second = rest.square().sum().item()
        d_pre, each = rule.backward(pre, values, g, g_second, every)
        values_low[rows], d_pre_low[rows] = values, d_pre
        fired = (values > 0).sum(0)
        sums = {name: numbers.sum(0) for name, numbers in each.items()}
        return error, error_second, fired, d_pre.sum(0), sums, rule.penalty(pre, values, every)

    found = in_parallel(forward_and_back, ranges(n_rows, min(max(_PIECE // n_features, 16), 256)))
    errors, errors_second, fired, d_pre, sums, penalty = zip(*found, strict=True)
    d_w_enc, d_w_dec = torch.empty_like(weights.w_enc), torch.empty_like(weights.w_dec)
    residual_low = kernels.converted(residual, batch.low.dtype)

    def differentiate(part: tuple[int, int]) -> None:
        features = slice(*part)
        d_w_enc[features] = d_pre_low[:, features].t() @ batch.low
        of_decoder = (values_low[:, features].t() @ residual_low).float().mul_(scale)
        d_w_dec[features] = without_radial(of_decoder, weights.w_dec[features]) if task.on_sphere else of_decoder

    in_parallel(differentiate, pieces(weights.w_dec, _FEATURES))
    total = torch.stack(fired).sum(0)
    return Outcome(
        sum(errors), sum(errors) + sum(errors_second), int(total.sum()), total, torch.stack(penalty).double().sum(),
        residual, d_w_enc, d_w_dec, torch.stack(d_pre).sum(0), residual.sum(0) * scale,
        {name: torch.stack([each[name] for each in sums]).sum(0) for name in sums[0]},
    )  # fmt: skip
