"""From active entries to reconstructions and their errors, and from these to gradients of the weights.

Sums are added in an order that is always the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.activations.sparse_values import SparseTensors
from saeflow.runtime.linear import at_least_float32, converted
from saeflow.runtime.ranks import Ranks
from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae import kernels
from saeflow.sae.batch import WORKER_FEATURES, WORKER_ROWS, StepSettings, on_processor, worker_ranges
from saeflow.sae.exact import sorted_by_feature


@dataclass(frozen=True)
class SparseReconstruction:
    """Entries with their values, and how well they reconstruct a target with G nested dictionaries.

    The residual of a nested dictionary is summed with those of all larger ones: see `kernels.reconstruct`.
    """

    entries: SparseTensors
    residual: Tensor
    """values @ w_dec - target (G, B, D)."""
    g: Tensor
    """Products of residuals with the active directions (nnz)."""
    losses: Tensor
    """Squared norms of residuals (G, B)."""

    @classmethod
    def room_for(cls, chosen: SparseTensors, target: Tensor, settings: StepSettings) -> SparseReconstruction:
        """Return one to be filled: values first, then, by `reconstruct`, the rest."""
        n_nested = len(settings.ends)
        values, g = (torch.empty_like(chosen.values) for _ in range(2))
        residual, losses = target.new_empty(n_nested, *target.shape), target.new_empty(n_nested, len(target))
        return cls(chosen._replace(values=values), residual, g, losses)

    def reconstruct(self, rows: tuple[int, int], w_dec: Tensor, target: Tensor, settings: StepSettings) -> None:
        """Fill in what belongs to a range of rows; without the kernels, or if ranks split the features, to all rows."""
        if on_processor(target, settings.use_kernels) and settings.split.features.n == 1:
            arrays = (*self.entries, w_dec, target, settings.ends, self.residual, self.g, self.losses)
            kernels.reconstruct(*rows, *(each.numpy() for each in arrays))
        else:
            features = settings.split.features
            g, losses = _reconstruct_anywhere(self.entries, w_dec, target, settings.ends, self.residual, features)
            self.g.copy_(g)
            self.losses.copy_(losses)


def _reconstruct_anywhere(
    entries: SparseTensors, w_dec: Tensor, target: Tensor, ends: Tensor, residual: Tensor, features: Ranks
) -> tuple[Tensor, Tensor]:
    """Fill in the residuals; return the products and the squared norms. Ranks add up their features' parts."""
    ids, rows = entries.feature_ids.long(), entries.rows
    for nested, end in enumerate(ends.tolist()):
        inside = entries._replace(values=torch.where(ids < end, entries.values, 0.0))
        residual[nested] = decode(inside, w_dec)
    features.sum_(residual).sub_(target)
    losses = residual.square().sum(2)
    residual.copy_(residual.flip(0).cumsum(0).flip(0))
    owner = torch.searchsorted(ends.to(ids.device), ids, right=True)
    parts = ranges(len(ids), 1 << 16)
    g = [(residual[owner[a:b], rows[a:b]] * w_dec[ids[a:b]]).sum(1) for a, b in parts]
    return torch.cat([entries.values[:0], *g]), losses


def decode(entries: SparseTensors, w_dec: Tensor) -> Tensor:
    """Return values @ w_dec: (B, D)."""
    starts, ids, values = entries
    return tf.embedding_bag(ids.long(), w_dec, starts, mode="sum", per_sample_weights=values, include_last_offset=True)


