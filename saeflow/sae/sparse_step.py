"""A training step without anything dense of shape (B, F): choose entries, reconstruct, differentiate.

The processor uses kernels. Elsewhere, and in tests, the same steps are torch index operations. `dense_step` is the
same for batches in which too many entries matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.sae import encoder as encoding
from saeflow.sae import kernels
from saeflow.sae.architectures import Rule, Sums, Top
from saeflow.sae.encoder import Encoder
from saeflow.sae.kernels import in_parallel, ranges

_DEGENERATE = 1e-6
"""Share of the squares of a batch below which its variance, or what is left to explain, is rounding."""
ROWS, FEATURES = 512, 128
"""Rows and features that one worker takes at a time."""


class Entries(NamedTuple):
    """Entries by row: starts (B + 1) int64, features (nnz) int32, pre-activations or values (nnz) float32."""

    row_starts: Tensor
    feature_ids: Tensor
    values: Tensor

    @property
    def rows(self) -> Tensor:
        counts = self.row_starts.diff()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


class Weights(NamedTuple):
    """W_enc (F, D), b_enc (F), W_dec (F, D_out), b_dec (D_out)."""

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor


@dataclass(frozen=True)
class Batch:
    """What is read less the input bias, in float32 and in the product's precision; what is to be reconstructed less the
    decoder bias; and the target's total variance."""

    centred: Tensor
    low: Tensor
    target: Tensor
    variance: float

    def scale(self, of_variance: bool) -> float:
        """What a squared error counts: a share of the variance, or of all numbers."""
        return 1 / (self.variance if of_variance else self.target.numel())


@dataclass(frozen=True)
class Task:
    """How a batch is explained. `ends`: sizes of the nested dictionaries, ascending, int32."""

    rule: Rule
    ends: Tensor
    scale: float
    on_sphere: bool
    use_kernels: bool


@dataclass
class Outcome:
    """Squared errors summed (of the whole dictionary, and of all nested ones' mean), entries of each feature, the
    penalty's sum, and gradients: of encoder and decoder rows, of pre-activations summed by feature, of the decoder
    bias where it is added at the end, and what else the rule sums by feature."""

    error: float
    mean_error: float
    n_active: int
    fired: Tensor
    penalty: Tensor
    residual: Tensor
    d_w_enc: Tensor
    d_w_dec: Tensor
    d_pre: Tensor
    d_b_dec: Tensor
    sums: Sums


def on_processor(tensor: Tensor, use_kernels: bool) -> bool:
    return use_kernels and tensor.device.type == "cpu"


def pieces(tensor: Tensor, size: int, use_kernels: bool = True) -> list[tuple[int, int]]:
    """Ranges of the first dimension for the workers of the processor; elsewhere one of all."""
    return ranges(len(tensor), size) if on_processor(tensor, use_kernels) else [(0, len(tensor))]


def prepare(x: Tensor, b_in: Tensor, target: Tensor | None, b_dec: Tensor, dtype: torch.dtype) -> Batch:
    """The variance is the sum over the batch of squared distances from its mean. Without a target it is x, and b_dec
    b_in.

    Rows that are all equal, or a single one, have none: then distances from the decoder bias stand in.
    """
    centred, sums, squares, low = _centred(x, b_in, dtype)
    wanted = centred
    if target is not None:
        wanted, sums, squares, _ = _centred(target, b_dec, torch.float32)
    variance = (squares - sums.square().sum() / len(x)).item()
    if variance < _DEGENERATE * squares.item():
        variance = squares.item()
    return Batch(centred, low, wanted, max(variance, 1e-30))


