"""Dead features start anew at what the dictionary explains worst (Bricken et al. 2023, "Towards Monosemanticity")."""

from __future__ import annotations

import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.sae import SparseAutoencoder

_ENCODER_SHARE = {"relu": 0.5, "topk": 1.0, "batchtopk": 1.0}
"""Length of a new encoder row over the mean length of live ones; a shorter one would never reach the top k."""


@torch.no_grad()
def resample(sae: SparseAutoencoder, adam: torch.optim.Adam, x: Tensor, dead_after_tokens: int, seed: int) -> int:
    """Give each dead feature the direction of a badly explained row of x (B, D); returns how many there were.

    Rows are drawn with probability proportional to their squared error. The feature's Adam state is cleared.
    """
    dead = (sae.tokens_since_fired >= dead_after_tokens).nonzero().flatten()
    if not len(dead) or len(dead) == len(sae.tokens_since_fired):
        return 0
    residual = x - _reconstruct(sae, x)
    errors = residual.square().sum(1)
    if not float(errors.sum()) > 0:
        return 0
    chosen = torch.multinomial(errors, len(dead), replacement=True, generator=torch.Generator().manual_seed(seed))
    directions = tf.normalize(residual[chosen], dim=1)
    live = sae.tokens_since_fired < dead_after_tokens
    sae.W_dec[dead] = directions * _mean_length(sae.W_dec[live])
    sae.W_enc[dead] = directions * _mean_length(sae.W_enc[live]) * _ENCODER_SHARE[sae.config.architecture]
    sae.b_enc[dead] = 0.0
    for parameter in (sae.W_dec, sae.W_enc, sae.b_enc):
        for moment in ("exp_avg", "exp_avg_sq"):
            adam.state[parameter][moment][dead] = 0.0
    sae.tokens_since_fired[dead] = 0
    return len(dead)


def _reconstruct(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """As in training, but for batchtopk, whose running threshold stands in for the batch's."""
    training = sae.training
    reconstruction = sae.eval().reconstruct(x)
    sae.train(training)
    return reconstruction


def _mean_length(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=1).mean()
    return length