@dataclass(frozen=True)
class WeightGradients:
    """Gradients of encoder and decoder rows; `fresh` memory holds nothing yet."""

    d_w_enc: Tensor
    d_w_dec: Tensor
    fresh: bool

    def add(
        self, found: SparseReconstruction, pair: Tensor, low: Tensor, w_dec: Tensor, settings: StepSettings
    ) -> SumByFeature:
        """Add the gradients of entries, and return what sums other numbers of these entries by feature.

        `pair` (2, nnz) holds values, and derivatives by pre-activations, both times the scale of the loss.
        """
        add = self._add_by_kernels if on_processor(low, settings.use_kernels) else self._add_anywhere
        add(found, pair, low, w_dec, settings)
        return SumByFeature(found.entries.feature_ids, len(w_dec))

    def _add_by_kernels(
        self, found: SparseReconstruction, pair: Tensor, low: Tensor, w_dec: Tensor, settings: StepSettings
    ) -> None:
        threads, residual = settings.threads, found.residual
        starts, ids, _ = (t.numpy() for t in found.entries)
        feature_starts, rows, (values, d_pre) = sorted_by_feature(starts, ids, pair.numpy(), len(w_dec), threads)
        low_residual = converted(residual.flatten(0, 1), low.dtype, threads).view(residual.shape)
        matrices = [kernels.bits_of(t) if t.dtype == torch.bfloat16 else t.numpy() for t in (low_residual, low)]
        arrays: list[Any] = [
            feature_starts, rows, values, d_pre, settings.ends.numpy(), *matrices, w_dec.numpy(), settings.on_sphere,
            self.fresh, self.d_w_enc.numpy(), self.d_w_dec.numpy(),
        ]  # fmt: skip
        features = ranges(len(w_dec), WORKER_FEATURES)
        in_parallel(lambda part: kernels.accumulate(*part, *arrays), features, threads)

    def _add_anywhere(
        self, found: SparseReconstruction, pair: Tensor, low: Tensor, w_dec: Tensor, settings: StepSettings
    ) -> None:
        ids, rows = found.entries.feature_ids.long(), found.entries.rows
        order = ids.argsort(stable=True)
        starts = tf.pad(torch.bincount(ids, minlength=len(w_dec)).cumsum(0), (1, 0))
        owner = torch.searchsorted(settings.ends.to(ids.device), ids, right=True)

        def product(numbers: Tensor, places: Tensor, matrix: Tensor) -> Tensor:
            bags = places[order], at_least_float32(matrix.to(low.dtype)), starts
            return tf.embedding_bag(*bags, mode="sum", per_sample_weights=numbers[order], include_last_offset=True)

        if self.fresh:
            self.d_w_enc.zero_()
            self.d_w_dec.zero_()
        self.d_w_enc.add_(product(pair[1], rows, low))
        added = product(pair[0], owner * len(low) + rows, found.residual.flatten(0, 1))
        self.d_w_dec.add_(without_radial(added, w_dec) if settings.on_sphere else added)


class SumByFeature:
    """Sums numbers of entries by their feature: (nnz) to (F). NumPy adds in order, and waits for no other thread."""

    def __init__(self, feature_ids: Tensor, n_features: int) -> None:
        self.ids, self.n_features = feature_ids, n_features

    def __call__(self, numbers: Tensor) -> Tensor:
        if self.ids.device.type == "cpu":
            summed = np.bincount(self.ids.numpy(), numbers.numpy(), self.n_features)
            return torch.from_numpy(summed).to(numbers.dtype)
        return summed_in_order(self.ids, numbers, self.n_features)

    def count(self, ids: Tensor) -> Tensor:
        """Return how often each feature is among `ids` (n) int64."""
        if ids.device.type == "cpu":
            return torch.from_numpy(np.bincount(ids.numpy(), minlength=self.n_features))
        return torch.bincount(ids, minlength=self.n_features)


def summed_in_order(ids: Tensor, numbers: Tensor, n: int) -> Tensor:
    """Return sums (n) of numbers (nnz) by id, added in the order of entries. `index_add_` has none on a GPU."""
    starts = tf.pad(torch.bincount(ids, minlength=n).cumsum(0), (1, 0))
    column = at_least_float32(numbers[:, None])
    return tf.embedding_bag(ids.argsort(stable=True), column, starts, mode="sum", include_last_offset=True)[:, 0]


def summed_over_rows(matrix: Tensor, threads: int) -> Tensor:
    """Return the sum over rows, by the workers: torch's own threads would wait for one another."""
    parts = worker_ranges(matrix, WORKER_ROWS)
    return torch.stack(in_parallel(lambda rows: matrix[slice(*rows)].sum(0), parts, threads)).sum(0)


def without_radial(gradient: Tensor, w_dec: Tensor) -> Tensor:
    """Return the gradient less its part along each row of w_dec: the gradient of the loss of unit rows."""
    along = (gradient * w_dec).sum(1) / w_dec.square().sum(1)
    return gradient - along[:, None] * w_dec
