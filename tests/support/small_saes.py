"""Small autoencoders of every architecture, rows to encode, and their values by a slow, obvious formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.recipe.settings import SAEConfig
from saeflow.sae.autoencoder import SparseAutoencoder

B, D, D_OUT, F, K = 200, 24, 18, 160, 5
PENALISED = ["relu", "gated", "jumprelu-l0", "jumprelu-tanh"]
EVERY = ["topk", "abstopk", "batchtopk", "matryoshka", *PENALISED]
"""Architectures by name; jumprelu with each of its penalties."""


def settings_of(name: str, **changes: Any) -> SAEConfig:
    architecture, _, penalty = name.partition("-")
    own = {"penalty": penalty, "first_threshold": 1.5, "bandwidth": 0.6} if penalty else {}
    base = {"n_features": F, "k": K, "l1_weight": 0.3, "prefixes": [10, 50], "seed": 3}
    return SAEConfig.model_validate({"architecture": architecture} | base | own | changes)


def an_autoencoder(name: str, kernels: bool = True, product=torch.float32, **changes: Any) -> SparseAutoencoder:
    config = settings_of(name, **changes)
    sae = SparseAutoencoder(config, D, D_OUT if config.target_site else None)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in filter(lambda each: each.requires_grad, sae.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        sae.b_dec.normal_(0, 1, generator=generator)
        if config.target_site:
            sae.centre.normal_(0, 1, generator=generator)
    sae.after_step()
    sae.product_dtype, sae.use_kernels = product, kernels
    return sae


def rows(width: int = D, seed: int = 0, n: int = B) -> Tensor:
    return 2 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 1


def obvious_values(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """What the published autoencoder gives, in float64."""
    p = {name: value.detach().double() for name, value in (*sae.named_parameters(), *sae.named_buffers())}
    b_in = p.get("centre", p["b_dec"])
    pre = (x.double() - b_in) @ p["W_enc"].t() + p["b_enc"]
    match sae.config.architecture:
        case "relu":
            return pre.clamp(min=0)
        case "topk":
            return torch.where(pre >= pre.topk(K, dim=1).values[:, -1:], pre, 0).clamp(min=0)
        case "abstopk":
            return torch.where(pre.abs() >= pre.abs().topk(K, dim=1).values[:, -1:], pre, 0)
        case "gated":
            return (pre > 0) * (p["r_mag"].exp() * (pre - p["b_enc"]) + p["b_mag"]).clamp(min=0)
        case _:
            return torch.where(pre > p["threshold"], pre, 0).clamp(min=0)


def dense(sparse, n: int) -> Tensor:
    out = torch.zeros(n, F, dtype=torch.float64)
    owners = np.repeat(np.arange(n), np.diff(sparse.row_starts))
    out[owners, sparse.feature_ids.astype(np.int64)] = torch.from_numpy(sparse.values).double()
    return out


def trained(name: str, **settings: Any) -> SparseAutoencoder:
    """With thresholds that keep a few features of a token, different ones where each feature has its own."""
    sae = an_autoencoder(name, **settings).eval()
    with torch.no_grad():
        if sae.threshold.dim():
            sae.threshold.copy_(torch.linspace(0.5, 4.0, F))
            sae.log_threshold.copy_(sae.threshold.log())
        elif not name.startswith(("relu", "gated", "topk", "abstopk")):
            sae.threshold.fill_(2.5)
    return sae


def values_of(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    return dense(sae.encode_sparse(x), len(x))
