"""Steps by kernels, whose number of entries is known before (top-k family) or depends on data (relu, gated, jumprelu).

Kernels have room for so many entries. A step whose entries do not fit changes nothing, nor does any after it. The host
keeps the last batches until it has seen that their steps fitted; else it makes more room and takes them again. It looks
two steps back, so it waits for the device only if it is that far ahead. Beyond `MOST_SHARE` of all pre-activations
torch's operations take the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saeflow.recipe.settings import TrainConfig
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.gpu.figures import FIGURES, StepOptions
from saeflow.sae.gpu.guard import suspect
from saeflow.sae.loss import StepInfo, share_above_cut
from saeflow.sae.optimizer import bfloat16

if TYPE_CHECKING:
    from saeflow.sae.gpu.choice.chooser import EntriesAboveCut
    from saeflow.sae.gpu.fused import FusedStep

MOST_SHARE = 1 / 64
"""Share of pre-activations up to which kernels take a step. An entry costs them four passes over D numbers in memory;
in products of whole matrices, two hundred times less. So by the limits of an H100 these are quicker from 1/256 on, but
torch also writes some ten tensors of B x F numbers. Not measured."""

LOOK_BACK = 2
"""Steps that the host lets the device be behind."""

_LEAST_ROOM = 4096


@dataclass(frozen=True)
class StepBatch:
    """What a step takes: x (B, D), for a transcoder its target (B, D_out), float32 and on the device, and options."""

    x: Tensor
    target: Tensor | None
    options: StepOptions


class CountedSteps:
    """Steps whose number of entries is known before: those of the top-k family."""

    def __init__(self, step: FusedStep) -> None:
        self._step = step

    def take(self, batch: StepBatch) -> None:
        """Take a step."""
        self._step(batch.x, batch.target, batch.options)

    def figures(self) -> dict[str, float]:
        """Wait for the last step, and return its figures."""
        return dict(zip(FIGURES, self._step.figures.tolist(), strict=True))

    def settle(self) -> None:
        """Bring weights and Adam's moments to where the dense optimizer would have them."""
        self._step.settle()


