"""From active entries to reconstructions, their errors, and what each entry would have to change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.activations.sparse_values import SparseTensors
from saeflow.runtime.threads import ranges
from saeflow.sae import kernels
from saeflow.sae.step.batch import StepSettings, on_processor


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
        """Fill in what belongs to a range of rows; without the processor's kernels, to all rows."""
        if on_processor(target, settings.use_kernels):
            arrays = (*self.entries, w_dec, target, settings.ends, self.residual, self.g, self.losses)
            kernels.reconstruct(*rows, *(each.numpy() for each in arrays))
        else:
            g, losses = _reconstruct_anywhere(self.entries, w_dec, target, settings.ends, self.residual)
            self.g.copy_(g)
            self.losses.copy_(losses)


def _reconstruct_anywhere(
    entries: SparseTensors, w_dec: Tensor, target: Tensor, ends: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill in the residuals; return the products and the squared norms."""
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


def decode(entries: SparseTensors, w_dec: Tensor) -> Tensor:
    """Return values @ w_dec: (B, D)."""
    starts, ids, values = entries
    return tf.embedding_bag(ids.long(), w_dec, starts, mode="sum", per_sample_weights=values, include_last_offset=True)
