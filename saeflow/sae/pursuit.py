"""Matching pursuit as an encoder (MP-SAE, Costa et al. 2025, arXiv 2506.03093): feature after feature, greedily.

    residual = x - b_dec
    k times:   f = argmax(W_dec @ residual);  v = W_dec[f] @ residual;  residual -= v * W_dec[f]

A pursuit ends early where no v is above zero. A feature that is chosen again adds to its value. Each residual is kept
in float32; choices (among equals the lower feature), v and the difference are those of float64. So a token's values
depend neither on its batch nor on the device. Encoding takes the time of k encoder products, and the memory of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.activations.sparse_values import SparseRows, SparseValues, row_starts_of
from saeflow.runtime.linear import converted, linear
from saeflow.runtime.threads import in_parallel
from saeflow.sae.batch import WORKER_ROWS, CentredBatch, StepResult, StepSettings, Weights, on_processor, worker_ranges
from saeflow.sae.encoder import Encoder
from saeflow.sae.exact import rounded
from saeflow.sae.gradients import without_radial
from saeflow.sae.kernels import pursue_rows
from saeflow.sae.step import largest_entries, of_all_rows


class PursuitEnd(NamedTuple):
    """What ends a pursuit before its k steps. Only an imported SAE has any."""

    residual: float = 0.0
    """Length of the residual below which it ends."""
    repeats: bool = False
    """True if it ends after a feature was chosen again."""


NO_END = PursuitEnd()


def pursue(
    x: Tensor, w_dec: Tensor, b_dec: Tensor, k: int, end: PursuitEnd, choose: Callable[[Tensor], SparseValues]
) -> SparseValues:
    """Return the values of rows x (B, D), rounded to 11 significand bits.

    `choose` returns for some residuals (n, D) the feature with the largest positive product, if there is one.
    """
    residual = (x.double() - b_dec.double()).float()
    active, chosen = torch.arange(len(x), device=x.device), torch.full((len(x), k), -1, device=x.device)
    values = torch.zeros(len(x), k, dtype=torch.float64, device=x.device)
    for step in range(k):
        found = choose(residual[active])
        rows = active[torch.from_numpy(found.rows).to(x.device)]
        ids = torch.from_numpy(found.feature_ids).long().to(x.device)
        before, directions = residual[rows].double(), w_dec[ids].double()
        v = (before * directions).sum(1)
        residual[rows] = (before - v[:, None] * directions).float()
        again = (chosen[rows] == ids[:, None]).any(1)
        chosen[rows, step], values[rows, step] = ids, v
        active = rows[~(again & end.repeats) & ~(residual[rows].norm(dim=1) < end.residual)]
    return _summed_by_feature(chosen.cpu().numpy(), values.cpu().numpy(), len(w_dec))


def _summed_by_feature(chosen: np.ndarray, values: np.ndarray, n_features: int) -> SparseValues:
    """Return the sums of the values (B, k) of each row by feature; -1 is none."""
    rows, steps = (chosen >= 0).nonzero()
    keys, place = np.unique(rows * n_features + chosen[rows, steps], return_inverse=True)
    totals = rounded(torch.from_numpy(np.bincount(place, values[rows, steps], len(keys)))).numpy()
    keys, totals = keys[totals > 0], totals[totals > 0]
    return SparseRows(row_starts_of(keys // n_features, len(chosen)), (keys % n_features).astype(np.int32), totals)


class _Chosen(NamedTuple):
    """What a step of the pursuit took away: rows (n) of the batch, their features, and v (n)."""

    rows: Tensor
    ids: Tensor
    v: Tensor


def pursuit_step(batch: CentredBatch, encoder: Encoder, weights: Weights, settings: StepSettings, k: int) -> StepResult:
    """Return loss and gradients of a batch; choices are those of the quick product, and are held fixed.

    The gradients go back through all residuals: with r' = r - v d and v = r · d, they are g - (g · d) d for r and
    -v g - (g · d) r for d, if g is that for r'.
    """
    batch = batch.part(settings.split.rows.share(len(batch.low)))
    residual, w_dec, steps = batch.target.clone(), weights.w_dec, list[_Chosen]()
    features = _chosen_by_gram(residual, w_dec, k, settings) if _gram_pays(residual, w_dec, k, settings) else None
    for step in range(k):
        if features is not None:
            rows = (features[:, step] >= 0).nonzero().flatten()
            ids = features[rows, step]
        else:
            low = converted(residual, encoder.dtype, settings.threads)
            found, _ = largest_entries(low, encoder, 1, True, 0.0, settings.use_kernels)
            rows, ids = found.rows, found.feature_ids.long()
        before, directions = residual[rows], w_dec[ids]
        v = (before * directions).sum(1).clamp_(min=0)
        steps.append(_Chosen(rows, ids, v))
        residual[rows] = before - v[:, None] * directions
    error, last = residual.double().square().sum().item(), -residual.clone()
    d_w_dec, g = torch.zeros_like(w_dec), 2 * settings.scale * residual
    for rows, ids, v in reversed(steps):
        directions, above = w_dec[ids], g[rows]
        before = residual[rows] + v[:, None] * directions
        along = (above * directions).sum(1)[:, None] * (v > 0)[:, None]
        d_w_dec += _summed_rows(ids, -v[:, None] * above - along * before, len(w_dec))
        residual[rows] = before
        g[rows] = above - along * directions
    fired = torch.cat([(each.rows * len(w_dec) + each.ids)[each.v > 0] for each in steps]).unique() % len(w_dec)
    result = StepResult(
        error=error, mean_error=error, n_active=len(fired), fired=torch.bincount(fired, minlength=len(w_dec)),
        penalty=residual.new_zeros(()), residual=last, d_w_enc=d_w_dec,
        d_w_dec=without_radial(d_w_dec, w_dec) if settings.on_sphere else d_w_dec,
        d_pre=w_dec.new_zeros(len(w_dec)), d_b_dec=-g.sum(0), sums={},
    )  # fmt: skip
    return of_all_rows(result, settings.split.rows)


_LARGEST_GRAM = 8192
"""Features up to which products of all pairs of directions are held: 256 MiB."""


def _gram_pays(rows: Tensor, w_dec: Tensor, k: int, settings: StepSettings) -> bool:
    """True if two products in float32, of rows and of directions, take less time than k products of rows."""
    n = len(w_dec)
    return on_processor(rows, settings.use_kernels) and n <= _LARGEST_GRAM and 3 * (n + len(rows)) <= k * len(rows)


def _chosen_by_gram(rows: Tensor, w_dec: Tensor, k: int, settings: StepSettings) -> Tensor:
    """Return the features (B, k) that pursuits choose, -1 for none, from one product with all directions.

    Taking v d off a row takes v times d's products with all directions off the row's products.
    """
    gram, features = w_dec.new_empty(len(w_dec), len(w_dec)), torch.empty(len(rows), k, dtype=torch.int64)

    def multiply(part: tuple[int, int]) -> None:
        gram[slice(*part)] = linear(w_dec[slice(*part)], w_dec)

    def choose(part: tuple[int, int]) -> None:
        products = linear(rows[slice(*part)], w_dec)
        pursue_rows(products.numpy(), gram.numpy(), features[slice(*part)].numpy())

    in_parallel(multiply, worker_ranges(w_dec, WORKER_ROWS), settings.threads)
    in_parallel(choose, worker_ranges(rows, WORKER_ROWS), settings.threads)
    return features


def _summed_rows(ids: Tensor, matrix: Tensor, n: int) -> Tensor:
    """Return sums (n, D) of rows by id, added in their order."""
    starts = tf.pad(torch.bincount(ids, minlength=n).cumsum(0), (1, 0))
    return tf.embedding_bag(ids.argsort(stable=True), matrix, starts, mode="sum", include_last_offset=True)
