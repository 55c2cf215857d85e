"""Dead features start anew at what the dictionary explains worst (Bricken et al. 2023, "Towards Monosemanticity")."""

from __future__ import annotations

import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.sae.autoencoder import SparseAutoencoder

_ENCODER_SHARE = {"relu": 0.5, "gated": 0.5}
"""Length of a new encoder row over the mean length of live ones; where few values are chosen a shorter one than the
others would never be among them."""


@torch.no_grad()
def resample(
    sae: SparseAutoencoder,
    adam: torch.optim.Adam,
    x: Tensor,
    dead_after_tokens: int,
    seed: int,
    target: Tensor | None = None,
) -> int:
    """Give each dead feature the direction of a badly explained row of x (B, D); returns how many there were.

    Rows are drawn with probability proportional to their squared error. A transcoder's feature reads the row itself and
    writes what is missing of its target (B, D_out). Biases and thresholds start as at first, those of a sparse start on
    this batch, other thresholds at the mean of live ones. The feature's Adam state is cleared.
    """
    dead = (sae.tokens_since_fired >= dead_after_tokens).nonzero().flatten()
    if not len(dead) or len(dead) == len(sae.tokens_since_fired):
        return 0
    residual = (x if target is None else target) - _reconstruct(sae, x)
    errors = residual.square().sum(1)
    if not float(errors.sum()) > 0:
        return 0
    chosen = torch.multinomial(errors.cpu(), len(dead), replacement=True, generator=torch.Generator().manual_seed(seed))
    outward = tf.normalize(residual[chosen], dim=1)
    inward = outward if target is None else tf.normalize(x[chosen] - sae.b_in, dim=1)
    live = sae.tokens_since_fired < dead_after_tokens
    share = _ENCODER_SHARE.get(sae.config.architecture, 1.0)
    sae.W_dec[dead] = outward * _mean_length(sae.W_dec[live])
    sae.W_enc[dead] = inward * _mean_length(sae.W_enc[live]) * share
    for name, parameter in sae.named_parameters():
        if name in ("b_enc", "r_mag", "b_mag"):
            parameter[dead] = 0.0
        if name == "log_threshold":
            parameter[dead] = parameter[live].mean()
            sae.threshold[dead] = parameter[dead].exp()
        if name != "b_dec":
            for moment in ("exp_avg", "exp_avg_sq"):
                adam.state[parameter][moment][dead] = 0.0
    sae.start_sparse(x, dead)
    sae.tokens_since_fired[dead] = 0
    return len(dead)


def _reconstruct(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """As in training, but for a threshold of the batch, for which the running one stands in."""
    training = sae.training
    reconstruction = sae.eval().reconstruct(x)
    sae.train(training)
    return reconstruction


def _mean_length(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=1).mean()
    return length
