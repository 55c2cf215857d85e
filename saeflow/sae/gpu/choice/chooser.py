"""What a training keeps from batch to batch to choose by: a guess of the largest, or room for those above a cut.

The top-k family knows how many entries there are. In the others it depends on data: how many pre-activations are
positive (relu, gated), or above their threshold less half its bandwidth (jumprelu), where the straight-through estimate
of its gradient begins. Their room is fixed, the device counts, and a step whose entries do not fit changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeflow.sae.architectures import TrainingRule
from saeflow.sae.gpu.choice import choose, guess
from saeflow.sae.gpu.choice.choose import Choice, Entries
from saeflow.sae.gpu.choice.product import Product
from saeflow.sae.gpu.memory import CAPACITY


class Chosen(NamedTuple):
    """The entries of a step."""

    entries: Entries
    n_found: Tensor
    """(1) int32: how many there are; if the room does not hold so many, some are missing."""
    n_wrong: Tensor
    """(1) int32: rows whose guess was wrong."""


class LargestEntries:
    """Chooses the k largest of each token or of the batch. It keeps the guess for the next batch."""

    def __init__(self) -> None:
        self._guess: Tensor | None = None
        """Ratio of guess to length, or a number for the whole batch (1): see `guess`."""
        self._is_of_batch = False

    def __call__(self, product: Product, rule: TrainingRule, k: int, by_token: bool, n_rows: int) -> Chosen:
        """Return the entries of the product that a batch of `n_rows` may keep; `by_token` those of each token."""
        n = min(k * n_rows, product.n_rows * product.n_features)
        choice = self._of_rows(product, min(k, product.n_features)) if by_token else self._of_batch(product, n)
        return Chosen(choice.entries, choice.entries.row_starts[-1:], choice.n_wrong)

    def _of_rows(self, product: Product, k: int) -> Choice:
        if self._guess is None or self._is_of_batch:
            self._guess, self._is_of_batch = guess.first_ratio(product, k), False
        lengths = guess.lengths(product.low)
        choice = choose.largest_of_rows(product, k, self._guess * lengths, power_of_two(CAPACITY * k))
        self._guess = guess.next_ratio(choice.kth, lengths)
        return choice

    def _of_batch(self, product: Product, n: int) -> Choice:
        if self._guess is None or not self._is_of_batch:
            self._guess, self._is_of_batch = guess.first_of_batch(product, n), True
        choice = choose.largest_of_batch(product, n, self._guess, 2 * n)
        self._guess = choice.kth * guess.BATCH_MARGIN
        return choice


class EntriesAboveCut:
    """Chooses all entries above the rule's cut, in room for so many."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, product: Product, rule: TrainingRule, k: int, by_token: bool, n_rows: int) -> Chosen:
        """Return the entries that the product has: neither `k` nor `by_token` nor `n_rows` matters."""
        cut = rule.cut if isinstance(rule.cut, Tensor) else None
        entries, n_found = choose.above_cut(product if cut is None else product.less(cut), cut, self.room)
        return Chosen(entries, n_found, torch.zeros_like(n_found))


def power_of_two(n: int) -> int:
    """Return the power of two from n on."""
    return 1 << (n - 1).bit_length()
