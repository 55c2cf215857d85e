"""The training loss of a batch, with the gradients of all parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, assert_never, cast

import torch
from torch import Tensor

from saeflow.activations.sparse_values import SparseTensors
from saeflow.runtime.ranks import Ranks
from saeflow.sae.architectures import Gated, JumpReLU, Relu, Top, TrainingRule
from saeflow.sae.batch import (
    DEGENERATE,
    CentredBatch,
    StepResult,
    StepSettings,
    Weights,
    centred_batch,
)
from saeflow.sae.encoder import Encoder
from saeflow.sae.exact import share_positive
from saeflow.sae.gradients import SparseReconstruction, WeightGradients
from saeflow.sae.parameters import SAEParameters
from saeflow.sae.pursuit import pursuit_step
from saeflow.sae.split import Split
from saeflow.sae.step import dense_step, entries_above_cut, largest_entries, sparse_step

THRESHOLD_MEMORY = 0.9
"""Share of the running threshold that a batch leaves in place."""


@dataclass(frozen=True)
class StepInfo:
    """Figures of a training step."""

    unexplained: float
    """Share of the batch's variance that the reconstruction misses."""
    auxiliary: float
    """Share of that rest that dead features miss, before its weight."""
    sparsity: float
    """Penalty before its weight: mean(abs(values)) (relu, gated), (L0 / k - 1)² or mean sum of tanh (jumprelu)."""
    n_active: float
    """Mean number of active features of a token."""
    n_dead: int
    fired: Tensor
    """Number of tokens of each feature (F), of this rank's if ranks split the features."""


@dataclass(frozen=True)
class LossOptions:
    """What a step changes in the loss: see `SparseAutoencoder.training_loss`."""

    aux_weight: float
    dead_after_tokens: int
    k: int
    sparsity: float
    by_token: bool


def loss_of_batch(
    sae: SAEParameters, x: Tensor, target: Tensor | None, options: LossOptions
) -> tuple[Tensor, StepInfo]:
    """Return the loss of a batch (B, D), which can be differentiated for the parameters, and its figures."""
    with torch.no_grad():
        loss, info, gradients = _loss_and_gradients(sae, x, target, options)
    parameters = sae.trained_parameters
    return cast(Tensor, _ComputedLoss.apply(loss, gradients, *parameters)), info  # type: ignore[no-untyped-call]


