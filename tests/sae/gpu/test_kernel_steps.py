"""Steps whose entries do not fit are taken again, with more room or by torch's operations, as if nothing had been."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from saeflow.recipe.settings import TrainConfig
from saeflow.sae.gpu.choice.chooser import EntriesAboveCut
from saeflow.sae.gpu.figures import StepOptions
from saeflow.sae.gpu.fused import FusedStep
from saeflow.train import kernel_steps
from saeflow.train.kernel_steps import RetriedSteps, StepBatch
from tests.sae.gpu.test_fused import AUX, LR, PLACE, Trained, batch, begun

JUMPRELU = {"architecture": "jumprelu", "first_threshold": 0.8, "bandwidth": 0.2}
NEVER = 10**9
"""Tokens after which a feature is dead. How many are dead is not told to these steps."""


class Watched(RetriedSteps):
    """Steps that note how much room kernels had each time they ran, or 0 where torch's operations took the step."""

    def __init__(self, trained: Trained) -> None:
        config = TrainConfig(lr=LR, aux_weight=AUX, dead_after_tokens=NEVER)
        super().__init__(trained.sae, trained.adam, config, self._make_step)
        self.rooms: list[int] = []

    def _make_step(self, chooser: EntriesAboveCut) -> FusedStep:
        rooms = self.rooms

        class Noting(FusedStep):
            def __call__(self, x: Tensor, target: Tensor | None, options: StepOptions) -> None:
                rooms.append(chooser.room)
                super().__call__(x, target, options)

        return Noting(self.sae, self.adam, torch.float32, LR, AUX, NEVER, 1e-9, chooser)

    def _take_by_torch(self, batch: StepBatch) -> None:
        self.rooms.append(0)
        super()._take_by_torch(batch)

    def take_all(self, batches: list[Tensor]) -> None:
        for number, x in enumerate(batches):
            options = StepOptions(LR * (1 + number), self.sae.config.k, False, 0, 1 / (1 + number))
            self.take(StepBatch(x.to(PLACE), None, options))


def after_steps_of_processor(batches: list[Tensor], changes: dict[str, object]) -> Trained:
    trained = begun(**changes)
    for number, x in enumerate(batches):
        for group in trained.adam.param_groups:
            group["lr"] = LR * (1 + number)
        trained.step_of_processor(x, None, False, 1 / (1 + number), NEVER)
    return trained


def assert_alike(here: Trained, there: Trained) -> None:
    for name, value in there.sae.state_dict().items():
        torch.testing.assert_close(here.sae.state_dict()[name].cpu(), value, rtol=1e-5, atol=1e-6)
    for mine, its in zip(here.moments(), there.moments(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def test_steps_that_do_not_fit_get_more_room_or_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_steps, "MOST_SHARE", 0.3)
    monkeypatch.setattr(kernel_steps, "_LEAST_ROOM", 8)
    batches = [batch(number) * (4 if number == 3 else 1) for number in range(6)]
    here, there = begun(PLACE, **JUMPRELU), after_steps_of_processor(batches, JUMPRELU)
    steps = Watched(here)
    steps.take_all(batches)
    found = steps.figures()
    steps.settle()
    assert (found["step"], found["alive"]) == (6, 1)
    assert steps.rooms == [16] * 5 + [64] * 4 + [0] + [32] * 2  # batch 2 asks for 24 places, batch 3 for too many
    assert_alike(here, there)


def test_room_that_is_too_large_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_steps, "MOST_SHARE", 1.0)
    monkeypatch.setattr(kernel_steps, "_LEAST_ROOM", 8)
    monkeypatch.setattr(kernel_steps, "share_above_cut", lambda sae, x: 0.5)
    batches = [batch(number) for number in range(4)]
    here = begun(PLACE, **JUMPRELU)
    steps = Watched(here)
    steps.take_all(batches)
    steps.settle()
    assert steps.rooms == [220, 220, 220, 32]
    assert_alike(here, after_steps_of_processor(batches, JUMPRELU))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # by NumPy, in which the interpreter multiplies
@pytest.mark.parametrize("most", [0.3, 0.0], ids=["kernels", "torch"])
def test_a_batch_with_nan_and_those_after_it_change_nothing(most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_steps, "MOST_SHARE", most)
    monkeypatch.setattr(kernel_steps, "_LEAST_ROOM", 8)
    batches = [batch(number) for number in range(4)]
    batches[2][5, 1] = torch.nan  # all pre-activations of the row then count as above the cut: they do not fit
    here = begun(PLACE, **JUMPRELU)
    steps = Watched(here)
    steps.take_all(batches)
    found = steps.figures()
    steps.settle()
    assert (found["alive"], found["suspect"], found["step"]) == (0, -1 - 5, 2)
    assert bool(steps.rooms[-1]) == bool(most)
    assert_alike(here, after_steps_of_processor(batches[:2], JUMPRELU))
