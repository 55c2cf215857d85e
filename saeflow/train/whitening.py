"""Covariance whitening of the activations that a training reads, and its removal from the trained SAE.

"Data Whitening Improves Sparse Autoencoder Learning" (Saraswatula and Klindt 2025, arXiv 2511.13981) whitens by PCA;
here ZCA turns the result back, so that axes stay: x becomes (x - mean) C^(-1/2), whose directions all vary alike. C is
the covariance of the training's sample of rows, its eigenvalues shrunk towards their mean by SHRINKAGE: no direction
grows by more than 32 times the average one.

Memory is that of four matrices (D, D) in float64, 2 GiB at D = 8,192, and the time that of one eigendecomposition; each
step then takes one more product (B, D) by (D, D).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeflow.sae.autoencoder import SparseAutoencoder

SHRINKAGE = 1e-3
_ROWS_AT_A_TIME = 4096
"""Rows widened to float64 at a time."""


class Whitening(NamedTuple):
    """The mean (D), C^(-1/2) and C^(1/2) (D, D), float32; both matrices are symmetric."""

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x.device)) @ self.matrix.to(x.device)

    @torch.no_grad()
    def removed_from(self, sae: SparseAutoencoder) -> SparseAutoencoder:
        """Fold the whitening into the weights of an SAE, which then takes raw activations. Values stay the same."""
        matrix, inverse = self.matrix.double(), self.inverse.double()
        sae.W_enc.copy_(sae.W_enc.double() @ matrix)
        sae.W_dec.copy_(sae.W_dec.double() @ inverse)
        sae.b_dec.copy_(self.mean.double() + sae.b_dec.double() @ inverse)
        return sae


def whitening_of(rows: Tensor) -> Whitening:
    """Return the whitening of rows (n, D)."""
    mean = torch.stack([part.double().sum(0) for part in rows.split(_ROWS_AT_A_TIME)]).sum(0) / len(rows)
    covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.split(_ROWS_AT_A_TIME):
        centred = part.double() - mean
        covariance.addmm_(centred.t(), centred, alpha=1 / len(rows))
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    roots = ((1 - SHRINKAGE) * values + SHRINKAGE * values.mean()).sqrt().clamp(min=1e-12)  # rows may be all equal
    return Whitening(mean.float(), ((vectors / roots) @ vectors.t()).float(), ((vectors * roots) @ vectors.t()).float())