class _ComputedLoss(torch.autograd.Function):
    """Puts a loss that is already computed into the graph, with its gradients for the parameters."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None  # nobody else holds them, so they need no copy
        return None, None, *(gradients if d_loss.item() == 1 else (each * d_loss for each in gradients))


def _loss_and_gradients(
    sae: SAEParameters, x: Tensor, target: Tensor | None, options: LossOptions
) -> tuple[Tensor, StepInfo, tuple[Tensor, ...]]:
    config, encoder, split = sae.config, sae.current_encoder(), sae.split.for_rows(len(x))
    batch = centred_batch(x, sae.b_in, target, sae.b_dec, encoder.dtype, sae.threads)
    rule = training_rule(sae, len(x), batch.target.shape[1], options.sparsity)
    weights = Weights(sae.W_enc.detach(), sae.W_dec.detach())
    mine = split.features.share(config.n_features)
    ends = (torch.tensor(config.nested, dtype=torch.int32) - mine.start).clamp(0, mine.stop - mine.start)
    scale = batch.scale(config.counts_k)
    settings = StepSettings(rule, ends, scale, config.unit_norm, sae.use_kernels, sae.threads, split)
    result, chosen = _step_result(sae, x, batch, encoder, weights, settings, options)
    dead = (sae.tokens_since_fired >= options.dead_after_tokens).nonzero().flatten()
    weight = options.aux_weight if sae.traits.revives_dead else 0.0
    n_dead = int(split.features.total(len(dead)))
    about = n_dead, options.k, weight, sae.traits.signed
    aux_loss = _add_auxiliary(result, batch, weights, encoder, settings, dead, *about)
    n_active = result.n_active / len(x)
    penalty, sparsity_loss = rule.penalty_loss(result.penalty.item(), n_active)
    loss = result.mean_error * scale + penalty + options.aux_weight * aux_loss
    if sae.training and math.isfinite(loss):  # a batch with NaN or infinity must leave nothing behind
        _remember(sae, len(x), result.fired, None if options.by_token else chosen, split.ranks)
        if config.aims_at_k:
            sae.log_off_k = options.sparsity * math.log(max(n_active, 1e-6) / options.k)
    unexplained = result.error / batch.variance
    info = StepInfo(unexplained, aux_loss, sparsity_loss, n_active, n_dead, result.fired)
    return x.new_tensor(loss), info, _gradients(sae, result, rule, weights, n_active, split)


def _step_result(
    sae: SAEParameters, x: Tensor, batch: CentredBatch, encoder: Encoder, weights: Weights, settings: StepSettings,
    options: LossOptions,
) -> tuple[StepResult, SparseTensors | None]:  # fmt: skip
    """Return the result of a sparse or a dense step, and the entries it chose, if it did."""
    suited = encoder.suited_to(x) if sae.use_kernels else encoder
    rows = batch.low if suited is encoder else x
    if sae.traits.pursues:
        return pursuit_step(batch, encoder, weights, settings, options.k), None
    if sae.config.counts_k:
        how = options.by_token, sae.cut_guess, sae.use_kernels, sae.traits.signed, settings.split
        chosen, sae.cut_guess = largest_entries(rows, suited, options.k, *how)
    else:
        cut = cast(Tensor | float, settings.rule.cut)
        if isinstance(cut, Tensor):
            suited = suited.with_cut(cut)
        split = settings.split
        if split.features.total(share_positive(rows, suited)) / split.features.n > sae.dense_share:
            return dense_step(batch, encoder, weights, settings), None
        chosen = entries_above_cut(rows[split.rows.share(len(rows))], suited, sae.use_kernels)
    return sparse_step(batch, chosen, weights, settings), chosen


def training_rule(sae: SAEParameters, n_rows: int, width: int, sparsity: float) -> TrainingRule:
    """Return the rule for a batch of so many rows, of which so many numbers each are to be reconstructed.

    `sparsity` is a factor on the penalty.
    """
    config = sae.config
    weighted = config.l1_norm_weighted or (config.architecture == "jumprelu" and not config.unit_norm)
    lengths = torch.linalg.vector_norm(sae.W_dec.detach(), dim=1) if weighted else None
    paid = config.l1_weight * sparsity, n_rows * config.n_features, lengths
    match config.architecture:
        case "relu":
            return Relu(*paid)
        case "gated":
            return Gated(*paid, sae.r_mag.detach(), sae.b_mag.detach(), sae.b_enc.detach())
        case "topk" | "batchtopk" | "matryoshka" | "abstopk" | "mp":
            return Top()
        case "jumprelu":
            scale = config.tanh_scale if config.penalty == "tanh" else None
            weight = config.penalty_weight * sparsity
            return JumpReLU(sae.threshold, config.bandwidth, weight, config.k, n_rows, width, scale, lengths)
        case unknown:
            assert_never(unknown)


def share_above_cut(sae: SAEParameters, x: Tensor) -> float:
    """Return the share of pre-activations that a step looks at if it does not count k, in a sample of x (B, D)."""
    cut, encoder = training_rule(sae, len(x), 1, 1.0).cut, sae.current_encoder()
    with torch.no_grad():
        rows = (x - sae.b_in).to(encoder.dtype)
        return share_positive(rows, encoder.with_cut(cut) if isinstance(cut, Tensor) else encoder)


def _gradients(
    sae: SAEParameters, result: StepResult, rule: TrainingRule, weights: Weights, n_active: float, split: Split
) -> tuple[Tensor, ...]:
    """Return the gradients of `trained_parameters`, in their order."""
    d_w_dec, d_b_dec = result.d_w_dec, result.d_b_dec
    if sae.traits.pursues:
        return d_w_dec, d_b_dec
    if "length" in result.sums:
        per_length = result.sums["length"] / torch.linalg.vector_norm(weights.w_dec, dim=1)
        along = per_length[:, None] * weights.w_dec
        d_w_dec = d_w_dec if sae.config.unit_norm else d_w_dec + along
    if sae.config.target_site is None:
        d_b_dec = d_b_dec - split.features.sum_(result.d_pre @ weights.w_enc)
    d_b_enc = rule.bias_gradient(result.d_pre, result.sums)
    return result.d_w_enc, d_b_enc, d_w_dec, d_b_dec, *rule.own_gradients(result.sums, n_active)


def _remember(sae: SAEParameters, n_rows: int, fired: Tensor, chosen: SparseTensors | None, ranks: Ranks) -> None:
    """Count the tokens since each feature fired; let the running threshold follow a batch's least chosen value."""
    sae.tokens_since_fired.add_(n_rows).masked_fill_(fired > 0, 0)
    if sae.config.counts_k and chosen is not None and ranks.total(len(chosen.values)):
        memory = torch.where(sae.threshold > 0, THRESHOLD_MEMORY, 0.0)
        sizes = chosen.values.abs() if len(chosen.values) else memory.new_tensor([math.inf])
        sae.threshold.mul_(memory).add_((1 - memory) * ranks.least_(sizes.min()))


