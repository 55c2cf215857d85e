"""What dead features add to a step: they explain what living ones miss (Gao et al. 2024, arXiv 2406.04093).

As `saeflow.sae.loss` does it on the processor, but for one thing: the number of rows and of entries follows from the
number of dead features that the host has fetched last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeflow.sae.architectures import Top
from saeflow.sae.batch import DEGENERATE
from saeflow.sae.gpu.choice import choose, guess
from saeflow.sae.gpu.choice.chooser import Chosen, power_of_two
from saeflow.sae.gpu.choice.product import Product
from saeflow.sae.gpu.explain import Centred, Reconstructed, explain
from saeflow.sae.gpu.feature_exchange import Exchange
from saeflow.sae.gpu.memory import AUX_CAPACITY, GATHERED
from saeflow.sae.loss import auxiliary_size


class Auxiliary(NamedTuple):
    """The entries that dead features add, and what they reconstruct."""

    entries: Reconstructed
    share: Tensor
    """(): share of the residual that dead features miss."""


class AuxiliaryLoss:
    """Reconstructs the residual from dead features. It keeps the guess for its next batch."""

    def __init__(self, signed: bool) -> None:
        self.signed = signed
        self._ratio: Tensor | None = None

    def __call__(
        self, batch: Centred, rest: Tensor, weights: tuple[Tensor, Tensor, Tensor], dead: Tensor, k: int, n_dead: int,
        weight: float, exchange: Exchange,
    ) -> Auxiliary:  # fmt: skip
        """Return what dead features (F, bool) add, for the first rows of the batch.

        `rest` (B, D_out) is to be reconstructed, `weights` are those of the product, the encoder's bias and the
        decoder's. `weight`: that of the auxiliary loss.
        """
        w_low, b_enc, w_dec = weights
        k_dead, n_rows = auxiliary_size(len(batch.target), batch.target.shape[1], k, n_dead)
        low, wanted, target = batch.low[:n_rows], rest[:n_rows].contiguous(), batch.target[:n_rows]
        product, names = self._product(low, w_low, b_enc, dead, n_dead)
        if self._ratio is None:
            self._ratio = torch.zeros(1, device=low.device)
        lengths = guess.lengths(product.low)
        k_here, exchange = min(k_dead, product.n_features), exchange.of_first_rows(n_rows)
        choice = choose.largest_of_rows(product, k_here, self._ratio * lengths, power_of_two(AUX_CAPACITY * k_here))
        self._ratio = guess.next_ratio(choice.kth, lengths)
        own = Chosen(choice.entries, choice.entries.row_starts[-1:], choice.n_wrong)
        entries = exchange.chosen_of_all(own, k_dead, True).entries
        if names is not None:
            entries = entries._replace(ids=names[entries.ids.long()])
        squares = wanted.double().square().sum(), DEGENERATE * target.double().square().sum()
        total = torch.maximum(*squares).clamp(min=1e-30)[None]
        ends = torch.full((1,), len(w_dec), dtype=torch.int32, device=low.device)
        explained = explain(entries, Centred(low, wanted, total), Top(), w_dec, ends, weight / total, exchange)
        return Auxiliary(explained.main, (explained.errors / total)[0])

    def _product(
        self, low: Tensor, w_low: Tensor, b_enc: Tensor, dead: Tensor, n_dead: int
    ) -> tuple[Product, Tensor | None]:
        """Return the product with dead features, and which they are, unless all features are in it."""
        n_features = len(w_low)
        if n_dead * GATHERED > n_features:
            return Product.of(low, w_low, torch.where(dead, b_enc, -torch.inf), self.signed), None
        places = torch.where(dead, dead.cumsum(0) - 1, n_dead).clamp(max=n_dead)
        numbers = torch.arange(n_features, dtype=torch.int32, device=low.device)
        names = numbers.new_zeros(n_dead + 1).scatter_(0, places, numbers)[:n_dead]
        filled = torch.arange(n_dead, device=low.device) < dead.sum()
        bias = torch.where(filled, b_enc[names.long()], -torch.inf)
        return Product.of(low, w_low[names.long()], bias, self.signed), names
