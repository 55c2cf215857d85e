"""Other ways to read the weights of an imported autoencoder, tried on a few activations.

Folders of autoencoders do not always say, or say wrongly, how their weights are meant. Where an autoencoder explains
little, one of these readings may explain much more. It is then named; nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saeflow.sae.autoencoder import SparseAutoencoder

_ENTRIES = 1 << 26
"""Pre-activations held at once, at most."""
_CLEARLY, _AT_MOST, _GOOD = 0.6, 0.8, 0.1
"""A reading is named if it leaves at most this share of the variance that is left now, and at most this much in all.
Below `_GOOD` nothing is tried."""


@dataclass(frozen=True)
class Reading:
    """Weights as they may have been meant. Arrays are as in `SparseAutoencoder`."""

    looks_like: str
    b_enc: Tensor
    w_dec: Tensor
    threshold: Tensor
    scale: float = 1.0
    w_enc: Tensor | None = None


@torch.no_grad()
def best_reading(sae: SparseAutoencoder, x: Tensor, wanted: Tensor, unexplained: float) -> tuple[str, float] | None:
    """Return what the autoencoder looks like and the variance unexplained when it is read so, if that is much less than
    `unexplained` on tokens x (n, D) to be reconstructed as `wanted`; else None."""
    if unexplained < _GOOD or sae.input_norm != "none" or sae.config.architecture == "mp" or len(x) < 2:
        return None
    n = max(16, _ENTRIES // sae.config.n_features)
    x, wanted = x[:n].float(), wanted[:n].float()
    tried = [(_unexplained(sae, each, x, wanted), each.looks_like) for each in _readings(sae, x)]
    found, looks_like = min(tried)
    if not found <= min(_CLEARLY * unexplained, _AT_MOST):  # NaN, too
        return None
    return looks_like, found


def _readings(sae: SparseAutoencoder, x: Tensor) -> Iterator[Reading]:
    w_enc, w_dec, b_enc = sae.W_enc, sae.W_dec, sae.b_enc
    threshold = sae.threshold.expand(len(b_enc))
    scale = math.sqrt(x.shape[1]) / x.norm(dim=1).mean().clamp(min=1e-30).item()
    length, transcodes = w_dec.norm(dim=1), sae.config.target_site is not None
    yield Reading(f"activations have to be scaled: set sae.input_scale to {scale:.6g}", b_enc, w_dec, threshold, scale)
    if not transcodes:
        shift = w_enc @ sae.b_dec
        yield Reading("the decoder bias is not subtracted from the input", b_enc + shift, w_dec, threshold)
        yield Reading("the decoder bias is subtracted from the input", b_enc - shift, w_dec, threshold)
    if threshold.any():
        over = length.clamp(min=1e-8)
        lengths = "by the lengths of the decoder's rows, which were folded into other weights alone"
        yield Reading(f"thresholds have to be multiplied {lengths}", b_enc, w_dec, threshold * over)
        yield Reading(f"thresholds have to be divided {lengths}", b_enc, w_dec, threshold / over)
        if threshold.min() != threshold.max():
            one = threshold.clamp(min=1e-30).log().mean().exp().expand_as(threshold)
            yield Reading(
                "the lengths of the decoder's rows were folded into the thresholds twice: one for all features, "
                f"{one[0].item():.4g}, explains more", b_enc, w_dec, one,
            )  # fmt: skip
    if w_dec.shape[0] == w_dec.shape[1]:
        yield Reading("the decoder is transposed", b_enc, w_dec.t(), threshold)
    if w_enc.shape[0] == w_enc.shape[1]:
        yield Reading("the encoder is transposed", b_enc, w_dec, threshold, w_enc=w_enc.t())


def _unexplained(sae: SparseAutoencoder, reading: Reading, x: Tensor, wanted: Tensor) -> float:
    w_enc = sae.W_enc if reading.w_enc is None else reading.w_enc
    pre = (x * reading.scale - sae.b_in) @ w_enc.t() + reading.b_enc
    match sae.config.architecture:
        case "topk" | "abstopk":
            size = pre.abs() if sae.config.architecture == "abstopk" else pre.clamp(min=0)
            chosen = size.topk(sae.config.k, dim=1).indices
            values = torch.zeros_like(pre).scatter_(1, chosen, pre.gather(1, chosen))
            values *= size > 0
        case "gated":
            values = (sae.r_mag.exp() * (pre - reading.b_enc) + sae.b_mag).clamp(min=0) * (pre > 0)
        case _:
            values = pre.clamp(min=0) * (pre > reading.threshold)
    there = values @ reading.w_dec + sae.b_dec
    if sae.W_skip is not None:
        there = there + x * reading.scale @ sae.W_skip.t()
    error = (there / reading.scale - wanted).square().sum()
    return float(error / (wanted - wanted.mean(dim=0)).square().sum().clamp(min=1e-30))