def _centred(x: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x - bias, its sum over rows and its sum of squares in float64, and itself in `dtype`."""
    centred = torch.empty_like(x)
    low = centred if dtype == torch.float32 else torch.empty(x.shape, dtype=dtype, device=x.device)

    def work(rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
        part = torch.sub(x[slice(*rows)], bias, out=centred[slice(*rows)])
        if low is not centred:
            low[slice(*rows)].copy_(part)
        return part.sum(0), torch.linalg.vector_norm(part)

    sums, norms = zip(*in_parallel(work, pieces(x, ROWS)), strict=True)
    return centred, torch.stack(sums).double().sum(0), torch.stack(norms).double().square().sum(), low


def select_top(
    rows: Tensor, encoder: Encoder, k: int, by_row: bool, guess: float, use_kernels: bool
) -> tuple[Entries, float]:
    """The k largest positive pre-activations per row, or k times B of the whole batch. See `select_batch` for
    `guess`."""
    if not on_processor(rows, use_kernels):
        pre = encoder.pre_activations(rows)
        return (_dense_top(pre, k) if by_row else _dense_batch(pre, k * len(rows))), 0.0
    if by_row:
        return _entries(encoding.select_top(rows, encoder, k)), 0.0
    sparse, guess = encoding.select_batch(rows, encoder, k * len(rows), guess)
    return _entries(sparse), guess


def select_above(rows: Tensor, encoder: Encoder, use_kernels: bool) -> Entries:
    """All pre-activations above the encoder's cut."""
    if on_processor(rows, use_kernels):
        found = _entries(encoding.select_positive(rows, encoder))
    else:
        pre = encoder.pre_activations(rows)
        found = _dense_entries(pre, pre > 0)
    return found if encoder.cut is None else found._replace(values=found.values + encoder.cut[found.feature_ids.long()])


def _entries(sparse: encoding.SparseValues) -> Entries:
    return Entries(*(torch.from_numpy(array) for array in sparse))


def _dense_top(pre: Tensor, k: int) -> Entries:
    """On the processor, for comparison, among equals the lower features; elsewhere whatever is quickest."""
    if pre.device.type == "cpu":
        places = pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
    else:
        places = pre.topk(k, dim=1, sorted=False).indices
    return _dense_entries(pre, torch.zeros_like(pre, dtype=torch.bool).scatter_(1, places, True))


def _dense_batch(pre: Tensor, n: int) -> Entries:
    flat = pre.flatten()
    if pre.device.type == "cpu":
        places = flat.sort(descending=True, stable=True).indices[:n]
    else:
        places = flat.topk(n, sorted=False).indices
    return _dense_entries(pre, torch.zeros(pre.numel(), dtype=torch.bool, device=pre.device).scatter_(0, places, True))


def _dense_entries(pre: Tensor, keep: Tensor) -> Entries:
    rows, ids = (keep.view_as(pre) & (pre > 0)).nonzero(as_tuple=True)
    starts = tf.pad(torch.bincount(rows, minlength=len(pre)).cumsum(0), (1, 0))
    return Entries(starts, ids.int(), pre[rows, ids].float())


def run(batch: Batch, chosen: Entries, weights: Weights, task: Task) -> Outcome:
    """Loss and gradients from the pre-activations of the chosen entries."""
    n_nested = len(task.ends)
    explained = Explained.room(chosen, batch.target, task)
    alone = Explained.room(chosen, batch.target, task) if task.rule.second(chosen.values[:0]) is not None else None
    pair = chosen.values.new_empty(2, len(chosen.values))

    def work(rows: tuple[int, int]) -> _Piece:
        return _explain(rows, chosen, explained, alone, weights.w_dec, batch.target, task, pair)

    done = in_parallel(work, pieces(batch.low, ROWS, task.use_kernels))
    errors = torch.stack([piece.errors for piece in done]).sum(0)
    d_w_enc, d_w_dec = torch.empty_like(weights.w_enc), torch.empty_like(weights.w_dec)
    by_feature = add_gradients(explained, pair, batch.low, weights.w_dec, task, d_w_enc, d_w_dec, fresh=True)
    sums = {name: by_feature(torch.cat([piece.each[name] for piece in done])) for name in done[0].each}
    active = torch.cat([piece.active for piece in done])
    return Outcome(
        errors[-1].item(),
        errors.mean().item() + sum(piece.error_second for piece in done),
        len(active),
        by_feature.count(active),
        torch.stack([piece.penalty for piece in done]).double().sum(),
        explained.residual[-1],
        d_w_enc,
        d_w_dec,
        by_feature(pair[1]),
        _column_sums(explained.residual[0]).mul_(2 * task.scale / n_nested),
        sums,
    )


@dataclass(frozen=True)
class Explained:
    """Entries with their values; residuals values @ w_dec - target (G, B, D), their products with the active directions
    (nnz), and squared norms (G, B). The residuals of a nested dictionary are summed with those of all larger ones:
    see `kernels.reconstruct`."""

    entries: Entries
    residual: Tensor
    g: Tensor
    losses: Tensor

    @classmethod
    def room(cls, chosen: Entries, target: Tensor, task: Task) -> Explained:
        """To be filled: values first, then, by `reconstruct`, the rest."""
        n_nested = len(task.ends)
        values, g = (torch.empty_like(chosen.values) for _ in range(2))
        residual, losses = target.new_empty(n_nested, *target.shape), target.new_empty(n_nested, len(target))
        return cls(chosen._replace(values=values), residual, g, losses)

    def reconstruct(self, rows: tuple[int, int], w_dec: Tensor, target: Tensor, task: Task) -> None:
        """Fill in what belongs to some rows (elsewhere than on the processor: to all)."""
        if on_processor(target, task.use_kernels):
            arrays = (*self.entries, w_dec, target, task.ends, self.residual, self.g, self.losses)
            kernels.reconstruct(*rows, *(each.numpy() for each in arrays))
        else:
            g, losses = _reconstruct_anywhere(self.entries, w_dec, target, task.ends, self.residual)
            self.g.copy_(g)
            self.losses.copy_(losses)


class _Piece(NamedTuple):
    """Of some rows: squared errors by nested dictionary and of the second reconstruction, features of active entries,
    penalty, and what is to be summed by feature."""

    errors: Tensor
    error_second: float
    active: Tensor
    penalty: Tensor
    each: Sums


def _explain(
    rows: tuple[int, int], chosen: Entries, explained: Explained, alone: Explained | None, w_dec: Tensor,
    target: Tensor, task: Task, pair: Tensor,
) -> _Piece:  # fmt: skip
    """Reconstruct some rows, and write values and derivatives of their entries to `pair`, the loss's scale in both."""
    mine = slice(int(chosen.row_starts[rows[0]]), int(chosen.row_starts[rows[1]]))
    rule, ids, pre = task.rule, chosen.feature_ids[mine].long(), chosen.values[mine]
    values, each = explained.entries.values[mine], 2 * task.scale / len(task.ends)
    values.copy_(rule.values(pre, ids))
    explained.reconstruct(rows, w_dec, target, task)
    g_second, error_second = None, 0.0
    second = rule.second(pre)
    if alone is not None and second is not None:
        alone.entries.values[mine] = second
        alone.reconstruct(rows, w_dec, target, task)
        g_second, error_second = alone.g[mine] * each, alone.losses[0, slice(*rows)].double().sum().item()
    d_pre, to_sum = rule.backward(pre, values, explained.g[mine] * each, g_second, ids)
    pair[0, mine], pair[1, mine] = values * each, d_pre
    errors = explained.losses[:, slice(*rows)].double().sum(1)
    return _Piece(errors, error_second, ids[values > 0], rule.penalty(pre, values, ids), to_sum)


def _column_sums(matrix: Tensor) -> Tensor:
    """Sum over rows, by the workers: torch's own threads would wait for one another."""
    return torch.stack(in_parallel(lambda rows: matrix[slice(*rows)].sum(0), pieces(matrix, ROWS))).sum(0)


def _reconstruct_anywhere(
    entries: Entries, w_dec: Tensor, target: Tensor, ends: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    ids, rows = entries.feature_ids.long(), entries.rows
    for nested, end in enumerate(ends.tolist()):
        inside = entries._replace(values=torch.where(ids < end, entries.values, 0.0))
        residual[nested] = decode(inside, w_dec) - target
    losses = residual.square().sum(2)
    residual.copy_(residual.flip(0).cumsum(0).flip(0))
    owner = torch.searchsorted(ends.to(ids.device), ids, right=True)
    parts = ranges(len(ids), 1 << 16)
    g = [(residual[owner[a:b], rows[a:b]] * w_dec[ids[a:b]]).sum(1) for a, b in parts]
    return torch.cat([entries.values[:0], *g]), losses


def decode(entries: Entries, w_dec: Tensor) -> Tensor:
    """values @ w_dec: (B, D)."""
    starts, ids, values = entries
    return tf.embedding_bag(ids.long(), w_dec, starts, mode="sum", per_sample_weights=values, include_last_offset=True)


def summed_in_order(ids: Tensor, numbers: Tensor, n: int) -> Tensor:
    """Sums (n) of numbers (nnz) by id. In the order of entries, so the same every time: on a GPU `index_add_` is
    not."""
    starts = tf.pad(torch.bincount(ids, minlength=n).cumsum(0), (1, 0))
    column = numbers[:, None].float()
    return tf.embedding_bag(ids.argsort(stable=True), column, starts, mode="sum", include_last_offset=True)[:, 0]


class ByFeature:
    """Sums numbers of entries by their feature: (nnz) to (F). NumPy's sums are in order, and wait for no other
    thread."""

    def __init__(self, feature_ids: Tensor, n_features: int) -> None:
        self.ids, self.n_features = feature_ids, n_features

    def __call__(self, numbers: Tensor) -> Tensor:
        if self.ids.device.type == "cpu":
            summed = np.bincount(self.ids.numpy(), numbers.numpy(), self.n_features)
            return torch.from_numpy(summed).float()
        return summed_in_order(self.ids, numbers, self.n_features)

    def count(self, ids: Tensor) -> Tensor:
        """How often each feature is among `ids` (n) int64."""
        if ids.device.type == "cpu":
            return torch.from_numpy(np.bincount(ids.numpy(), minlength=self.n_features))
        return torch.bincount(ids, minlength=self.n_features)


def add_gradients(
    explained: Explained, pair: Tensor, low: Tensor, w_dec: Tensor, task: Task, d_w_enc: Tensor, d_w_dec: Tensor,
    fresh: bool,
) -> ByFeature:  # fmt: skip
    """Add the entries' gradients to encoder and decoder rows, or write them there (`fresh`). `pair` (2, nnz): values
    and derivatives by pre-activations, with the loss's scale in them."""
    add = _add_here if on_processor(low, task.use_kernels) else _add_anywhere
    add(explained.entries, pair, explained.residual, low, w_dec, task, d_w_enc, d_w_dec, fresh)
    return ByFeature(explained.entries.feature_ids, len(w_dec))


def _add_here(
    entries: Entries, pair: Tensor, residual: Tensor, low: Tensor, w_dec: Tensor, task: Task,
    d_w_enc: Tensor, d_w_dec: Tensor, fresh: bool,
) -> None:  # fmt: skip
    starts, ids, _ = (t.numpy() for t in entries)
    feature_starts, rows, (values, d_pre) = encoding.transpose(starts, ids, pair.numpy(), len(w_dec))
    low_residual = kernels.converted(residual.flatten(0, 1), low.dtype).view(residual.shape)
    matrices = [kernels.bits_of(t) if t.dtype == torch.bfloat16 else t.numpy() for t in (low_residual, low)]
    arrays: list[Any] = [
        feature_starts,
        rows,
        values,
        d_pre,
        task.ends.numpy(),
        *matrices,
        w_dec.numpy(),
        task.on_sphere,
        fresh,
    ]
    arrays += [d_w_enc.numpy(), d_w_dec.numpy()]
    in_parallel(lambda features: kernels.accumulate(*features, *arrays), ranges(len(w_dec), FEATURES))


def _add_anywhere(
    entries: Entries, pair: Tensor, residual: Tensor, low: Tensor, w_dec: Tensor, task: Task,
    d_w_enc: Tensor, d_w_dec: Tensor, fresh: bool,
) -> None:  # fmt: skip
    ids, rows = entries.feature_ids.long(), entries.rows
    order = ids.argsort(stable=True)
    starts = tf.pad(torch.bincount(ids, minlength=len(w_dec)).cumsum(0), (1, 0))
    owner = torch.searchsorted(task.ends.to(ids.device), ids, right=True)

    def product(numbers: Tensor, places: Tensor, matrix: Tensor) -> Tensor:
        bags = places[order], matrix.to(low.dtype).float(), starts
        return tf.embedding_bag(*bags, mode="sum", per_sample_weights=numbers[order], include_last_offset=True)

    if fresh:
        d_w_enc.zero_()
        d_w_dec.zero_()
    d_w_enc += product(pair[1], rows, low)
    added = product(pair[0], owner * len(low) + rows, residual.flatten(0, 1))
    d_w_dec += without_radial(added, w_dec) if task.on_sphere else added


def without_radial(gradient: Tensor, w_dec: Tensor) -> Tensor:
    """Less the part along each row of w_dec: the gradient of the loss of unit rows."""
    along = (gradient * w_dec).sum(1) / w_dec.square().sum(1)
    return gradient - along[:, None] * w_dec


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

    def add_to(self, outcome: Outcome, batch: Batch, weights: Weights, encoder: Encoder, task: Task) -> float:
        """Add its gradients to the outcome's; the share of the residual that dead features miss, before its weight."""
        if not self.n_rows:
            return 0.0
        rest = -outcome.residual[: self.n_rows]
        whole_squares = batch.target[: self.n_rows].double().square().sum().item()
        total = max(rest.double().square().sum().item(), _DEGENERATE * whole_squares, 1e-30)
        low = batch.low[: self.n_rows]
        chosen = self._chosen(low, encoder, task.use_kernels)
        whole = Task(Top(), task.ends[-1:], self.weight / total, task.on_sphere, task.use_kernels)
        explained = Explained.room(chosen, rest, whole)
        explained.entries.values.copy_(chosen.values)
        in_parallel(
            lambda rows: explained.reconstruct(rows, weights.w_dec, rest, whole),
            pieces(rest, ROWS, task.use_kernels),
        )
        pair = torch.stack([chosen.values, explained.g]) * (2 * whole.scale)
        by_feature = add_gradients(
            explained, pair, low, weights.w_dec, whole, outcome.d_w_enc, outcome.d_w_dec, fresh=False
        )
        outcome.d_pre = outcome.d_pre + by_feature(pair[1])
        return explained.losses.double().sum().item() / total

    def _chosen(self, low: Tensor, encoder: Encoder, use_kernels: bool) -> Entries:
        dead = self.features
        small = Encoder(encoder.w_enc[dead], encoder.b_enc[dead], encoder.b_in, encoder.dtype)
        entries, _ = select_top(low, small, self.k, True, 0.0, use_kernels)
        return entries._replace(feature_ids=dead[entries.feature_ids.long()].int())
