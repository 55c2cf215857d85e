"""A whole step by kernels gives what the processor's step and torch's Adam give."""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from saeflow.recipe.settings import SAEConfig, TrainConfig
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.gpu.choice.chooser import EntriesAboveCut, LargestEntries
from saeflow.sae.gpu.figures import FIGURES, StepOptions
from saeflow.sae.gpu.fused import FusedStep
from saeflow.sae.optimizer import bfloat16
from saeflow.sae.optimizer.adam import optimizer_of
from saeflow.sae.split import WHOLE, Split
from tests.sae.gpu import PLACE
from tests.sae.gpu.questions import Idle, NoQuestions

B, D, F, K = 10, 9, 22, 3
LR, DEAD_AFTER, AUX = 1e-2, 30, 1 / 32


class Trained(NamedTuple):
    sae: SparseAutoencoder
    adam: torch.optim.Adam

    def step_of_processor(
        self, x: Tensor, target: Tensor | None, by_token: bool, sparsity: float, dead_after: int = DEAD_AFTER
    ) -> list[float]:
        loss, info = self.sae.training_loss(x, AUX, dead_after, target=target, by_token=by_token, sparsity=sparsity)
        loss.backward()
        self.adam.step()
        self.sae.after_step()
        self.adam.zero_grad(set_to_none=True)
        return [loss.item(), info.unexplained, info.auxiliary, info.sparsity, info.n_active, info.n_dead]

    def moments(self) -> list[Tensor]:
        return [state[name].cpu() for state in self.adam.state.values() for name in ("exp_avg", "exp_avg_sq")]


def begun(place: str = "cpu", split: Split = WHOLE, **changes: object) -> Trained:
    config = SAEConfig.model_validate({"architecture": "topk", "n_features": F, "k": K, "seed": 3, **changes})
    sae = SparseAutoencoder(config, D, 7 if config.target_site else None, split=split)
    sae.product_dtype = torch.float32
    sae.to(place)
    return Trained(sae, torch.optim.Adam(sae.parameters(), lr=LR, fused=True))


def batch(number: int, width: int = D) -> Tensor:
    made = torch.Generator().manual_seed(number)
    directions = torch.nn.functional.normalize(
        torch.randn(14, width, generator=torch.Generator().manual_seed(5)), dim=1
    )
    strengths = torch.rand(B, 14, generator=made) * (torch.rand(B, 14, generator=made) < 0.15)
    return 3 * strengths @ directions + 0.05 * torch.randn(B, width, generator=made)


def fused(trained: Trained) -> FusedStep:
    chooser = LargestEntries() if trained.sae.config.counts_k else EntriesAboveCut(B * F)
    return FusedStep(trained.sae, trained.adam, torch.float32, LR, AUX, DEAD_AFTER, 1e-9, chooser)


def options(trained: Trained, by_token: bool, sparsity: float = 1.0) -> StepOptions:
    n_dead = int((trained.sae.tokens_since_fired >= DEAD_AFTER).sum())
    return StepOptions(LR, trained.sae.config.k, by_token or trained.sae.traits.chooses_by_token, n_dead, sparsity)


RELU, GATED = {"architecture": "relu", "l1_weight": 0.3}, {"architecture": "gated", "l1_weight": 0.3}
JUMPRELU = {"architecture": "jumprelu", "first_threshold": 0.4, "bandwidth": 0.6}
FREE = {"unit_norm": False, "l1_norm_weighted": True}

