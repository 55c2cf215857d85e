"""A training step without anything dense of shape (B, F): choose entries, reconstruct, differentiate.

The processor uses kernels. Elsewhere, and in tests, torch's index operations do the same. `dense_step` is for batches
in which too many entries are active.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.activations.sparse_values import SparseRows, SparseTensors, SparseValues
from saeflow.runtime.threads import in_parallel
from saeflow.sae.architectures import FeatureSums
from saeflow.sae.encoder import Encoder
from saeflow.sae.exact import positive_entries, top_entries, top_entries_of_batch
from saeflow.sae.step.batch import (
    WORKER_ROWS,
    CentredBatch,
    StepResult,
    StepSettings,
    Weights,
    on_processor,
    worker_ranges,
)
from saeflow.sae.step.gradients import SparseReconstruction, WeightGradients, summed_over_rows


def largest_entries(
    rows: Tensor, encoder: Encoder, k: int, by_row: bool, guess: float, use_kernels: bool
) -> tuple[SparseTensors, float]:
    """Return the k largest positive pre-activations of each row, or k times B of the whole batch.

    `guess`, and the one returned for the next batch, are those of `top_entries_of_batch`.
    """
    if not on_processor(rows, use_kernels):
        pre = encoder.pre_activations(rows)
        return _dense_entries(pre, _largest(pre, k) if by_row else _largest(pre.reshape(1, -1), k * len(rows))), 0.0
    if by_row:
        return _as_tensors(top_entries(rows, encoder, k)), 0.0
    found, guess = top_entries_of_batch(rows, encoder, k * len(rows), guess)
    return _as_tensors(found), guess


def entries_above_cut(rows: Tensor, encoder: Encoder, use_kernels: bool) -> SparseTensors:
    """Return all pre-activations above the encoder's cut."""
    if on_processor(rows, use_kernels):
        found = _as_tensors(positive_entries(rows, encoder))
    else:
        pre = encoder.pre_activations(rows)
        found = _dense_entries(pre, pre > 0)
    return found if encoder.cut is None else found._replace(values=found.values + encoder.cut[found.feature_ids.long()])


def _as_tensors(sparse: SparseValues) -> SparseTensors:
    return SparseRows(*(torch.from_numpy(array) for array in sparse))


def _largest(pre: Tensor, k: int) -> Tensor:
    """True at each row's k largest: on the processor, of equals the lower ones; elsewhere whichever are quickest."""
    if pre.device.type == "cpu":
        places = pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
    else:
        places = pre.topk(k, dim=1, sorted=False).indices
    return torch.zeros_like(pre, dtype=torch.bool).scatter_(1, places, True)


def _dense_entries(pre: Tensor, keep: Tensor) -> SparseTensors:
    rows, ids = (keep.view_as(pre) & (pre > 0)).nonzero(as_tuple=True)
    starts = tf.pad(torch.bincount(rows, minlength=len(pre)).cumsum(0), (1, 0))
    return SparseRows(starts, ids.int(), pre[rows, ids].float())


def sparse_step(batch: CentredBatch, chosen: SparseTensors, weights: Weights, settings: StepSettings) -> StepResult:
    """Return loss and gradients from the pre-activations of the chosen entries."""
    found = SparseReconstruction.room_for(chosen, batch.target, settings)
    has_second = settings.rule.second_values(chosen.values[:0]) is not None
    second = SparseReconstruction.room_for(chosen, batch.target, settings) if has_second else None
    pair = chosen.values.new_empty(2, len(chosen.values))

    def explain(rows: tuple[int, int]) -> _RowsResult:
        return _explain_rows(rows, chosen, found, second, weights.w_dec, batch.target, settings, pair)

    parts = in_parallel(explain, worker_ranges(batch.low, WORKER_ROWS, settings.use_kernels), settings.threads)
    gradients = WeightGradients(torch.empty_like(weights.w_enc), torch.empty_like(weights.w_dec), fresh=True)
    by_feature = gradients.add(found, pair, batch.low, weights.w_dec, settings)
    errors = torch.stack([part.errors for part in parts]).sum(0)
    active = torch.cat([part.active for part in parts])
    scale = 2 * settings.scale / len(settings.ends)
    return StepResult(
        error=errors[-1].item(),
        mean_error=errors.mean().item() + sum(part.second_error for part in parts),
        n_active=len(active),
        fired=by_feature.count(active),
        penalty=torch.stack([part.penalty for part in parts]).double().sum(),
        residual=found.residual[-1],
        d_w_enc=gradients.d_w_enc,
        d_w_dec=gradients.d_w_dec,
        d_pre=by_feature(pair[1]),
        d_b_dec=summed_over_rows(found.residual[0], settings.threads).mul_(scale),
        sums={name: by_feature(torch.cat([part.to_sum[name] for part in parts])) for name in parts[0].to_sum},
    )


class _RowsResult(NamedTuple):
    """Errors and counts of a range of rows."""

    errors: Tensor
    """Squared errors of each nested dictionary (G)."""
    second_error: float
    """Squared error of the second reconstruction."""
    active: Tensor
    """Features of active entries."""
    penalty: Tensor
    to_sum: FeatureSums
    """Numbers of entries, to be summed by feature."""


def _explain_rows(
    rows: tuple[int, int], chosen: SparseTensors, found: SparseReconstruction, second: SparseReconstruction | None,
    w_dec: Tensor, target: Tensor, settings: StepSettings, pair: Tensor,
) -> _RowsResult:  # fmt: skip
    """Reconstruct some rows; write values and derivatives of their entries, times the loss's scale, to `pair`."""
    mine = slice(int(chosen.row_starts[rows[0]]), int(chosen.row_starts[rows[1]]))
    rule, ids, pre = settings.rule, chosen.feature_ids[mine].long(), chosen.values[mine]
    values, scale = found.entries.values[mine], 2 * settings.scale / len(settings.ends)
    values.copy_(rule.values(pre, ids))
    found.reconstruct(rows, w_dec, target, settings)
    g_second, second_error = None, 0.0
    second_values = rule.second_values(pre)
    if second is not None and second_values is not None:
        second.entries.values[mine] = second_values
        second.reconstruct(rows, w_dec, target, settings)
        g_second, second_error = second.g[mine] * scale, second.losses[0, slice(*rows)].double().sum().item()
    d_pre, to_sum = rule.backward(pre, values, found.g[mine] * scale, g_second, ids)
    pair[0, mine], pair[1, mine] = values * scale, d_pre
    errors = found.losses[:, slice(*rows)].double().sum(1)
    return _RowsResult(errors, second_error, ids[values > 0], rule.penalty(pre, values, ids), to_sum)
