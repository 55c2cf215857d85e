"""Scores against known features: hand-made cases with known answers, and slow obvious versions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from saeflow.activations import synthetic
from saeflow.activations.sparse_values import SparseValues, values_above_zero
from saeflow.activations.synthetic import GroundTruth, truth_of
from saeflow.recipe.recipe import load_recipe
from saeflow.recipe.settings import SAEConfig
from saeflow.recipe.synthetic import SyntheticConfig
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.recovery import RecoveryScores, best_cosines, match_directions, score_directions, score_recovery

N, WIDTH = 8, 12


def orthogonal(n: int = N, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0][:n].astype(np.float32)


def made_truth(rates: np.ndarray, noise: float = 0.0, n_rows: int = 400) -> GroundTruth:
    """Orthogonal directions, each firing by itself, of strength 1 to 2."""
    directions = orthogonal(len(rates))

    def fresh() -> Iterator[tuple[np.ndarray, SparseValues]]:
        for number in itertools.count():
            dice = np.random.default_rng(number)
            strengths = (dice.random((n_rows, len(rates))) < rates) * dice.uniform(1, 2, (n_rows, len(rates)))
            rows = strengths @ directions + noise * dice.normal(size=(n_rows, WIDTH))
            yield rows.astype(np.float32), values_above_zero(strengths.astype(np.float32))

    return GroundTruth(directions, rates, noise, fresh)


RATES = np.array([0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.05, 0.05])
TRUTH = made_truth(RATES)


def sparse_of(values: Tensor) -> SparseValues:
    codes = values_above_zero(values.numpy())
    return SparseValues(codes.row_starts, codes.feature_ids.astype(np.int32), codes.values)


def judged(
    w_dec: Tensor, threshold: float = 0.5, truth: GroundTruth = TRUTH, n_tokens: int = 10**6, **changes
) -> RecoveryScores:
    """Of the dictionary that codes with its own directions, scaled to unit length; what is below a threshold is cut."""
    units = torch.nn.functional.normalize(w_dec, dim=1)

    def encode(x: Tensor) -> SparseValues:
        values = x @ units.T
        return sparse_of(torch.where(values > threshold, values, 0))

    def decode(sparse: SparseValues) -> Tensor:
        values = torch.zeros(len(sparse.row_starts) - 1, len(units))
        values[np.repeat(np.arange(len(values)), np.diff(sparse.row_starts)), sparse.feature_ids] = torch.from_numpy(
            sparse.values
        )
        return values @ units

    return score_directions(w_dec, encode, decode, truth, n_tokens, **{"n_rows": 4000} | changes)


def shares(found: RecoveryScores) -> list[float]:
    return [found.mean_max_cosine, found.found_share, found.found_share_frequent, found.precision, found.mcc, found.f1,
            found.f1_weighted]  # fmt: skip


DIRECTIONS = torch.from_numpy(TRUTH.directions)


@pytest.mark.parametrize(
    "dictionary",
    [DIRECTIONS, DIRECTIONS.flip(0), DIRECTIONS * torch.linspace(0.1, 9, N)[:, None]],
    ids=["the same", "another order", "other lengths"],
)
def test_the_true_dictionary_scores_one_everywhere(dictionary):
    found = judged(dictionary)
    assert shares(found) == pytest.approx([1] * 7, abs=1e-6)
    assert (found.n_true, found.n_frequent, found.n_live) == (N, N, N)
    assert found.variance_unexplained == pytest.approx(0, abs=1e-9)
    assert found.l0 == found.true_l0 == pytest.approx(RATES.sum(), rel=0.05)


def test_directions_that_point_the_other_way_are_not_the_features():
    found = judged(torch.cat([-DIRECTIONS[:4], DIRECTIONS[4:]]))
    assert found.n_live == 4
    assert found.found_share == found.mcc == found.f1 == 0.5


def test_half_of_the_dictionary_finds_half_of_the_features():
    found = judged(DIRECTIONS[:4])
    assert (found.found_share, found.precision, found.n_live) == (0.5, 1, 4)
    assert found.mean_max_cosine == pytest.approx(0.5, abs=1e-6)
    assert found.mcc == pytest.approx(0.5, abs=1e-6)
    assert found.f1 == pytest.approx(0.5, abs=1e-6)
    assert found.f1_weighted == pytest.approx(RATES[:4].sum() / RATES.sum(), rel=0.02)
    assert 0 < found.variance_unexplained < 1


def test_what_never_fires_counts_nowhere():
    dead = -DIRECTIONS.sum(0, keepdim=True)
    found = judged(torch.cat([DIRECTIONS, dead]))
    assert shares(found) == pytest.approx([1] * 7, abs=1e-6)
    assert found.n_live == N


def test_live_features_that_are_none_of_the_true_ones_cost_precision_alone():
    mixture = DIRECTIONS[:1] + DIRECTIONS[1:2]
    found = judged(torch.cat([DIRECTIONS, mixture]))
    assert found.precision == pytest.approx(N / (N + 1))
    assert found.n_live == N + 1
    assert (found.found_share, found.mcc) == pytest.approx((1, 1), abs=1e-6)


def test_features_too_rare_in_training_are_not_asked_for():
    dictionary = DIRECTIONS[:6]
    found = judged(dictionary, n_tokens=10_000, min_fires=1000)
    assert found.n_frequent == 6
    assert (found.found_share, found.found_share_frequent) == (0.75, 1)
    assert found.f1 == pytest.approx(1, abs=1e-6)


def test_a_dictionary_in_which_nothing_fires_scores_nothing():
    found = judged(DIRECTIONS, threshold=100)
    assert shares(found) == [0] * 7
    assert (found.n_live, found.l0) == (0, 0)
    assert found.variance_unexplained > 1 - 1e-6  # nothing is predicted, not even the mean


def test_firing_is_judged_by_hits_false_alarms_and_misses():
    """Counted one by one. The threshold misses some firings; the mixture of two features fires for both."""
    dictionary = torch.cat([DIRECTIONS[:1] + DIRECTIONS[1:2], DIRECTIONS[2:]])
    found = judged(dictionary, threshold=1.2, n_rows=800)
    blocks = list(itertools.islice(TRUTH.fresh(), 2))
    truth = np.concatenate([dense(codes) for _, codes in blocks]) > 0
    x = torch.from_numpy(np.concatenate([rows for rows, _ in blocks]))
    fires = (x @ torch.nn.functional.normalize(dictionary, dim=1).T > 1.2).numpy()
    pairs = match_directions(DIRECTIONS, dictionary)
    each = []
    for feature, partner in enumerate(pairs):
        own = fires[:, partner] if partner >= 0 else np.zeros(len(x), bool)
        hits, alarms = (own & truth[:, feature]).sum(), (own & ~truth[:, feature]).sum()
        misses = (~own & truth[:, feature]).sum()
        each.append(2 * hits / (2 * hits + alarms + misses))
    assert sum(pairs < 0) == 1
    assert found.f1 == pytest.approx(np.mean(each))
    assert found.f1_weighted == pytest.approx(np.average(each, weights=truth.sum(0)))
    assert 0.3 < found.f1 < 0.9


def dense(codes: SparseValues) -> np.ndarray:
    values = np.zeros((len(codes.row_starts) - 1, N), np.float32)
    values[codes.rows, codes.feature_ids] = codes.values
    return values


@pytest.mark.parametrize("n_found", [3, 4, 6])
@pytest.mark.parametrize("seed", range(5))
def test_the_matching_is_the_best_of_all(n_found, seed):
    dice = np.random.default_rng(seed)
    true, found = (torch.from_numpy(dice.normal(size=(n, 3))) for n in (4, n_found))
    cosines = torch.nn.functional.cosine_similarity(true[:, None], found[None], dim=2).numpy()
    pairs = match_directions(true, found)
    some = pairs >= 0
    assert some.sum() == min(4, n_found)
    assert len(set(pairs[some])) == some.sum()
    if n_found >= 4:
        best = max(cosines[range(4), order].sum() for order in itertools.permutations(range(n_found), 4))
    else:
        best = max(cosines[order, range(3)].sum() for order in itertools.permutations(range(4), 3))
    assert cosines[np.flatnonzero(some), pairs[some]].sum() == pytest.approx(best)


def test_cosines_are_the_same_in_blocks_of_any_size():
    true, found = torch.randn(7, 5), torch.randn(11, 5)
    all_at_once = torch.nn.functional.cosine_similarity(true[:, None], found[None], dim=2)
    pairs = match_directions(true, found)
    of_true, of_found = best_cosines(true, found, block=3)
    np.testing.assert_allclose(of_true, all_at_once.max(1).values, rtol=1e-5)
    np.testing.assert_allclose(of_found, all_at_once.max(0).values, rtol=1e-5)
    np.testing.assert_array_equal(match_directions(true, found, block=3), pairs)


def test_the_noise_floor_is_what_the_true_features_leave_unexplained():
    truth = made_truth(RATES, noise=0.1)
    strengths = {rows.tobytes(): dense(codes) for rows, codes in itertools.islice(truth.fresh(), 10)}
    found = score_directions(
        DIRECTIONS,
        lambda x: sparse_of(torch.from_numpy(strengths[x.numpy().tobytes()])),
        lambda sparse: torch.from_numpy(dense(sparse)) @ DIRECTIONS,
        truth, 10**6, n_rows=4000,
    )  # fmt: skip
    assert found.variance_unexplained == pytest.approx(found.noise_floor, rel=0.03)
    assert shares(found) == pytest.approx([1] * 7, abs=1e-6)


def test_an_autoencoder_is_scored_through_its_own_encoding():
    config = SAEConfig(architecture="relu", n_features=N)
    sae = SparseAutoencoder(config, WIDTH)
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight.copy_(DIRECTIONS)
        sae.b_enc.fill_(-0.5)
    found = score_recovery(sae, TRUTH, 10**6, n_rows=4000)
    assert shares(found) == pytest.approx([1] * 7, abs=1e-6)
    assert found.n_live == N
    assert found == score_recovery(sae, TRUTH, 10**6, n_rows=4000)


def kind(name: str, **changes) -> SyntheticConfig:
    return SyntheticConfig.model_validate({"kind": name, "n_samples": 500, "n_neurons": 5, "n_true": 10} | changes)


@pytest.mark.parametrize(
    "config", [kind("sparse"), kind("superposition", n_neurons=3, density=0.1), kind("superposed", l0=2.0, noise=1e-6)],
    ids=lambda config: config.kind,
)  # fmt: skip
def test_every_kind_knows_its_directions_and_gives_rows_that_are_not_stored(config, monkeypatch):
    monkeypatch.setattr(synthetic, "_TOY_STEPS", synthetic._TOY_STEPS // 5)  # it is trained three times here
    truth = truth_of(config)
    np.testing.assert_allclose(np.linalg.norm(truth.directions, axis=1), 1, rtol=1e-5)
    blocks = list(itertools.islice(truth.fresh(), 2))
    offset = 0.0
    if config.kind == "superposed":
        offset = synthetic.SuperposedFeatures.of(config).offset
    counts = np.zeros(len(truth.directions))
    stored = set(map(bytes, stored_rows(config)))
    for rows, codes in blocks:
        values = np.zeros((len(rows), len(truth.directions)), np.float32)
        values[codes.rows, codes.feature_ids] = codes.values
        counts += (values > 0).sum(0)
        if len(truth.directions) == config.n_true:
            np.testing.assert_allclose(rows, values @ truth.directions + offset, atol=1e-5)
        assert stored.isdisjoint(map(bytes, rows))
    n_rows = sum(len(rows) for rows, _ in blocks)
    np.testing.assert_allclose(counts / n_rows, truth.rates, atol=5 * np.sqrt(0.25 / n_rows))
    again = next(truth_of(config).fresh())[0]
    np.testing.assert_array_equal(again, blocks[0][0])
    assert not (blocks[0][0][:50] == blocks[1][0][:50]).all(1).any()


def stored_rows(config: SyntheticConfig) -> np.ndarray:
    from saeflow.activations.synthetic import make_table

    return make_table(config).values


@pytest.mark.long
def test_features_that_the_toy_model_does_not_represent_are_not_asked_for():
    config = kind("superposition", n_neurons=2, n_true=12, density=0.3)
    lengths = np.linalg.norm(synthetic.toy_rows(config)[1], axis=1)
    assert len(truth_of(config).directions) == (lengths > 0.5).sum() < 12


def test_scores_are_plain_numbers():
    found = dataclasses.asdict(judged(DIRECTIONS))
    assert all(type(value) in (int, float) for value in found.values())


def test_a_peers_autoencoder_is_scored_as_our_own_is(tmp_path, monkeypatch):
    from tests.benchmarks import synth

    changes = synth.QUICK | {"activations.synthetic.n_samples": 4096, "train.n_tokens": 4096}
    recipe = load_recipe(synth.RECIPE, **changes)
    sae = SparseAutoencoder(SAEConfig(architecture="topk", n_features=1024, k=4), 64)
    scale = synth.write_rows(recipe, tmp_path / "rows.npy")
    trained_on = []

    def train(**about: Any) -> None:
        trained_on.append(np.load(about["data"]))
        about["save"].mkdir()
        tensors = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        save_file({name: tensor.detach() for name, tensor in tensors.items()}, about["save"] / "sae.safetensors")
        (about["save"] / "cfg.json").write_text('{"k": 4}')

    monkeypatch.setattr(synth._peers, "train", train)
    theirs = synth.peer_scores(recipe, "sparsify", "topk", tmp_path)
    with torch.no_grad():
        sae.W_enc *= scale
        sae.W_dec /= scale
        sae.b_dec /= scale
    truth = truth_of(recipe.activations.synthetic)
    ours = score_recovery(sae, truth, 4096)
    assert dataclasses.asdict(theirs) == pytest.approx(dataclasses.asdict(ours), rel=1e-5)
    assert np.square(trained_on[0] - trained_on[0].mean(0)).sum(1).mean() == pytest.approx(64, rel=0.05)
    assert ours.f1 < synth.linear_f1(truth, n_blocks=2) <= 1
