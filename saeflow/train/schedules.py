"""What changes in the course of a training: pure functions of the step, of how many there are, and of the recipe."""

from __future__ import annotations

import math

from saeflow.recipe.settings import SAEConfig, TrainConfig


def learning_rate(step: int, n_steps: int, config: TrainConfig) -> float:
    """Linear warm-up to `lr`, flat, then a fall towards zero over the last `decay_share` of steps.

    The fall is straight or, with `decay` `cosine`, (1 - cos πt) / 2 of the share t that is left of it
    (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts).
    """
    rise = _risen(step, n_steps, config.warmup_share)
    decay = max(1, math.ceil(config.decay_share * n_steps))
    fall = min(1.0, (n_steps - step) / decay) if config.decay_share else 1.0
    if config.decay == "cosine":
        fall = (1 - math.cos(math.pi * fall)) / 2
    return config.lr * min(rise, fall)


def sparsity(step: int, n_steps: int, config: TrainConfig) -> float:
    """Factor on the penalty: a straight line up to 1 over the first `sparsity_warmup_share` of steps."""
    return _risen(step, n_steps, config.sparsity_warmup_share)


def n_active(step: int, n_steps: int, sae: SAEConfig, config: TrainConfig) -> int:
    """k of this step: from `k_start` in a straight line, rounded, down to `sae.k` over the first `k_anneal_share` of
    steps."""
    if config.k_start is None or not sae.counts_k:
        return sae.k
    fallen = min(1.0, step / max(1, math.ceil(config.k_anneal_share * n_steps)))
    return round(config.k_start + (sae.k - config.k_start) * fallen)


def chooses_by_token(step: int, n_steps: int, config: TrainConfig) -> bool:
    """Does each token keep its own k largest in this step? For the first `token_topk_share` of steps, never in the
    last.

    A threshold for all tokens of a batch, as batchtopk and matryoshka have it, hardly ever selects a rare feature that
    is not learned yet: its values stay below those of the features that are. Within a token it competes with few.
    """
    return step < math.floor(config.token_topk_share * n_steps)


def _risen(step: int, n_steps: int, share: float) -> float:
    return min(1.0, (step + 1) / max(1, math.ceil(share * n_steps)))
