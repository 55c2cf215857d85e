"""Trainings whose steps the kernels take: their log, their checkpoints, and what a batch that is not finite leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from saeflow.recipe.settings import TrainConfig
from saeflow.runtime.errors import UserError
from saeflow.sae.optimizer import bfloat16
from saeflow.sae.optimizer.adam import optimizer_of
from saeflow.train import kernel_steps
from saeflow.train.training import FeedBatch, Training
from tests.sae.gpu.test_fused import CASES, PLACE, batch, begun

N_STEPS = 8
ABOVE_CUT = ["relu", "gated", "jumprelu", "jumprelu, by tanh"]


class Rows:
    """What a training asks of a feed."""

    def locate(self, number: int, row: int) -> str:
        return f"batch {number}, row {row}"


@pytest.fixture(autouse=True)
def _kernels_take_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so few features, a large share is active."""
    monkeypatch.setattr(kernel_steps, "MOST_SHARE", 2.0)


def a_training(
    uses_fused: bool, log_every: int = 1, kind: str = "topk", n_steps: int = N_STEPS, resample_at: float | None = None,
    **settings: Any,
) -> Training:  # fmt: skip
    """Return one that looks at every step, so that the auxiliary loss knows which features are dead."""
    sae, _ = begun(PLACE if uses_fused else "cpu", **CASES[kind])
    config = TrainConfig(
        lr=1e-2, log_every=log_every, dead_after_tokens=30, checkpoint_seconds=1, sparsity_warmup_share=0.5,
        resample_at=[] if resample_at is None else [resample_at], **settings,
    )  # fmt: skip
    if config.weights == "bfloat16":
        bfloat16.round_to_nearest(sae)
    training = Training(sae, optimizer_of(sae, config), config, (1.0,), n_steps, name="small")
    training.uses_fused = uses_fused
    return training


def steps(training: Training, until: int, bad: int | None = None) -> None:
    feed: Any = Rows()
    while training.step < until:
        values = batch(training.step)
        if training.step == bad:
            values[6, 1] = torch.inf
        training.advance(FeedBatch(training.step, (values,), feed))


def assert_alike(here: Training, there: Training, tolerance: float) -> None:
    """Check the rows of the log, relative to their size, and the weights."""
    assert [row["step"] for row in here.log] == list(range(there.n_steps))
    for mine, its in zip(here.log, there.log, strict=True):
        assert mine == pytest.approx(its, rel=tolerance, abs=tolerance)
    for name, value in there.sae.state_dict().items():
        torch.testing.assert_close(here.sae.state_dict()[name].cpu(), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["topk", *(pytest.param(kind, marks=pytest.mark.long) for kind in ABOVE_CUT)])
def test_a_training_by_kernels_logs_what_the_processor_logs_and_ends_alike(kind: str) -> None:
    here, there = (a_training(uses_fused, kind=kind) for uses_fused in (True, False))
    for training in (here, there):
        steps(training, N_STEPS)
    here.settle()
    assert_alike(here, there, 1e-5)


@pytest.mark.parametrize("kind", ["topk", pytest.param("jumprelu", marks=pytest.mark.long)])
def test_dead_features_start_again_where_the_processor_starts_them(kind: str) -> None:
    here, there = (a_training(uses_fused, kind=kind, resample_at=0.5) for uses_fused in (True, False))
    for training in (here, there):
        steps(training, N_STEPS)
    here.settle()
    assert [row["dead"] > 0 for row in there.log[4:6]] == [True, False]
    assert_alike(here, there, 1e-5)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["topk", "magnitudes", "of the batch", "nested", *ABOVE_CUT])
def test_200_steps_end_as_on_the_processor(kind: str) -> None:
    """Two trainings of the processor whose first weights differ by a rounding part as far: losses by up to 1e-6 of
    their size, weights by up to 1e-6. Rounding adds up, but what a step pulls together stays together; and at these
    seeds no two entries are so near that rounding could swap them. Ten times that is allowed."""
    here, there = (a_training(uses_fused, kind=kind, n_steps=200, resample_at=0.5) for uses_fused in (True, False))
    for training in (here, there):
        steps(training, 200)
    here.settle()
    assert_alike(here, there, 1e-5)


@pytest.mark.parametrize("kind", ["topk", pytest.param("jumprelu", marks=pytest.mark.long)])
def test_a_checkpoint_of_kernels_goes_on_on_the_processor_and_the_other_way_round(kind: str, tmp_path: Path) -> None:
    whole = a_training(False, kind=kind)
    steps(whole, N_STEPS)
    for first in (True, False):
        cut = a_training(first, kind=kind)
        steps(cut, 4)
        cut.save(tmp_path / "kept")
        other = a_training(not first, kind=kind)
        assert other.restore(tmp_path / "kept")
        steps(other, N_STEPS)
        other.settle()
        for name, value in whole.sae.state_dict().items():
            torch.testing.assert_close(other.sae.state_dict()[name].cpu(), value, rtol=1e-4, atol=1e-5)


LOW = [{"moments": "8bit"}, {"weights": "bfloat16"}, {"moments": "8bit", "weights": "bfloat16", "resample_at": 0.5}]


@pytest.mark.long
@pytest.mark.parametrize("settings", LOW, ids=["8bit", "bfloat16", "both"])
def test_moments_in_8_bits_and_weights_in_bfloat16_are_the_processors_and_go_on_there(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """But where a number lies between two codes, or between two numbers of bfloat16, an order of sums may decide."""
    here, there = a_training(True, **settings), a_training(False, **settings)
    here.sae.product_dtype = torch.float32
    for training in (here, there):
        steps(training, 4)
    here.save(tmp_path / "kept")
    resumed = a_training(False, **settings)
    assert resumed.restore(tmp_path / "kept")
    for training in (here, there, resumed):
        steps(training, N_STEPS)
    n_apart = n_all = 0
    for name, value in there.folded().state_dict().items():
        for mine in (here.folded(), resumed.folded()):
            assert mine.state_dict()[name].dtype == value.dtype
            apart = (mine.state_dict()[name] - value).abs()
            assert apart.max() < 2e-2
            n_apart, n_all = n_apart + int((apart > 1e-5).sum()), n_all + apart.numel()
    assert n_apart < 0.02 * n_all


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # by NumPy, in which the interpreter multiplies
def test_a_batch_that_is_not_finite_is_named_at_the_next_look_and_what_is_kept_is_before_it(tmp_path: Path) -> None:
    training, before = a_training(True, log_every=3), a_training(True, log_every=3)
    with pytest.raises(UserError, match=r"at step 4\. The activation at batch 4, row 6 is not finite"):
        steps(training, N_STEPS, bad=4)
    assert training.step == 4
    training.save(tmp_path / "kept")
    steps(before, 4)
    before.settle()
    again = a_training(True)
    assert again.restore(tmp_path / "kept")
    assert again.step == 4
    for name, value in before.sae.state_dict().items():
        torch.testing.assert_close(again.sae.state_dict()[name], value, rtol=1e-6, atol=1e-7)
