"""The auxiliary loss: dead features explain what the living ones miss (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saeflow.activations.sparse_values import SparseTensors
from saeflow.runtime.threads import in_parallel
from saeflow.sae.architectures import Top
from saeflow.sae.encoding.encoder import Encoder
from saeflow.sae.step.batch import (
    DEGENERATE,
    WORKER_ROWS,
    CentredBatch,
    StepResult,
    StepSettings,
    Weights,
    worker_ranges,
)
from saeflow.sae.step.gradients import WeightGradients
from saeflow.sae.step.reconstruction import SparseReconstruction
from saeflow.sae.step.sparse_step import largest_entries


@dataclass(frozen=True)
class AuxiliaryLoss:
    """The `k` largest pre-activations of dead features reconstruct the residual of `n_rows` rows.

    The rows are so few that the auxiliary loss costs a fraction of the step.
    """

    features: Tensor
    """Dead features, int64 ids."""
    k: int
    n_rows: int
    weight: float

    @classmethod
    def plan(cls, dead: Tensor, batch_rows: int, width: int, k: int, weight: float) -> AuxiliaryLoss:
        """Plan at most a quarter as many active entries as the step has; on all rows while few features are dead."""
        k_dead = min(max(width // 2, 1), len(dead))
        n_rows = min(batch_rows, max(batch_rows * k // (4 * k_dead), 1)) if len(dead) and weight > 0 else 0
        return cls(dead, k_dead, n_rows, weight)

    def add_to(
        self, result: StepResult, batch: CentredBatch, weights: Weights, encoder: Encoder, settings: StepSettings
    ) -> float:
        """Add the gradients to the result's; return the share of the residual that dead features miss, unweighted."""
        if not self.n_rows:
            return 0.0
        rest = -result.residual[: self.n_rows]
        target_squares = batch.target[: self.n_rows].double().square().sum().item()
        total = max(rest.double().square().sum().item(), DEGENERATE * target_squares, 1e-30)
        low = batch.low[: self.n_rows]
        use_kernels, threads = settings.use_kernels, settings.threads
        whole = StepSettings(Top(), settings.ends[-1:], self.weight / total, settings.on_sphere, use_kernels, threads)
        chosen = self._chosen(low, encoder, use_kernels)
        found = SparseReconstruction.room_for(chosen, rest, whole)
        found.entries.values.copy_(chosen.values)
        parts = worker_ranges(rest, WORKER_ROWS, use_kernels)
        in_parallel(lambda rows: found.reconstruct(rows, weights.w_dec, rest, whole), parts, threads)
        pair = torch.stack([chosen.values, found.g]) * (2 * whole.scale)
        gradients = WeightGradients(result.d_w_enc, result.d_w_dec, fresh=False)
        by_feature = gradients.add(found, pair, low, weights.w_dec, whole)
        result.d_pre = result.d_pre + by_feature(pair[1])
        return found.losses.double().sum().item() / total

    def _chosen(self, low: Tensor, encoder: Encoder, use_kernels: bool) -> SparseTensors:
        dead = self.features
        small = Encoder(encoder.w_enc[dead], encoder.b_enc[dead], encoder.b_in, encoder.dtype, threads=encoder.threads)
        entries, _ = largest_entries(low, small, self.k, True, 0.0, use_kernels)
        return entries._replace(feature_ids=dead[entries.feature_ids.long()].int())
