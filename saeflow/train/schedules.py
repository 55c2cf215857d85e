"""Learning rate, penalty and k in the course of a training: pure functions of the step and the recipe."""

from __future__ import annotations

import math

from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import SAEConfig, TrainConfig

_SHORT_STEPS, _SHORT_RATE, _SHORT_WIDTH = 400, 4e-3, 256
"""A highest rate that was good for trainings of at most so many steps, at this width: see docs/measured/training.md."""
_LEAST_RATE, _MOST_RATE = 1e-3, 8e-3
FORMER_RATE = 1e-3
"""The rate of earlier versions for every training whose recipe named none."""


def with_rate(recipe: Recipe, width: int) -> TrainConfig:
    """Return the recipe's settings with a highest learning rate: the one it names, else one for its width and length.

    Short trainings take larger steps. So do narrow encoders: the entries of their unit rows are larger. The rate is
    rounded to two digits, as it belongs to the SAE's identity.
    """
    config = recipe.train
    if config.lr is not None:
        return config
    rate, n_steps = _LEAST_RATE, max(1, config.n_tokens / recipe.feed.batch_rows)
    if recipe.sae.counts_k or recipe.sae.aims_at_k:
        rate = _SHORT_RATE * math.sqrt(_SHORT_WIDTH / width * min(1.0, _SHORT_STEPS / n_steps))
    chosen = min(max(rate, _LEAST_RATE), _MOST_RATE)
    return config.model_copy(update={"lr": float(f"{chosen:.1e}")})


def learning_rate(step: int, n_steps: int, config: TrainConfig) -> float:
    """Return the learning rate: it rises to `lr`, stays, then falls towards zero over the last `decay_share` of steps.

    The rise is linear. So is the fall or, with `decay` `cosine`, it is (1 - cos πt) / 2 of the share t of the fall that
    is left (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts).
    """
    rise = _risen(step, n_steps, config.warmup_share)
    decay = max(1, math.ceil(config.decay_share * n_steps))
    fall = min(1.0, (n_steps - step) / decay) if config.decay_share else 1.0
    if config.decay == "cosine":
        fall = (1 - math.cos(math.pi * fall)) / 2
    return (config.lr or _LEAST_RATE) * min(rise, fall)


def sparsity_factor(step: int, n_steps: int, config: TrainConfig) -> float:
    """Return the factor on the penalty: it rises linearly to 1 over the first `sparsity_warmup_share` of steps."""
    return _risen(step, n_steps, config.sparsity_warmup_share)


def active_features(step: int, n_steps: int, sae: SAEConfig, config: TrainConfig) -> int:
    """Return k: it falls linearly, rounded, from `k_start` to `sae.k` over the first `k_anneal_share` of steps."""
    if config.k_start is None or not sae.counts_k:
        return sae.k
    fallen = min(1.0, step / max(1, math.ceil(config.k_anneal_share * n_steps)))
    return round(config.k_start + (sae.k - config.k_start) * fallen)


def chooses_by_token(step: int, n_steps: int, config: TrainConfig) -> bool:
    """True if each token keeps its own k largest: in the first `token_topk_share` of steps, never in the last.

    batchtopk and matryoshka have one threshold for all tokens of a batch. It hardly ever selects a rare feature that
    is not learned yet, whose values stay below those of learned ones. Within a token, the feature competes with few.
    """
    return step < math.floor(config.token_topk_share * n_steps)


def _risen(step: int, n_steps: int, share: float) -> float:
    return min(1.0, (step + 1) / max(1, math.ceil(share * n_steps)))
