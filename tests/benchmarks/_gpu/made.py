"""A batch and a dictionary of random numbers on the card, and what the kernels make of them, each made once."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor

from tests.benchmarks._gpu.measure import Card, Size

LR = 1e-3
CAPACITY = 16
"""As `saeflow.sae.gpu.fused` has it."""


class Made:
    """Imports kernels only where they are used: Triton may be missing."""

    def __init__(self, size: Size, card: Card) -> None:
        self.size, self.card = size, card

    @cached_property
    def low(self) -> Tensor:
        """(B, D) bfloat16: rows of lengths that differ three times."""
        lengths = torch.rand(self.size.n_rows, 1, generator=self.card.generator(1), device=self.card.place) + 0.5
        return (lengths * self.card.normal(self.size.n_rows, self.size.width, seed=2)).bfloat16()

    @cached_property
    def w_enc(self) -> Tensor:
        return self.card.normal(self.size.n_features, self.size.width, seed=3) / self.size.width**0.5

    @cached_property
    def w_low(self) -> Tensor:
        return self.w_enc.bfloat16()

    @cached_property
    def bias(self) -> Tensor:
        return 0.01 * self.card.normal(self.size.n_features, seed=4)

    @cached_property
    def w_dec(self) -> Tensor:
        return tf.normalize(self.card.normal(self.size.n_features, self.size.width, seed=5), dim=1)

    @cached_property
    def target(self) -> Tensor:
        return self.low.float()

    @cached_property
    def product(self) -> Any:
        from saeflow.sae.gpu.choice.product import Product

        return Product.of(self.low, self.w_low, self.bias)

    @cached_property
    def lengths(self) -> Tensor:
        from saeflow.sae.gpu.choice import guess

        return guess.lengths(self.low)

    @cached_property
    def guess(self) -> Tensor:
        """(B): what a step guesses after a first batch."""
        from saeflow.sae.gpu.choice import guess

        first = guess.first_ratio(self.product, self.size.k) * self.lengths
        return guess.next_ratio(self.chosen(first).kth, self.lengths) * self.lengths

    def chosen(self, guess: Tensor, product: Any = None) -> Any:
        """Return the k largest of each row."""
        from saeflow.sae.gpu.choice import choose

        return choose.largest_of_rows(product or self.product, self.size.k, guess, self.capacity)

    @property
    def capacity(self) -> int:
        return 1 << (CAPACITY * self.size.k - 1).bit_length()

    @cached_property
    def choice(self) -> Any:
        return self.chosen(self.guess)

    @cached_property
    def ends(self) -> Tensor:
        return torch.full((1,), self.size.n_features, dtype=torch.int32, device=self.card.place)

    def decoded(self, w_dec: Tensor | None = None, ends: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return residual (G, B, D), losses (G, B), and products of the entries (N)."""
        from saeflow.sae.gpu.decode import decode_rows, room_for_residuals

        starts, ids, values = self.choice.entries
        ends = self.ends if ends is None else ends
        residual, losses = room_for_residuals(len(ends), self.target)
        g = torch.zeros_like(values)
        w_dec = self.w_dec if w_dec is None else w_dec
        decode_rows(starts, ids, values, w_dec, self.target, ends, residual, losses, g)
        return residual, losses, g

    @cached_property
    def residual(self) -> Tensor:
        """(B, D)"""
        return self.decoded()[0][0]

    @cached_property
    def used(self) -> tuple[Tensor, Tensor]:
        """The feature and the row of each entry, as the update takes them."""
        from saeflow.sae.gpu.rows.by_feature import rows_of_entries, used_ids

        starts, ids, _ = self.choice.entries
        used = used_ids(ids, starts, self.size.n_features)
        return used, rows_of_entries(starts, len(ids)).clamp(max=self.size.n_rows - 1)

    @cached_property
    def pair(self) -> Tensor:
        """(2, N): values, and derivatives by pre-activations, times the scale of a loss."""
        _, _, g = self.decoded()
        return torch.stack([self.choice.entries.values, g]) * (2 / self.target.square().sum())

    def gradients(self) -> Any:
        from saeflow.sae.gpu.rows.update import RowGradients

        ids, rows = self.used
        return RowGradients.of_entries(
            ids, rows, rows, self.pair, self.low, self.residual, self.size.n_features, on_sphere=True
        )

    @cached_property
    def clock(self) -> Any:
        from saeflow.sae.gpu.rows.adam import AdamClock, AdamSettings

        clock = AdamClock(AdamSettings(highest_lr=LR), self.card.place)
        clock.lr.fill_(LR)
        clock.advance()
        return clock

    @cached_property
    def wakefulness(self) -> Any:
        """All rows are awake."""
        from saeflow.sae.gpu.rows.adam import Wakefulness

        all_awake = Wakefulness.asleep(self.size.n_features, self.card.place)
        all_awake.awake_until.fill_(1 << 30)
        return all_awake

    def moments(self, weights: Tensor, seed: int) -> Any:
        """Return a copy of the weights with moments like those of a training under way."""
        from saeflow.sae.gpu.rows.moments import AdamRows

        rows = AdamRows.begin(weights.clone())
        size = float(self.pair[1].abs().mean()) * float(self.lengths.mean()) / self.size.width**0.5
        rows.m.normal_(std=size, generator=self.card.generator(seed))
        rows.v.uniform_(0.5 * size**2, 2 * size**2, generator=self.card.generator(seed + 1))
        return rows