class _Later:
    """Numbers on the device that the host reads later; it waits only if they are not there yet."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True, copy=True)  # into pinned memory, if it comes from a GPU
        self._arrived: Any = torch.get_device_module(numbers.device).Event()
        self._arrived.record()

    def read(self) -> dict[str, float]:
        self._arrived.synchronize()
        return dict(zip(FIGURES, self._numbers.tolist(), strict=True))


class RetriedSteps:
    """Steps whose number of entries depends on data: by kernels where they fit, else by torch's operations."""

    def __init__(
        self, sae: SparseAutoencoder, adam: torch.optim.Adam, config: TrainConfig,
        make_step: Callable[[EntriesAboveCut], FusedStep],
    ) -> None:  # fmt: skip
        self.sae, self.adam, self.config, self.make_step = sae, adam, config, make_step
        self._by_kernels: tuple[FusedStep, EntriesAboveCut] | None = None
        """The steps by kernels; None if a sample of the next batch has to say who takes its step."""
        self._waiting: list[tuple[StepBatch, _Later]] = []
        """Batches of steps by kernels that may have to be taken again."""
        self._found: dict[str, float] = {}
        """Figures of the last step that was looked at."""

    def take(self, batch: StepBatch) -> None:
        """Take a step; if a loss was not finite, do nothing."""
        if self._found.get("alive") == 0:
            return
        self._by_kernels = self._by_kernels or self._begun(batch.x)
        if self._by_kernels is None:
            self._take_by_torch(batch)
            return
        step, _ = self._by_kernels
        step(batch.x, batch.target, batch.options)
        self._waiting.append((batch, _Later(step.figures)))
        if len(self._waiting) > LOOK_BACK:
            self._look()

    def figures(self) -> dict[str, float]:
        """Wait for the last step, and return its figures, by the names of `FIGURES`."""
        while self._waiting:
            self._look()
        return self._found

    def settle(self) -> None:
        """Bring weights and Adam's moments to where the dense optimizer would have them."""
        self.figures()
        if self._by_kernels is not None:
            self._by_kernels[0].settle()

    def _begun(self, x: Tensor) -> tuple[FusedStep, EntriesAboveCut] | None:
        """Return steps by kernels if a sample of the batch has half of the entries that they may have at most."""
        from saeflow.sae.gpu.choice.chooser import EntriesAboveCut  # which imports triton

        n_all, share = len(x) * self.sae.config.n_features, share_above_cut(self.sae, x)
        if share > MOST_SHARE / 2:
            return None
        chooser = EntriesAboveCut(_room_for(share * n_all, MOST_SHARE * n_all))
        return self.make_step(chooser), chooser

    def _look(self) -> None:
        """Wait for the oldest step that waits, and let it go or take all again."""
        assert self._by_kernels is not None
        (step, chooser), (batch, later) = self._by_kernels, self._waiting[0]
        found = later.read()
        most = MOST_SHARE * len(batch.x) * self.sae.config.n_features
        room = _room_for(found["n_found"], most)
        if found["fits"] > 0:
            self._found = found
            del self._waiting[0]
            chooser.room = 2 * room if 4 * room <= chooser.room else chooser.room
        elif found["n_found"] <= most:
            chooser.room = room
            step.guard.fits.fill_(1)
            self._retake()
        else:
            step.settle()
            self._by_kernels = None
            self._retake(self._take_by_torch)

    def _retake(self, take_first: Callable[[StepBatch], None] | None = None) -> None:
        """Take all steps again that wait: they have changed nothing."""
        (first, *others), self._waiting = [batch for batch, _ in self._waiting], []
        (take_first or self.take)(first)
        for batch in others:
            self.take(batch)

    def _take_by_torch(self, batch: StepBatch) -> None:
        """Take a step by torch's operations and Adam; if the loss is not finite, change nothing."""
        options, dead_after = batch.options, self.config.dead_after_tokens
        for group in self.adam.param_groups:
            group["lr"] = options.lr
        loss, info = self.sae.training_loss(
            batch.x, self.config.aux_weight, dead_after, target=batch.target, k=options.k, sparsity=options.sparsity,
            by_token=options.by_token,
        )  # fmt: skip
        if math.isfinite(loss.item()):
            loss.backward()  # type: ignore[no-untyped-call]
            take_adam_step(self.sae, self.adam)
        self._found = self._figures(loss.item(), info, batch.x)

    def _figures(self, loss: float, info: StepInfo, x: Tensor) -> dict[str, float]:
        """Return the figures of a step by torch's operations that `fetch` reads."""
        state = self.adam.state.get(self.sae.W_dec, {})
        return {
            "loss": loss, "unexplained": info.unexplained, "auxiliary": info.auxiliary, "sparsity": info.sparsity,
            "n_active": info.n_active, "n_dead": info.n_dead, "alive": float(math.isfinite(loss)),
            "suspect": float(suspect(x)[0]), "step": int(state.get("step", 0)),
            "n_dead_after": int((self.sae.tokens_since_fired >= self.config.dead_after_tokens).sum()),
        }  # fmt: skip


def take_adam_step(sae: SparseAutoencoder, adam: torch.optim.Adam, rounded: int | None = None) -> None:
    """Take a step from the parameters' gradients, and drop these: of many trainings only one has any at a time.

    If the weights are in bfloat16, `rounded` is the number of the step, from 1 on.
    """
    adam.step()
    sae.after_step(in_bfloat16=rounded is not None)
    if rounded is not None:
        bfloat16.round_at_random(sae, rounded)
    adam.zero_grad(set_to_none=True)


def _room_for(n_entries: float, most: float) -> int:
    """Return room for half as many more entries, but for at most so many."""
    room = max(math.ceil(1.5 * n_entries), _LEAST_ROOM)
    return min(1 << (room - 1).bit_length(), math.ceil(most))
