"""One training step of the top-k family without anything dense of shape (B, F): choose, reconstruct, differentiate.

The processor uses kernels. Elsewhere, and in tests, the same steps are torch index operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow import encoding, kernels
from saeflow.encoding import Encoder
from saeflow.kernels import in_parallel, ranges

ROWS, FEATURES = 256, 128
"""Rows and features that one worker takes at a time."""


class Entries(NamedTuple):
    """Active values by row: starts (B + 1) int64, features (nnz) int32, values (nnz) float32."""

    row_starts: Tensor
    feature_ids: Tensor
    values: Tensor

    @property
    def rows(self) -> Tensor:
        counts = self.row_starts.diff()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


class Weights(NamedTuple):
    """W_enc (F, D), b_enc (F), W_dec (F, D), b_dec (D)."""

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor


@dataclass(frozen=True)
class Prepared:
    """A batch less the decoder bias, in float32 and in the product's precision, and its total variance."""

    centred: Tensor
    low: Tensor
    variance: float


@dataclass(frozen=True)
class Step:
    """What the gradients need. Rows after the first B are the first rows again, for the auxiliary loss."""

    entries: Entries
    d_values: Tensor
    residual: Tensor
    row_scale: Tensor
    prepared: Prepared
    unit_norm: bool
    use_kernels: bool


