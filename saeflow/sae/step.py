"""The training step, sparse or dense.

A sparse step holds nothing dense of shape (B, F): choose entries, reconstruct, differentiate. The processor uses
kernels. Elsewhere, and in tests, torch's index operations do the same.

A dense step is for batches in which so many entries are active that products of whole matrices are quicker.
Architectures that pay for their values begin this way: half of all pre-activations are positive at first. A worker
takes a piece of rows through everything that needs them while they are in the cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.activations.sparse_values import SparseRows, SparseTensors, SparseValues
from saeflow.runtime.linear import at_least_float32, converted, linear
from saeflow.runtime.ranks import Ranks
from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae.architectures import FeatureSums
from saeflow.sae.batch import (
    CentredBatch,
    StepResult,
    StepSettings,
    Weights,
    on_processor,
    worker_ranges,
)
from saeflow.sae.encoder import Encoder
from saeflow.sae.exact import positive_entries, top_entries, top_entries_of_batch
from saeflow.sae.gradients import SparseReconstruction, WeightGradients, summed_over_rows, without_radial
from saeflow.sae.split import WHOLE, Split, largest_of_batch, largest_of_rows, no_entries


def largest_entries(
    rows: Tensor, encoder: Encoder, k: int, by_row: bool, guess: float, use_kernels: bool, signed: bool = False,
    split: Split = WHOLE,
) -> tuple[SparseTensors, float]:  # fmt: skip
    """Return the k largest positive pre-activations of each row, or k times B of the whole batch.

    If `signed`, those of each row that have the largest magnitudes.
    `guess`, and the one returned for the next batch, are those of `top_entries_of_batch`.
    Each of several ranks returns the entries of its own rows and features.
    """
    if split.ranks.n > 1:
        return _largest_of_ranks(rows, encoder, k, by_row, guess, use_kernels, signed, split)
    if not on_processor(rows, use_kernels):
        pre = encoder.pre_activations(rows)
        size = pre.abs() if signed else pre
        flat, n = (size, k) if by_row else (size.reshape(1, -1), k * len(rows))
        return _dense_entries(pre, _marked_largest(flat, n).view_as(pre) & (size > 0)), 0.0
    if by_row:
        return _as_tensors(top_entries(rows, encoder, k, signed)), 0.0
    found, guess = top_entries_of_batch(rows, encoder, k * len(rows), guess)
    return _as_tensors(found), guess


def _largest_of_ranks(
    rows: Tensor, encoder: Encoder, k: int, by_row: bool, guess: float, use_kernels: bool, signed: bool, split: Split
) -> tuple[SparseTensors, float]:
    """Do what `largest_entries` does with the ranks of `split`, which has several."""
    n, n_features = k * len(rows), int(split.features.total(len(encoder.w_enc)))
    mine, here = rows[split.rows.share(len(rows))], min(k, len(encoder.w_enc))
    if not here:
        own = no_entries(len(mine), mine)
    elif by_row:
        own, _ = largest_entries(mine, encoder, here, True, 0.0, use_kernels, signed)
    elif on_processor(mine, use_kernels):
        found, _ = top_entries_of_batch(mine, encoder, n, guess, split.ranks)
        own = _as_tensors(found)
    else:
        pre = encoder.pre_activations(mine)
        marked = _marked_largest(pre.reshape(1, -1), min(n, pre.numel())).view_as(pre)
        own = _dense_entries(pre, marked & (pre > 0))
    if by_row:
        return largest_of_rows(own, k, split.features), 0.0
    own, nth = largest_of_batch(own, own.values, n, len(rows), n_features, split)
    return own, 0.93 * nth


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


def _marked_largest(pre: Tensor, k: int) -> Tensor:
    """Return True at each row's k largest: of equals the lower ones on the processor, else whichever are quickest."""
    if pre.device.type == "cpu":
        places = pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
    else:
        places = pre.topk(k, dim=1, sorted=False).indices
    return torch.zeros_like(pre, dtype=torch.bool).scatter_(1, places, True)


def _dense_entries(pre: Tensor, keep: Tensor) -> SparseTensors:
    rows, ids = keep.nonzero(as_tuple=True)
    starts = tf.pad(torch.bincount(rows, minlength=len(pre)).cumsum(0), (1, 0))
    return SparseRows(starts, ids.int(), at_least_float32(pre[rows, ids]))