def auxiliary_size(n_rows: int, width: int, k: int, n_dead: int) -> tuple[int, int]:
    """Return how many dead features may explain a row, and how many rows take part: see `_add_auxiliary`."""
    k_dead = min(max(width // 2, 1), n_dead)
    return k_dead, min(n_rows, max(n_rows * k // (4 * k_dead), 1))


def _add_auxiliary(
    result: StepResult, batch: CentredBatch, weights: Weights, encoder: Encoder, settings: StepSettings, dead: Tensor,
    n_dead: int, k: int, weight: float, signed: bool,
) -> float:  # fmt: skip
    """Let dead features explain what living ones miss (Gao et al. 2024, arXiv 2406.04093).

    The largest pre-activations of dead features (int64 ids) reconstruct the residual. Adds the gradients to the
    result's and returns the share of the residual that dead features miss, unweighted. A quarter as many entries as the
    step has are active at most: so few rows take part, but all of them while few features are dead. `n_dead` counts
    dead features of all ranks. Ranks that split the rows all take the same ones here: the work is small.
    """
    if not n_dead or not weight > 0:
        return 0.0
    k_dead, n_rows = auxiliary_size(len(batch.low), batch.target.shape[1], k, n_dead)
    rows = slice(n_rows)
    rest, low = -result.residual[rows], batch.low[rows]
    target_squares = batch.target[rows].double().square().sum().item()
    total = max(rest.double().square().sum().item(), DEGENERATE * target_squares, 1e-30)
    split = settings.split.only_features
    whole = replace(settings, rule=Top(), ends=settings.ends[-1:], scale=weight / total, split=split)
    small = Encoder(encoder.w_enc[dead], encoder.b_enc[dead], encoder.b_in, encoder.dtype, threads=encoder.threads)
    chosen, _ = largest_entries(low, small, k_dead, True, 0.0, settings.use_kernels, signed, split)
    chosen = chosen._replace(feature_ids=dead[chosen.feature_ids.long()].int())
    found = SparseReconstruction.room_for(chosen, rest, whole)
    found.entries.values.copy_(chosen.values)
    whole.by_rows(lambda part: found.reconstruct(part, weights.w_dec, rest, whole), rest)
    pair = torch.stack([chosen.values, found.g]) * (2 * whole.scale)
    gradients = WeightGradients(result.d_w_enc, result.d_w_dec, fresh=False)
    by_feature = gradients.add(found, pair, low, weights.w_dec, whole)
    result.d_pre = result.d_pre + by_feature(pair[1])
    return found.losses.double().sum().item() / total