class SparseLoss(torch.autograd.Function):
    """Hang a loss that is already computed into the graph, with its gradients for the weights."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, step: Step, *weights: Tensor) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(*weights)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *gradients(ctx.step, Weights(*ctx.saved_tensors), d_loss)


def on_processor(tensor: Tensor, use_kernels: bool) -> bool:
    return use_kernels and tensor.device.type == "cpu"


def prepare(x: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Prepared:
    """The variance is the sum over the batch of squared distances from its mean."""
    centred, low = torch.empty_like(x), torch.empty(x.shape, dtype=dtype, device=x.device)

    def work(rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
        part = torch.sub(x[slice(*rows)], b_dec, out=centred[slice(*rows)])
        low[slice(*rows)].copy_(part)
        return part.sum(0), torch.linalg.vector_norm(part)

    sums, norms = zip(*in_parallel(work, ranges(len(x), ROWS)), strict=True)
    squares = torch.stack(norms).double().square().sum()
    variance = squares - torch.stack(sums).double().sum(0).square().sum() / len(x)
    return Prepared(centred, low, max(variance.item(), 1e-30))


def select(
    rows: Tensor, encoder: Encoder, k: int, by_row: bool, guess: float, use_kernels: bool
) -> tuple[Entries, float]:
    """The k largest positive pre-activations per row, or k times B of the whole batch. See `select_batch` for `guess`."""
    if not on_processor(rows, use_kernels):
        pre = encoder.pre_activations(rows)
        return (_dense_top(pre, k) if by_row else _dense_batch(pre, k * len(rows))), 0.0
    if by_row:
        return _entries(encoding.select_top(rows, encoder, k)), 0.0
    sparse, guess = encoding.select_batch(rows, encoder, k * len(rows), guess)
    return _entries(sparse), guess


def _entries(sparse: encoding.SparseValues) -> Entries:
    return Entries(*(torch.from_numpy(array) for array in sparse))


def _dense_top(pre: Tensor, k: int) -> Entries:
    places = pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return _dense_entries(pre, torch.zeros_like(pre, dtype=torch.bool).scatter_(1, places, True))


def _dense_batch(pre: Tensor, n: int) -> Entries:
    places = pre.flatten().sort(descending=True, stable=True).indices[:n]
    return _dense_entries(pre, torch.zeros(pre.numel(), dtype=torch.bool, device=pre.device).scatter_(0, places, True))


def _dense_entries(pre: Tensor, keep: Tensor) -> Entries:
    rows, ids = (keep.view_as(pre) & (pre > 0)).nonzero(as_tuple=True)
    starts = tf.pad(torch.bincount(rows, minlength=len(pre)).cumsum(0), (1, 0))
    return Entries(starts, ids.int(), pre[rows, ids].float())


def reconstruct(
    entries: Entries, w_dec: Tensor, target: Tensor, residual: Tensor, use_kernels: bool
) -> tuple[Tensor, Tensor]:
    """Write values @ w_dec - target to `residual`; give its products with the active directions, and squared norms."""
    if not on_processor(target, use_kernels):
        return _reconstruct_anywhere(entries, w_dec, target, residual)
    d_values, losses = torch.empty_like(entries.values), torch.empty(len(target))
    arrays = [t.numpy() for t in (*entries, w_dec, target, residual, d_values, losses)]
    in_parallel(lambda rows: kernels.reconstruct(*rows, *arrays), ranges(len(target), ROWS))
    return d_values, losses


def _reconstruct_anywhere(entries: Entries, w_dec: Tensor, target: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    ids, rows = entries.feature_ids.long(), entries.rows
    residual.copy_(decode(entries, w_dec) - target)
    parts = ranges(len(ids), 1 << 16)
    d_values = [(residual[rows[a:b]] * w_dec[ids[a:b]]).sum(1) for a, b in parts]
    return torch.cat([entries.values[:0], *d_values]), residual.square().sum(1)


def decode(entries: Entries, w_dec: Tensor) -> Tensor:
    """values @ w_dec: (B, D)."""
    starts, ids, values = entries
    return tf.embedding_bag(ids.long(), w_dec, starts, mode="sum", per_sample_weights=values, include_last_offset=True)


def gradients(step: Step, weights: Weights, d_loss: Tensor) -> Weights:
    """Of the loss for all four weights. Nothing flows to the activations."""
    entries = step.entries
    scale = step.row_scale * d_loss
    by_entry = scale.repeat_interleave(entries.row_starts.diff())
    pair = torch.stack([entries.values * by_entry, step.d_values * by_entry])
    transposed = _feature_gradients if on_processor(scale, step.use_kernels) else _feature_gradients_anywhere
    d_w_enc, d_b_enc, d_w_dec = transposed(step, weights.w_dec, pair)
    n_rows = len(step.prepared.centred)
    d_b_dec = scale[:n_rows] @ step.residual[:n_rows] - d_b_enc @ weights.w_enc
    return Weights(d_w_enc, d_b_enc, d_w_dec, d_b_dec)


def _feature_gradients(step: Step, w_dec: Tensor, pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    starts, ids, _ = (t.numpy() for t in step.entries)
    feature_starts, rows, (values, d_values) = encoding.transpose(starts, ids, pair.numpy(), len(w_dec))
    out = torch.empty_like(w_dec), torch.empty(len(w_dec)), torch.empty_like(w_dec)
    low = kernels.converted(step.residual, step.prepared.low.dtype), step.prepared.low
    matrices = [kernels.bits_of(t) if t.dtype == torch.bfloat16 else t.numpy() for t in low]
    arrays = [feature_starts, rows, values, d_values, *matrices, w_dec.numpy(), step.unit_norm]
    arrays += [t.numpy() for t in out]
    in_parallel(lambda features: kernels.accumulate(*features, *arrays), ranges(len(w_dec), FEATURES))
    return out


def _feature_gradients_anywhere(step: Step, w_dec: Tensor, pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ids, rows = step.entries.feature_ids.long(), step.entries.rows
    order = ids.argsort(stable=True)
    starts = tf.pad(torch.bincount(ids, minlength=len(w_dec)).cumsum(0), (1, 0))
    low = step.prepared.low
    centred = torch.cat([low, low[: len(step.residual) - len(low)]]).float()
    residual = step.residual.to(low.dtype).float()

    def product(numbers: Tensor, matrix: Tensor) -> Tensor:
        bags = rows[order], matrix, starts
        return tf.embedding_bag(*bags, mode="sum", per_sample_weights=numbers[order], include_last_offset=True)

    d_w_enc, d_w_dec = product(pair[1], centred), product(pair[0], residual)
    d_b_enc = torch.zeros_like(w_dec[:, 0]).index_add_(0, ids, pair[1])
    if step.unit_norm:
        along = (d_w_dec * w_dec).sum(1) / w_dec.square().sum(1)
        d_w_dec = d_w_dec - along[:, None] * w_dec
    return d_w_enc, d_b_enc, d_w_dec


@dataclass(frozen=True)
class Auxiliary:
    """Which dead features (int64 ids) explain how much of the residual of how many rows, and with which weight.

    Gao et al. 2024, arXiv 2406.04093: of the dead features the `k` largest pre-activations reconstruct what the
    living ones left over. It is done on so few rows that it costs a fraction of the step.
    """

    features: Tensor
    k: int
    n_rows: int
    weight: float

    @classmethod
    def plan(cls, dead: Tensor, batch_rows: int, width: int, k: int, weight: float) -> Auxiliary:
        """At most a quarter as many active entries as the step itself has; on all rows while few features are dead."""
        k_dead = min(max(width // 2, 1), len(dead))
        n_rows = min(batch_rows, max(batch_rows * k // (4 * k_dead), 1)) if len(dead) and weight > 0 else 0
        return cls(dead, k_dead, n_rows, weight)


def run(
    prepared: Prepared,
    entries: Entries,
    weights: Weights,
    encoder: Encoder,
    auxiliary: Auxiliary,
    on_sphere: bool,
    use_kernels: bool,
) -> tuple[Tensor, Tensor, Step]:
    """Share of variance unexplained, auxiliary loss (before its weight), and what backward needs."""
    n, n_aux = len(prepared.centred), auxiliary.n_rows
    residual = prepared.centred.new_empty(n + n_aux, prepared.centred.shape[1])
    row_scale = residual.new_full((n + n_aux,), 2 / prepared.variance)
    d_values, losses = reconstruct(entries, weights.w_dec, prepared.centred, residual[:n], use_kernels)
    unexplained = losses.double().sum() / prepared.variance
    aux_loss = torch.zeros_like(unexplained)
    if n_aux:
        rest = -residual[:n_aux]
        extra = _dead_entries(prepared.low[:n_aux], encoder, auxiliary, use_kernels)
        extra_d, extra_losses = reconstruct(extra, weights.w_dec, rest, residual[n:], use_kernels)
        total = losses[:n_aux].double().sum().clamp(min=1e-30)
        aux_loss = extra_losses.double().sum() / total
        row_scale[n:] = 2 * auxiliary.weight / total
        entries, d_values = _one_after_the_other(entries, extra), torch.cat([d_values, extra_d])
    step = Step(entries, d_values, residual, row_scale, prepared, on_sphere, use_kernels)
    return unexplained, aux_loss, step


def _dead_entries(low: Tensor, encoder: Encoder, auxiliary: Auxiliary, use_kernels: bool) -> Entries:
    dead = auxiliary.features
    small = Encoder(encoder.w_enc[dead], encoder.b_enc[dead], encoder.b_dec, encoder.dtype)
    entries, _ = select(low, small, auxiliary.k, True, 0.0, use_kernels)
    return entries._replace(feature_ids=dead[entries.feature_ids.long()].int())


def _one_after_the_other(first: Entries, second: Entries) -> Entries:
    starts = torch.cat([first.row_starts, second.row_starts[1:] + len(first.values)])
    return Entries(starts, torch.cat([first.feature_ids, second.feature_ids]), torch.cat([first.values, second.values]))
