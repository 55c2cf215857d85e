"""Dead features start again at rows that are explained worst (Bricken et al. 2023, "Towards Monosemanticity")."""

from __future__ import annotations

import torch
import torch.nn.functional as tf
from torch import Tensor

from saeflow.sae.autoencoder import SparseAutoencoder

_ENCODER_SHARE = {"relu": 0.5, "gated": 0.5}
"""Length of a new encoder row over the mean length of live ones; 1 for other architectures. These choose the largest
values, and those of a shorter row would never be among them."""


@torch.no_grad()
def resample_dead(
    sae: SparseAutoencoder,
    adam: torch.optim.Adam,
    x: Tensor,
    dead_after_tokens: int,
    seed: int,
    target: Tensor | None = None,
) -> int:
    """Give each dead feature the direction of a badly explained row of x (B, D); return the number of dead features.

    A row is drawn with a probability proportional to its squared error. A transcoder's feature reads the row itself and
    writes what is missing of the row's target (B, D_out). Biases start as at first. Thresholds start at the mean of
    live ones. With a sparse start, this batch sets them again. The feature's Adam state is cleared.
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
        if name != "b_dec" and parameter.requires_grad:
            for name_of_moment, moment in adam.state[parameter].items():
                if name_of_moment != "step":
                    moment[dead] = 0  # in 8 bits the scale of zero makes all codes zero
    sae.start_sparse(x, dead)
    sae.tokens_since_fired[dead] = 0
    return len(dead)


def _reconstruct(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """Reconstruct as in training, but with the running threshold instead of the batch's own."""
    training = sae.training
    reconstruction = sae.eval().reconstruct(x)
    sae.train(training)
    return reconstruction


def _mean_length(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=1).mean()
    return length