def sparse_step(batch: CentredBatch, chosen: SparseTensors, weights: Weights, settings: StepSettings) -> StepResult:
    """Return loss and gradients from the pre-activations of the chosen entries, or from this rank's entries."""
    split, target = settings.split, batch.target[settings.split.rows.share(len(batch.target))]
    found = SparseReconstruction.room_for(chosen, target, settings)
    has_second = settings.rule.second_values(chosen.values[:0]) is not None
    second = SparseReconstruction.room_for(chosen, target, settings) if has_second else None
    pair = chosen.values.new_empty(2, len(chosen.values))

    def explain(rows: tuple[int, int]) -> _RowsResult:
        return _explain_rows(rows, chosen, found, second, weights.w_dec, target, settings, pair)

    scale = 2 * settings.scale / len(settings.ends)
    explained = _Explained.of(found, pair, settings.by_rows(explain, target)).with_all_rows(split.rows, scale)
    found, pair, active = explained.found, explained.pair, explained.active
    gradients = WeightGradients(torch.empty_like(weights.w_enc), torch.empty_like(weights.w_dec), fresh=True)
    by_feature = gradients.add(found, pair, batch.low, weights.w_dec, settings)
    return StepResult(
        error=explained.errors[-1].item(),
        mean_error=explained.errors.mean().item() + explained.second_error,
        n_active=int(split.features.total(len(active))),
        fired=by_feature.count(active),
        penalty=split.features.sum_(explained.penalty),
        residual=found.residual[-1],
        d_w_enc=gradients.d_w_enc,
        d_w_dec=gradients.d_w_dec,
        d_pre=by_feature(pair[1]),
        d_b_dec=summed_over_rows(found.residual[0], settings.threads).mul_(scale),
        sums={name: by_feature(numbers) for name, numbers in explained.to_sum.items()},
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


class _Explained(NamedTuple):
    """A rank's rows, or all of them, after `_explain_rows`."""

    found: SparseReconstruction
    pair: Tensor
    """Values and derivatives (2, nnz), times the loss's scale."""
    active: Tensor
    errors: Tensor
    """Squared errors of each nested dictionary (G), float64."""
    second_error: float
    penalty: Tensor
    to_sum: FeatureSums

    @classmethod
    def of(cls, found: SparseReconstruction, pair: Tensor, parts: list[_RowsResult]) -> _Explained:
        return cls(
            found,
            pair,
            active=torch.cat([part.active for part in parts]),
            errors=torch.stack([part.errors for part in parts]).sum(0),
            second_error=sum(part.second_error for part in parts),
            penalty=torch.stack([part.penalty for part in parts]).double().sum(),
            to_sum={name: torch.cat([part.to_sum[name] for part in parts]) for name in parts[0].to_sum},
        )

    def with_all_rows(self, ranks: Ranks, scale: float) -> _Explained:
        """Return the rows of all ranks, from the entries and residuals of each: less than gradients would take."""
        if ranks.n == 1:
            return self
        (starts, ids, values), residual = self.found.entries, self.found.residual.transpose(0, 1)
        figures = torch.cat([self.errors, self.errors.new_tensor([self.second_error, self.penalty.item()])])
        counts, ids, values, d_pre, residual, figures, *to_sum = ranks.together(
            starts.diff(), ids, values, self.pair[1], residual, figures[None], *self.to_sum.values()
        )
        entries = SparseRows(tf.pad(counts.cumsum(0), (1, 0)), ids, values)
        *_, second_error, penalty = figures.sum(0)
        return _Explained(
            replace(self.found, entries=entries, residual=residual.transpose(0, 1).contiguous()),
            torch.stack([values * scale, d_pre]),
            active=ids[values != 0].long(),
            errors=figures[:, :-2].sum(0),
            second_error=second_error.item(),
            penalty=penalty,
            to_sum=dict(zip(self.to_sum, to_sum, strict=True)),
        )


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
    return _RowsResult(errors, second_error, ids[values != 0], rule.penalty(pre, values, ids), to_sum)


DENSE_SHARE = 0.1
"""Share of active entries up to which the sparse step is quicker, measured at D = 256, F = 4,096."""

_WORKER_ENTRIES, _WORKER_COLUMNS = 1 << 20, 512
"""Pre-activations of the rows that a worker takes at a time, and features of a piece of the gradients."""


class _DensePiece(NamedTuple):
    """Errors and sums of a range of rows."""

    error: float
    second_error: float
    fired: Tensor
    """Active entries of each feature (F)."""
    d_pre: Tensor
    sums: FeatureSums
    penalty: Tensor


class _DensePass:
    """Values and derivatives (B, F) of a batch in the precision of the product, and its residuals (B, D_out)."""

    def __init__(self, batch: CentredBatch, encoder: Encoder, weights: Weights, settings: StepSettings) -> None:
        self.batch, self.encoder, self.weights, self.settings = batch, encoder, weights, settings
        self.scale = 2 * settings.scale
        self.low_w_dec = converted(weights.w_dec, batch.low.dtype, settings.threads)
        self.values = batch.low.new_empty(len(batch.low), len(weights.w_dec))
        self.d_pre = torch.empty_like(self.values)
        self.residual = torch.empty_like(batch.target)

    def explain_rows(self, part: tuple[int, int]) -> _DensePiece:
        rows, rule, every = slice(*part), self.settings.rule, slice(None)
        pre = at_least_float32(self.encoder.pre_activations(self.batch.low[rows]))
        target = self.batch.target[rows]
        values = rule.values(pre, every)
        self.residual[rows], g = self._residual(values, target)
        error, second_error, g_second = self.residual[rows].square().sum().item(), 0.0, None
        if (second := rule.second_values(pre)) is not None:
            rest, g_second = self._residual(second, target)
            second_error = rest.square().sum().item()
        d_pre, to_sum = rule.backward(pre, values, g, g_second, every)
        self.values[rows], self.d_pre[rows] = values, d_pre
        sums = {name: numbers.sum(0) for name, numbers in to_sum.items()}
        penalty = rule.penalty(pre, values, every)
        return _DensePiece(error, second_error, (values > 0).sum(0), d_pre.sum(0), sums, penalty)

    def _residual(self, values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual, and the derivative of the loss by the values."""
        if (features := self.settings.split.features).n > 1:
            rest = features.sum_(values @ self.weights.w_dec).sub_(target)
        else:
            rest = torch.addmm(target, values, self.weights.w_dec, beta=-1)
        return rest, at_least_float32(linear(rest.to(self.low_w_dec.dtype), self.low_w_dec)).mul_(self.scale)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of encoder and decoder rows."""
        d_w_enc, d_w_dec = torch.empty_like(self.weights.w_enc), torch.empty_like(self.weights.w_dec)
        low, threads, w_dec = self.batch.low, self.settings.threads, self.weights.w_dec
        residual = converted(self.residual, low.dtype, threads)

        def differentiate(part: tuple[int, int]) -> None:
            features = slice(*part)
            d_w_enc[features] = self.d_pre[:, features].t() @ low
            of_decoder = at_least_float32(self.values[:, features].t() @ residual).mul_(self.scale)
            d_w_dec[features] = without_radial(of_decoder, w_dec[features]) if self.settings.on_sphere else of_decoder

        in_parallel(differentiate, worker_ranges(w_dec, _WORKER_COLUMNS), threads)
        return d_w_enc, d_w_dec


def dense_step(batch: CentredBatch, encoder: Encoder, weights: Weights, settings: StepSettings) -> StepResult:
    """Return loss and gradients from all entries. The encoder has no cut. A rank takes its rows and features."""
    encoder.prepare()
    features = settings.split.features
    whole = _DensePass(batch.part(settings.split.rows.share(len(batch.low))), encoder, weights, settings)
    n_rows, n_features = whole.values.shape
    rows = ranges(n_rows, min(max(_WORKER_ENTRIES // n_features, 16), 256))
    if features.n > 1:  # ranks add up inside of `explain_rows`: the same rows in the same order, on the calling thread
        rows = ranges(n_rows, 256)
    pieces = in_parallel(whole.explain_rows, rows, settings.threads if features.n == 1 else 1)
    d_w_enc, d_w_dec = whole.gradients()
    errors, second_errors, fired, d_pre, sums, penalty = zip(*pieces, strict=True)
    total = torch.stack(fired).sum(0)
    result = StepResult(
        error=sum(errors),
        mean_error=sum(errors) + sum(second_errors),
        n_active=int(features.total(int(total.sum()))),
        fired=total,
        penalty=features.sum_(torch.stack(penalty).double().sum()),
        residual=whole.residual,
        d_w_enc=d_w_enc,
        d_w_dec=d_w_dec,
        d_pre=torch.stack(d_pre).sum(0),
        d_b_dec=whole.residual.sum(0) * whole.scale,
        sums={name: torch.stack([each[name] for each in sums]).sum(0) for name in sums[0]},
    )
    return of_all_rows(result, settings.split.rows)


def of_all_rows(part: StepResult, ranks: Ranks) -> StepResult:
    """Return the result of a whole batch from those of the ranks' rows, by adding gradients.

    For steps whose gradients take less room than their entries.
    """
    if ranks.n == 1:
        return part
    gradients = {id(each): each for each in (part.d_w_enc, part.d_w_dec, part.fired, part.d_pre, part.d_b_dec)}
    for tensor in [*gradients.values(), *part.sums.values()]:  # a pursuit has one gradient for both matrices
        ranks.sum_(tensor)
    (residual,) = ranks.together(part.residual)
    return replace(
        part, error=ranks.total(part.error), mean_error=ranks.total(part.mean_error), residual=residual,
        n_active=int(ranks.total(part.n_active)), penalty=ranks.sum_(part.penalty),
    )  # fmt: skip
