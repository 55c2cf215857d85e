"""What distinguishes the architectures: traits, and a rule from pre-activation to value and penalty with derivatives.

A rule works number by number, on a few entries or on a dense piece: `at` says which features the last dimension of its
tensors are, by their ids or all in order. `g` is the derivative of the reconstruction loss by the value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from saeflow.recipe.settings import Architecture

FeatureIndex = Tensor | slice
FeatureSums = dict[str, Tensor]
Number = TypeVar("Number", float, Tensor)
"""A number that the host has, or one (shape ()) that stays on the device."""
Backward = tuple[Tensor, FeatureSums]
"""The derivative by the pre-activation, and numbers to be summed by feature for the gradients of own parameters."""


@dataclass(frozen=True)
class Traits:
    """What the loss and the parameters need to know of an architecture, apart from its rule."""

    own_parameters: tuple[str, ...] = ()
    chooses_by_token: bool = False
    """True if training keeps the k largest values of each token rather than of the batch."""
    revives_dead: bool = False
    """True if the auxiliary loss applies."""
    signed: bool = False
    """True if values may be below zero: the largest magnitudes are kept, each with its sign."""
    pursues: bool = False
    """True if the decoder also encodes, one feature after the other: see `saeflow.sae.pursuit`."""


TRAITS: dict[Architecture, Traits] = {
    "relu": Traits(),
    "gated": Traits(("r_mag", "b_mag")),
    "topk": Traits(chooses_by_token=True, revives_dead=True),
    "batchtopk": Traits(revives_dead=True),
    "matryoshka": Traits(revives_dead=True),
    "jumprelu": Traits(("log_threshold",), revives_dead=True),
    "abstopk": Traits(chooses_by_token=True, revives_dead=True, signed=True),
    "mp": Traits(chooses_by_token=True, pursues=True),
}


@dataclass(frozen=True)
class Top:
    """The value is the pre-activation, if it was chosen: TopK (Gao et al. 2024, arXiv 2406.04093), BatchTopK (Bussmann
    et al. 2024, arXiv 2412.06410) and, with nested dictionaries, Matryoshka (Bussmann et al. 2025, arXiv 2503.17547).
    AbsTopK (Zhu, Khalili and Zhu 2025, arXiv 2510.00404) chooses by magnitude and keeps the sign, so that one feature
    stands for both ends of an axis.
    """

    @property
    def cut(self) -> Tensor | float | None:
        """Number, or number of each feature (F), above which an entry matters; None if entries are chosen otherwise."""
        return None

    def values(self, pre: Tensor, at: FeatureIndex) -> Tensor:
        return pre

    def second_values(self, pre: Tensor) -> Tensor | None:
        """Return values that also have to reconstruct, by themselves; None if there are none."""
        return None

    def backward(self, pre: Tensor, values: Tensor, g: Tensor, g_second: Tensor | None, at: FeatureIndex) -> Backward:
        return g, {}

    def penalty(self, pre: Tensor, values: Tensor, at: FeatureIndex) -> Tensor:
        return values.new_zeros(())

    def penalty_loss(self, total: Number, n_active: Number) -> tuple[Number, Number]:
        """Return what the penalty adds to the loss, and the penalty before its weight."""
        return total, total

    def bias_gradient(self, d_pre: Tensor, sums: FeatureSums) -> Tensor:
        return d_pre

    def own_gradients(self, sums: FeatureSums, n_active: Number) -> tuple[Tensor, ...]:
        return ()


@dataclass(frozen=True)
class Relu(Top):
    """relu(pre), with a penalty of `weight` times the sum of values, each times its direction's length if `lengths` (F)
    are given (Bricken et al. 2023, "Towards Monosemanticity"; with lengths Conerly et al. 2024, "April update")."""

    weight: float
    n_entries: int
    lengths: Tensor | None

    @property
    def cut(self) -> float:
        return 0.0

    def values(self, pre: Tensor, at: FeatureIndex) -> Tensor:
        return pre.clamp(min=0)

    def backward(self, pre: Tensor, values: Tensor, g: Tensor, g_second: Tensor | None, at: FeatureIndex) -> Backward:
        return (g + self._price(at)) * (pre > 0), self._of_lengths(values)

    def penalty(self, pre: Tensor, values: Tensor, at: FeatureIndex) -> Tensor:
        return (values if self.lengths is None else values * self.lengths[at]).sum()

    def penalty_loss(self, total: Number, n_active: Number) -> tuple[Number, Number]:
        mean = total / self.n_entries
        return self.weight * mean, mean

    def _price(self, at: FeatureIndex) -> Tensor | float:
        price = self.weight / self.n_entries
        return price if self.lengths is None else price * self.lengths[at]

    def _of_lengths(self, values: Tensor) -> FeatureSums:
        return {} if self.lengths is None else {"length": values * (self.weight / self.n_entries)}


@dataclass(frozen=True)
class Gated(Relu):
    """relu(exp(r_mag) * (pre - b_enc) + b_mag) where pre, the gate, is positive (Rajamanoharan et al. 2024, arXiv
    2404.16014). The penalty is on relu(pre), which also has to reconstruct by itself with a decoder held fixed."""

    r_mag: Tensor
    b_mag: Tensor
    b_enc: Tensor

    def values(self, pre: Tensor, at: FeatureIndex) -> Tensor:
        inner = self.r_mag[at].exp() * (pre - self.b_enc[at]) + self.b_mag[at]
        return inner.clamp_(min=0) * (pre > 0)

    def second_values(self, pre: Tensor) -> Tensor | None:
        return pre.clamp(min=0)

    def backward(self, pre: Tensor, values: Tensor, g: Tensor, g_second: Tensor | None, at: FeatureIndex) -> Backward:
        assert g_second is not None
        stretch, of_magnitude = self.r_mag[at].exp(), g * (values > 0)
        through = stretch * of_magnitude
        d_pre = through + (g_second + self._price(at)) * (pre > 0)
        sums = {"b_mag": of_magnitude, "r_mag": through * (pre - self.b_enc[at])}
        return d_pre, sums | self._of_lengths(pre.clamp(min=0))

    def penalty(self, pre: Tensor, values: Tensor, at: FeatureIndex) -> Tensor:
        return super().penalty(pre, pre.clamp(min=0), at)

    def bias_gradient(self, d_pre: Tensor, sums: FeatureSums) -> Tensor:
        """The magnitude path does not see the gate's bias."""
        return d_pre - self.r_mag.exp() * sums["b_mag"]

    def own_gradients(self, sums: FeatureSums, n_active: Number) -> tuple[Tensor, ...]:
        return sums["r_mag"], sums["b_mag"]


