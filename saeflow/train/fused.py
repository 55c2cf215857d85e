"""Training steps by the kernels of `saeflow.sae.gpu`, and when the host looks at what they have done."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saeflow.activations.feed import Feed
from saeflow.recipe.settings import SAEConfig, TrainConfig
from saeflow.runtime.errors import UserError
from saeflow.sae.architectures import TRAITS
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.gpu.figures import StepOptions
from saeflow.sae.loss import StepInfo
from saeflow.sae.optimizer import bfloat16
from saeflow.sae.parameters import SAEParameters
from saeflow.sae.split import Split
from saeflow.train.kernel_steps import CountedSteps, RetriedSteps, StepBatch

if TYPE_CHECKING:
    from saeflow.sae.gpu.choice.chooser import EntriesAboveCut
    from saeflow.sae.gpu.fused import FusedStep

TOLERANCE = 1e-7
"""How far a weight of a feature that has long been silent may stay behind, in units of the learning rate."""


def suits(sae: SAEParameters, config: TrainConfig) -> bool:
    """True if the kernels can train the SAE where it is."""
    return takes(sae.config, config, sae.W_enc.device, sae.split)


def takes(sae: SAEConfig, config: TrainConfig, place: torch.device, split: Split) -> bool:
    """True if the kernels train such an SAE there: on a GPU with Triton, and not by pursuits.

    Weights in bfloat16 must be of the top-k family, as steps of others may fall to torch's operations (`kernel_steps`),
    and whole: the kernels round each row by its number among all.
    So must be what ranks share.
    """
    if not config.kernels or config.clip_norm is not None:
        return False
    if config.weights == "bfloat16" and (not sae.counts_k or split.features.n > 1):
        return False
    on_gpu = place.type == "cuda" and importlib.util.find_spec("triton") is not None
    return on_gpu and not TRAITS[sae.architecture].pursues and (sae.counts_k or split.ranks.n == 1)


def require_kernels(config: TrainConfig, place: torch.device) -> None:
    """Raise UserError, before any work, if a setting needs kernels of a GPU and nothing there can compile them."""
    if place.type == "cpu" or importlib.util.find_spec("triton") is not None:
        return
    for name, value in {"train.moments": config.moments, "train.weights": config.weights}.items():
        if value != "float32":
            raise UserError(
                f"{name} is {value}, which on a GPU needs Triton, but Triton is not installed.\n"
                f"Install it with `pip install triton`, set train.device to cpu, or leave {name} out."
            )


@dataclass(frozen=True)
class Fetched:
    """The figures of a step."""

    loss: float
    info: StepInfo
    step: int
    """Steps that were taken: fewer than asked for if a loss was not finite."""
    suspect: tuple[str, bool] | None
    """See `FeedBatch.suspect`; None if every loss was finite."""


class FusedTraining:
    """The steps of one training on a GPU. The host waits for the device only in `fetch`: but see `RetriedSteps`."""

    def __init__(self, sae: SparseAutoencoder, adam: torch.optim.Adam, config: TrainConfig, feed: Feed) -> None:
        from saeflow.sae.gpu.fused import FusedStep  # which imports triton

        if config.weights == "bfloat16":
            bfloat16.store_narrow(sae)
        lr, dtype = config.lr or 1e-3, sae.product_dtype or torch.float32

        def step(chooser: EntriesAboveCut | None = None) -> FusedStep:
            about = config.aux_weight, config.dead_after_tokens, TOLERANCE * lr, chooser
            return FusedStep(sae, adam, dtype, lr, *about)

        counts_k = sae.config.counts_k
        self._steps = CountedSteps(step()) if counts_k else RetriedSteps(sae, adam, config, step)
        n_dead = int((sae.tokens_since_fired >= config.dead_after_tokens).sum())
        self._n_dead = int(sae.split.features.total(n_dead))
        self._feed = feed

    def take(self, x: Tensor, target: Tensor | None, lr: float, k: int, by_token: bool, sparsity: float = 1.0) -> None:
        """Take a step on x (B, D), and for a transcoder its target (B, D_out), float32."""
        self._steps.take(StepBatch(x, target, StepOptions(lr, k, by_token, self._n_dead, sparsity)))

    def fetch(self) -> Fetched:
        """Wait for the last step, and return its figures."""
        found = self._steps.figures()
        self._n_dead = int(found["n_dead_after"])
        figures = found["unexplained"], found["auxiliary"], found["sparsity"], found["n_active"], int(found["n_dead"])
        info, step = StepInfo(*figures, torch.empty(0)), int(found["step"])
        suspect = None if found["alive"] > 0 else self._place(step, int(found["suspect"]))
        return Fetched(found["loss"], info, step, suspect)

    def _place(self, step: int, row: int) -> tuple[str, bool]:
        if row < 0:
            return f"{self._feed.locate(step, -1 - row)} is not finite", False
        return str(self._feed.locate(step, row)), True

    def settle(self) -> None:
        """Bring weights and Adam's moments to where the dense optimizer would have them."""
        self._steps.settle()
