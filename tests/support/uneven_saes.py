"""Small autoencoders with weights of very different sizes, and activations in the dtypes that are stored."""

import numpy as np
import torch

from saeflow.activations.sparse_values import SparseRows, row_starts_of
from saeflow.recipe.settings import SAEConfig
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.exact import rounded

ARCHITECTURES = ["relu", "topk", "abstopk", "batchtopk"]
STORED = [torch.float16, torch.bfloat16, torch.float32]
D, F, K = 40, 200, 6


def an_autoencoder(architecture, product=torch.bfloat16, n_features=F, width=D):
    """Uneven weights, so that bounds differ from feature to feature."""
    config = SAEConfig(architecture=architecture, n_features=n_features, k=K, seed=3, encoder_scale=1.0)
    sae = SparseAutoencoder(config, width).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        sae.W_enc.mul_(torch.rand(n_features, 1, generator=generator) * 3 + 0.1)
        sae.b_enc.normal_(0, 0.2, generator=generator)
        sae.b_dec.normal_(0, 1, generator=generator)
        sae.threshold.fill_(4.0)
    sae.product_dtype = product
    return sae


def some_activations(n_rows, dtype=torch.float16, width=D, seed=0):
    return (2 * torch.randn(n_rows, width, generator=torch.Generator().manual_seed(seed)) + 1).to(dtype)


def dense(sparse, n_features=F):
    out = np.zeros((len(sparse.row_starts) - 1, n_features), np.float32)
    out[np.repeat(np.arange(len(out)), np.diff(sparse.row_starts)), sparse.feature_ids] = sparse.values
    return out


@torch.no_grad()
def encode_densely(sae, x):
    """The values of rows x (B, D), by a dense product in float64."""
    function = sae.activation_function()
    thresholds, stretch, shift = function.on(x.device)
    pre = (x.double() - sae.b_in.double()) @ sae.W_enc.double().t() + sae.b_enc.double()
    signs = pre.sign() if function.signed else torch.ones_like(pre)
    pre = pre * signs
    keep = pre > thresholds
    if function.k is not None:
        places = pre.sort(dim=1, descending=True, stable=True).indices[:, : function.k]
        keep &= torch.zeros_like(keep).scatter_(1, places, True)
    values = rounded(torch.where(keep, (stretch * pre + shift).clamp(min=0), 0.0)) * signs.float()
    rows, ids = values.nonzero(as_tuple=True)
    return SparseRows(row_starts_of(rows.numpy(), len(x)), ids.int().numpy(), values[rows, ids].numpy())