@dataclass(frozen=True)
class JumpReLU(Top):
    """pre where it is above the feature's threshold, else 0 (Rajamanoharan et al. 2024, arXiv 2407.14435).

    The thresholds' gradients are straight-through estimates with a box kernel of width `bandwidth`. The penalty is
    `weight` times (L0 / k - 1)², the quadratic aim at k features a token of that paper's appendix; or, with
    `tanh_scale`, `weight` / D times the sum of tanh(tanh_scale * value * length) over features (Conerly et al. 2025,
    "January update").
    """

    threshold: Tensor
    bandwidth: float
    weight: float
    k: int
    n_rows: int
    width: int
    tanh_scale: float | None
    lengths: Tensor | None

    @property
    def cut(self) -> Tensor:
        return self.threshold - self.bandwidth / 2

    def values(self, pre: Tensor, at: FeatureIndex) -> Tensor:
        return pre * (pre > self.threshold[at])

    def backward(self, pre: Tensor, values: Tensor, g: Tensor, g_second: Tensor | None, at: FeatureIndex) -> Backward:
        threshold, sums = self.threshold[at], {}
        if self.tanh_scale is not None:
            lengths = 1.0 if self.lengths is None else self.lengths[at]
            price = self._price * (1 - torch.tanh(self.tanh_scale * lengths * values).square()) * self.tanh_scale
            g = g + price * lengths
            if self.lengths is not None:
                sums["length"] = price * values
        near = ((pre - threshold).abs() < self.bandwidth / 2) / self.bandwidth
        sums |= {"threshold": -threshold * near * g, "near": near}
        return g * (pre > threshold), sums

    def penalty(self, pre: Tensor, values: Tensor, at: FeatureIndex) -> Tensor:
        if self.tanh_scale is None:
            return values.new_zeros(())
        lengths = 1.0 if self.lengths is None else self.lengths[at]
        return torch.tanh(self.tanh_scale * lengths * values).sum()

    def penalty_loss(self, total: Number, n_active: Number) -> tuple[Number, Number]:
        if self.tanh_scale is None:
            off = (n_active / self.k - 1) ** 2
            return self.weight * off, off
        return self._price * total, total / self.n_rows

    @property
    def _price(self) -> float:
        return self.weight / (self.n_rows * self.width)

    def own_gradients(self, sums: FeatureSums, n_active: Number) -> tuple[Tensor, ...]:
        """Return the gradient of the logarithm of the thresholds."""
        gradient = sums["threshold"]
        if self.tanh_scale is None:
            gradient = gradient - 2 * self.weight * (n_active / self.k - 1) / self.k / self.n_rows * sums["near"]
        return (gradient * self.threshold,)


TrainingRule = Top | Relu | Gated | JumpReLU