CASES = {
    "topk": {}, "magnitudes": {"architecture": "abstopk"}, "of the batch": {"architecture": "batchtopk"},
    "nested": {"architecture": "matryoshka"}, "one of each token": {"k": 1},
    "a transcoder": {"target_site": "there"}, "free lengths": {"unit_norm": False},
    "a bias that stays": {"decoder_bias": "fixed"},
    "relu": RELU, "gated": GATED, "jumprelu": JUMPRELU, "jumprelu, by tanh": JUMPRELU | {"penalty": "tanh"},
}  # fmt: skip
MORE_CASES = {
    "relu, free lengths": RELU | FREE, "relu, a transcoder": RELU | {"target_site": "there"},
    "gated, free lengths": GATED | FREE, "gated, a transcoder": GATED | {"target_site": "there"},
    "jumprelu, by tanh, free lengths": JUMPRELU | {"penalty": "tanh", "unit_norm": False},
    "jumprelu, a transcoder": JUMPRELU | {"target_site": "there"},
    "jumprelu, nothing active": JUMPRELU | {"first_threshold": 50.0},
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param(changes, id=name) for name, changes in CASES.items()),
        *(pytest.param(changes, id=name, marks=pytest.mark.long) for name, changes in MORE_CASES.items()),
    ],
)
def test_steps_equal_those_of_the_processor_and_of_adam(changes: dict[str, object]) -> None:
    there, here = begun(**changes), begun(PLACE, **changes)
    step = fused(here)
    for number in range(6):
        x = batch(number)
        target = batch(number, 7) if "target_site" in changes else None
        about = number == 2, (number + 1) / 6
        step(x.to(PLACE), None if target is None else target.to(PLACE), options(here, *about))
        expected = there.step_of_processor(x, target, *about)
        found = dict(zip(FIGURES, step.figures.tolist(), strict=True))
        names = "loss", "unexplained", "auxiliary", "sparsity", "n_active", "n_dead"
        assert [found[name] for name in names] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert (found["alive"], found["fits"], found["step"]) == (1, 1, number + 1)
    step.settle()
    for name, value in there.sae.state_dict().items():
        torch.testing.assert_close(here.sae.state_dict()[name].cpu(), value, rtol=1e-5, atol=1e-6)
    for mine, its in zip(here.moments(), there.moments(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def test_the_product_reads_the_weights_themselves_where_their_width_suits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.sae.gpu.test_fused.D", 64)
    there, here = begun(), begun(PLACE)
    step = fused(here)
    assert step.w_low.data_ptr() == here.sae.W_enc.data_ptr()
    for number in range(2):
        x = batch(number, 64)
        step(x.to(PLACE), None, options(here, True))
        there.step_of_processor(x, None, True, 1.0)
    torch.testing.assert_close(here.sae.W_enc.cpu(), there.sae.W_enc, rtol=1e-5, atol=1e-6)


KERNELS = [
    "choice.choose.select_kernel", "choice.search.descend_kernel", "decode.decode_kernel",
    "rows.adam.adam_vector_kernel", "rows.by_feature.sum_by_feature_kernel", "rows.update.sum_segments_kernel",
    "rows.update.update_rows_kernel",
]  # fmt: skip


@pytest.mark.parametrize("changes", (CASES | MORE_CASES).values(), ids=CASES | MORE_CASES)
def test_a_step_asks_the_device_for_no_number(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    trained = begun(PLACE, **changes)
    step, about = fused(trained), dataclasses.replace(options(trained, False), n_dead=5)
    target = batch(1, 7).to(PLACE) if "target_site" in changes else None
    monkeypatch.setattr("saeflow.sae.gpu.choice.product.Product.launch", lambda *arguments: None)
    for name in KERNELS:
        monkeypatch.setattr(f"saeflow.sae.gpu.{name}", Idle())
    with NoQuestions():
        step(batch(0).to(PLACE), target, about)
        step(batch(1).to(PLACE), target, about)


@pytest.mark.parametrize(
    ("settings", "n_bytes"),
    [({}, 13), ({"moments": "8bit"}, 7 + 1 / 32), ({"weights": "bfloat16"}, 10),
     ({"moments": "8bit", "weights": "bfloat16"}, 4 + 1 / 32)],
)  # fmt: skip
def test_a_training_keeps_as_many_bytes_for_each_number_of_its_matrices_as_the_docs_say(
    settings: dict[str, str], n_bytes: float
) -> None:
    config = TrainConfig.model_validate(settings)
    sae = SparseAutoencoder(SAEConfig(architecture="topk", n_features=F, k=K), 512).to(PLACE)
    adam = optimizer_of(sae, config)
    if config.weights == "bfloat16":
        bfloat16.store_narrow(sae)
    step = FusedStep(sae, adam, torch.bfloat16, LR, AUX, DEAD_AFTER)
    matrices = sae.W_enc, sae.W_dec
    kept = [each for matrix in matrices for each in (matrix, *adam.state[matrix].values()) if each.dim() == 2]
    room = {each.data_ptr(): each.nbytes for each in [*kept, step.w_low]}
    assert sum(room.values()) == n_bytes * 2 * sae.W_enc.numel()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # by NumPy, in which the interpreter multiplies
def test_from_a_batch_with_nan_on_nothing_changes_and_its_row_is_named() -> None:
    trained = begun(PLACE)
    step = fused(trained)
    step(batch(0).to(PLACE), None, options(trained, False))
    before = copy.deepcopy(trained.sae.state_dict())
    moments = [each.clone() for each in trained.moments()]
    bad = batch(1)
    bad[4, 2] = torch.nan
    for x in (bad, batch(2)):
        step(x.to(PLACE), None, options(trained, False))
    found = dict(zip(FIGURES, step.figures.tolist(), strict=True))
    assert (found["alive"], found["suspect"], int(step.clock.step)) == (0, -1 - 4, 1)
    assert all(torch.equal(value, before[name]) for name, value in trained.sae.state_dict().items())
    assert all(map(torch.equal, trained.moments(), moments))


def test_a_step_begun_from_kept_state_goes_on_as_if_nothing_had_been() -> None:
    whole, cut = begun(PLACE), begun(PLACE)
    one, first = fused(whole), fused(cut)
    for number in range(5):
        if number == 3:
            first.settle()
            first = fused(cut)
        for step, trained in ((one, whole), (first, cut)):
            step(batch(number).to(PLACE), None, options(trained, False))
    for name, value in whole.sae.state_dict().items():
        torch.testing.assert_close(cut.sae.state_dict()[name], value, rtol=1e-6, atol=1e-7)
