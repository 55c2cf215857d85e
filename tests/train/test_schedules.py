"""What changes in the course of a training: learning rate, penalty and k, as functions of the step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.recipe.recipe import parse_recipe
from saeflow.recipe.settings import SAEConfig, TrainConfig
from saeflow.runtime.errors import UserError
from saeflow.train import schedules
from tests.support.small_pipeline import brought_data

SHARE = st.floats(0, 0.5)
N_STEPS = st.integers(1, 400)


def rates_of(n_steps: int, config: TrainConfig) -> np.ndarray:
    return np.array([schedules.learning_rate(step, n_steps, config) for step in range(n_steps)]) / config.lr


@given(n_steps=N_STEPS, warmup=SHARE, decay=SHARE, lr=st.floats(1e-6, 1.0))
def test_the_learning_rate_rises_stays_and_falls_in_straight_lines(n_steps, warmup, decay, lr):
    rates = rates_of(n_steps, TrainConfig(lr=lr, warmup_share=warmup, decay_share=decay))
    n_up, n_down = max(1, int(np.ceil(warmup * n_steps))), int(np.ceil(decay * n_steps))
    steps = np.arange(n_steps)
    wanted = np.minimum((steps + 1) / n_up, 1)
    if n_down:
        wanted = np.minimum(wanted, (n_steps - steps) / n_down)
    np.testing.assert_allclose(rates, wanted, rtol=1e-12)
    assert (rates > 0).all()


@given(n_steps=N_STEPS, warmup=SHARE, decay=SHARE)
def test_a_cosine_falls_over_the_same_steps_and_meets_the_line_at_half_way(n_steps, warmup, decay):
    line, cosine = (
        rates_of(n_steps, TrainConfig(lr=1.0, warmup_share=warmup, decay_share=decay, decay=kind))
        for kind in ("linear", "cosine")
    )
    falls = line < 1
    falls[: int(np.ceil(warmup * n_steps))] = False
    np.testing.assert_allclose(cosine[falls], (1 - np.cos(np.pi * line[falls])) / 2, rtol=1e-12)
    np.testing.assert_array_equal(cosine[~falls] == 1, line[~falls] == 1)
    assert (cosine > 0).all()


@pytest.mark.parametrize(
    ("width", "n_steps", "architecture", "rate"),
    [
        (256, 100, "topk", 4e-3),
        (256, 400, "batchtopk", 4e-3),
        (256, 1600, "matryoshka", 2e-3),
        (1024, 400, "jumprelu", 2e-3),
        (16, 400, "topk", 8e-3),
        (256, 100_000, "topk", 1e-3),
        (4096, 400, "topk", 1e-3),
        (256, 100, "relu", 1e-3),
        (256, 100, "gated", 1e-3),
    ],
)
def test_a_rate_that_nobody_named_suits_width_and_length(width, n_steps, architecture, rate):
    about = {"sae": {"architecture": architecture}, "train": {"n_tokens": 512 * n_steps}, "feed": {"batch_rows": 512}}
    recipe = parse_recipe(brought_data("t.npy", **about))
    assert schedules.with_rate(recipe, width).lr == pytest.approx(rate)
    named = recipe.model_copy(update={"train": recipe.train.model_copy(update={"lr": 0.5})})
    assert schedules.with_rate(named, width) == named.train


def test_the_learning_rate_at_named_steps():
    config = TrainConfig(lr=1.0, warmup_share=0.1, decay_share=0.2)
    rates = [schedules.learning_rate(step, 100, config) for step in (0, 4, 9, 10, 79, 80, 81, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 1, 1, 0.95, 0.05])
    cosine = config.model_copy(update={"decay": "cosine"})
    assert [schedules.learning_rate(step, 100, cosine) for step in (0, 50, 85, 90, 95)] == pytest.approx(
        [0.1, 1, 0.8535534, 0.5, 0.1464466]
    )


@given(n_steps=N_STEPS, share=SHARE)
def test_the_penalty_rises_in_a_straight_line_to_all_of_it(n_steps, share):
    config = TrainConfig(sparsity_warmup_share=share)
    factors = np.array([schedules.sparsity_factor(step, n_steps, config) for step in range(n_steps)])
    n_up = max(1, int(np.ceil(share * n_steps)))
    np.testing.assert_allclose(factors[:n_up], np.arange(1, n_up + 1) / n_up, rtol=1e-12)
    assert (factors[n_up:] == 1).all()


@given(n_steps=N_STEPS, k=st.integers(1, 64), more=st.integers(0, 64), share=SHARE)
def test_k_falls_step_by_step_from_its_start_to_what_the_sae_has(n_steps, k, more, share):
    sae, config = SAEConfig(k=k, n_features=128), TrainConfig(k_start=k + more, k_anneal_share=share)
    found = np.array([schedules.active_features(step, n_steps, sae, config) for step in range(n_steps)])
    n_down = max(1, int(np.ceil(share * n_steps)))
    assert found[0] == k + more
    assert (found[n_down:] == k).all()
    assert (np.diff(found) <= 0).all()
    straight = k + more * (1 - np.arange(min(n_down, n_steps)) / n_down)
    assert np.abs(found[:n_down] - straight).max() <= 0.5 + 1e-9


@given(n_steps=N_STEPS, share=st.floats(0, 0.999))
def test_tokens_choose_by_themselves_for_a_share_of_the_steps_but_never_in_the_last(n_steps, share):
    config = TrainConfig(token_topk_share=share)
    found = [schedules.chooses_by_token(step, n_steps, config) for step in range(n_steps)]
    n_first = int(share * n_steps)
    assert found == [True] * n_first + [False] * (n_steps - n_first)
    assert not found[-1]


@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu"])
def test_k_stays_where_it_is_not_counted_or_no_start_is_given(architecture):
    sae, config = SAEConfig(architecture=architecture, k=5), TrainConfig(k_start=50)
    assert {schedules.active_features(step, 20, sae, config) for step in range(20)} == {5}
    assert {schedules.active_features(step, 20, SAEConfig(k=7), TrainConfig()) for step in range(20)} == {7}


@pytest.mark.parametrize("k_start", [3, 65])
def test_a_start_of_k_below_its_end_or_beyond_the_dictionary_is_refused(tmp_path, k_start):
    with pytest.raises(UserError) as caught:
        parse_recipe(brought_data(tmp_path / "t.npy", train={"k_start": k_start}))
    assert str(caught.value) == (
        f"recipe: train.k_start is {k_start}, but it must lie between sae.k (4), to which it falls, and "
        "sae.n_features (64).\n"
        "Set train.k_start to at least 4 and at most 64."
    )
    parse_recipe(brought_data(tmp_path / "t.npy", train={"k_start": k_start}, sae={"architecture": "relu"}))
