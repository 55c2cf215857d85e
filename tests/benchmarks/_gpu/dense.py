"""The dense step that everybody writes, for torch.compile: whole matrices of values and of gradients, torch's Adam.

Matrix products are in bfloat16 by autocast, sums and Adam in float32. Losses are those of `saeflow.sae.autoencoder`,
but for the auxiliary one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from saeflow.recipe.settings import Architecture
from tests.benchmarks._gpu.measure import Card, Size

NESTED, BANDWIDTH = 5, 0.05


class Dense(nn.Module):
    """An autoencoder by whole matrices."""

    def __init__(self, architecture: Architecture, size: Size, card: Card) -> None:
        super().__init__()
        self.architecture, self.k, self.n_features = architecture, size.k, size.n_features
        directions = tf.normalize(card.normal(size.n_features, size.width, seed=7), dim=1)
        self.w_enc, self.w_dec = nn.Parameter(0.5 * directions), nn.Parameter(directions.clone())
        names = ("b_enc", "r_mag", "b_mag") if architecture == "gated" else ("b_enc",)
        for name in names:
            setattr(self, name, nn.Parameter(torch.zeros(size.n_features, device=card.place)))
        self.b_dec = nn.Parameter(torch.zeros(size.width, device=card.place))
        if architecture == "jumprelu":
            self.threshold = nn.Parameter(torch.full((size.n_features,), 1.0, device=card.place))

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss of a batch (B, D)."""
        pre = tf.linear(x - self.b_dec, self.w_enc, self.b_enc)
        values, penalty = self._values(pre.float())
        variance = (x - x.mean(0)).square().sum()
        if self.architecture != "matryoshka":
            return (values @ self.w_dec + self.b_dec - x).float().square().sum() / variance + penalty
        step, there, loss = -(-self.n_features // NESTED), self.b_dec - x, penalty
        for start in range(0, self.n_features, step):
            part = slice(start, start + step)
            there = there + values[:, part] @ self.w_dec[part]
            loss = loss + there.float().square().sum() / variance / NESTED
        return loss

    def _values(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        nothing = pre.new_zeros(())
        match self.architecture:
            case "topk" | "abstopk":
                sizes = pre.abs() if self.architecture == "abstopk" else pre
                ids = sizes.topk(self.k, dim=1, sorted=False).indices
                return torch.zeros_like(pre).scatter(1, ids, pre.gather(1, ids)), nothing
            case "batchtopk" | "matryoshka":
                n = self.k * len(pre)
                kth = pre.detach().flatten().topk(n, sorted=False).values.amin()
                return pre * (pre >= kth), nothing
            case "jumprelu":
                gate, held = pre > self.threshold, self.threshold.detach()
                near = ((pre.detach() - held).abs() < BANDWIDTH / 2) / BANDWIDTH
                values = pre * gate - held * near * (self.threshold - held)  # which is zero: arXiv 2407.14435
                return values, ((values > 0).float().sum(1).mean() / self.k - 1).square()
            case "gated":
                values = (pre > 0) * tf.relu(self.r_mag.exp() * (pre - self.b_enc) + self.b_mag)
                return values, tf.relu(pre).mean()
            case _:
                values = tf.relu(pre)
                return values, values.mean()


def dense_step(architecture: Architecture, size: Size, card: Card) -> Callable[[Tensor], None]:
    """Return a step, compiled by torch; on the processor by a backend that only traces it."""
    sae = Dense(architecture, size, card)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    loss = torch.compile(sae, backend="inductor" if card.on_gpu else "eager")

    def step(x: Tensor) -> None:
        with torch.autocast(card.place.type, torch.bfloat16):
            value = loss(x)
        value.backward()
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            sae.w_dec.div_(torch.linalg.vector_norm(sae.w_dec, dim=1, keepdim=True))

    return step
