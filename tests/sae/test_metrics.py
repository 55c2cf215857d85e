"""The sums behind the figures of quality, in closed form and against a slow obvious version, to nine digits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.activations.sparse_values import SparseValues
from saeflow.sae.metrics import Firing, Predictions, Reconstruction, WithoutLongest, density_histogram, ratio, recovered

WIDTH, N_ENTRIES = 12, 50


def vectors(seed: int = 0, n: int = 64, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


X = vectors()


def summed(x: torch.Tensor, reconstruction: torch.Tensor, cuts: tuple[int, ...] = ()) -> Reconstruction:
    sums = Reconstruction(WIDTH)
    edges = [0, *cuts, len(x)]
    for start, stop in itertools.pairwise(edges):
        sums.add(x[start:stop], reconstruction[start:stop])
    return sums


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
def test_predicting_the_mean_leaves_all_the_variance_unexplained(offset):
    x = vectors(offset=offset)
    assert summed(x, x.mean(0).expand_as(x)).variance_unexplained == pytest.approx(1, abs=1e-9)


def test_a_perfect_reconstruction_leaves_nothing_and_shrinks_nothing():
    sums = summed(X, X)
    assert sums.variance_unexplained == 0
    assert sums.shrinkage == pytest.approx(1, abs=1e-12)


def test_predicting_zero_is_worse_than_the_mean_by_the_means_own_length():
    x = vectors(offset=3.0)
    spread, length = (x - x.mean(0)).square().sum(), 64 * x.mean(0).square().sum()
    found = summed(x, torch.zeros_like(x)).variance_unexplained
    assert found == pytest.approx(1 + (length / spread).item(), rel=1e-12)


@settings(deadline=None)
@given(st.integers(3, 2500), st.lists(st.integers(1, 2499), max_size=5), st.integers(0, 5), st.integers(0, 99))
def test_what_is_left_without_the_longest_tokens_does_not_depend_on_how_they_come(n, cuts, n_massive, seed):
    x, there = vectors(seed, n), vectors(seed + 1, n)
    massive = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:n_massive]
    x[massive] *= 1e4
    found = WithoutLongest(WIDTH, 2500)
    for start, stop in itertools.pairwise([0, *sorted(cut for cut in cuts if cut < n), n]):
        found.add(x[start:stop], there[start:stop])
    lengths = x.square().sum(1).sqrt()
    longest = sorted(range(n), key=lambda i: -lengths[i])[: math.ceil(n / 1000)]
    kept = torch.ones(n, dtype=torch.bool)
    kept[longest] = False
    assert found.figures["variance_unexplained_without_longest"] == pytest.approx(
        summed(x[kept], there[kept]).variance_unexplained, rel=1e-9
    )
    share = lengths[longest].square().sum() / lengths.square().sum()
    assert found.figures["longest_share"] == pytest.approx(share.item(), rel=1e-9)


def test_an_sae_that_fits_only_massive_tokens_looks_good_until_they_are_left_out():
    x = vectors(n=5000).float()
    x[[7, 8, 9, 4000, 4999]] *= 1e4
    there = torch.where(x.norm(dim=1, keepdim=True) > 1e3, x, 0)
    found = WithoutLongest(WIDTH, 5000)
    found.add(x, there)
    assert summed(x, there).variance_unexplained < 1e-4
    assert found.figures["variance_unexplained_without_longest"] == pytest.approx(1, abs=0.01)
    assert found.figures["longest_share"] > 0.999


@pytest.mark.parametrize("factor", [0.5, 1.0, 0.25, 3.0, -2.0])
def test_reconstructions_a_factor_too_long_shrink_by_that_factor(factor):
    assert summed(X, factor * X).shrinkage == pytest.approx(factor, abs=1e-12)


def test_shrinkage_is_the_factor_whose_division_brings_reconstructions_closest():
    reconstruction = 0.7 * X + 0.3 * vectors(seed=1)
    factor = summed(X, reconstruction).shrinkage
    at = torch.tensor(factor, dtype=torch.float64, requires_grad=True)
    (reconstruction / at - X).square().sum().backward()
    assert at.grad.item() == pytest.approx(0, abs=1e-9)
    distance = [(reconstruction / near - X).square().sum() for near in (factor * 0.99, factor, factor * 1.01)]
    assert distance[1] == min(distance)


def test_sums_are_those_of_whole_arrays():
    y = X + 0.1 * vectors(seed=2)
    sums = summed(X, y, (10, 11))
    assert sums.n_tokens == 64
    assert sums.variance_unexplained == pytest.approx(
        ((X - y).square().sum() / (X - X.mean(0)).square().sum()).item(), rel=1e-12
    )
    assert sums.mean_squared_error == pytest.approx((X - y).square().mean().item(), rel=1e-12)
    torch.testing.assert_close(sums.mean, X.mean(0), rtol=1e-12, atol=1e-15)


@given(cuts=st.lists(st.integers(0, 64), max_size=6).map(sorted), offset=st.sampled_from([0.0, 50.0, 1e4]))
def test_how_tokens_come_in_batches_does_not_matter(cuts, offset):
    x, y = vectors(offset=offset), vectors(offset=offset) + 0.1 * vectors(seed=3)
    whole, cut = summed(x, y), summed(x, y, tuple(cuts))
    for name in ("variance_unexplained", "shrinkage", "mean_squared_error", "n_tokens"):
        assert getattr(cut, name) == pytest.approx(getattr(whole, name), rel=1e-9), name


def sparse(rows: list[list[int]]) -> SparseValues:
    """Tokens with these features, each of value 1."""
    ids = np.concatenate([np.empty(0), *rows]).astype(np.int32)
    return SparseValues(np.cumsum([0, *map(len, rows)]), ids, np.ones(len(ids), np.float32))


def test_firing_counts_tokens_by_feature():
    firing = Firing(5)
    for rows in ([[0, 1], [], [1]], [], [[1, 4]]):
        firing.add(sparse(rows))
    assert firing.n_firing.tolist() == [1, 3, 0, 0, 1]
    assert (firing.n_tokens, firing.l0, firing.silent) == (4, 5 / 4, 2)


def test_features_are_counted_by_half_decades_of_the_share_of_tokens_they_fire_on():
    n_firing = np.array([0, 0, 1, 3, 4, 10, 31, 32, 99, 100, 316, 317, 999, 1000])
    assert density_histogram(n_firing, 1000) == {
        "log10_from": [-3.0, -2.5, -2.0, -1.5, -1.0, -0.5],
        "n_features": [2, 1, 2, 2, 2, 3],
        "n_never": 2,
    }


@given(
    n_firing=st.lists(st.integers(0, 10**9), min_size=1, max_size=50),
    more=st.sampled_from([0, 1, 10**9]),
)
def test_every_feature_is_in_its_bin_or_has_never_fired(n_firing, more):
    n_tokens = max(n_firing) + more
    found = density_histogram(np.array(n_firing), n_tokens)
    assert sum(found["n_features"]) + found["n_never"] == len(n_firing)
    assert found["n_never"] == n_firing.count(0)
    logs = [math.log10(n / n_tokens) for n in n_firing if n]
    for start, n_features in zip(found["log10_from"], found["n_features"], strict=True):
        last = start == -0.5
        near = [log for log in logs if start - 1e-12 <= log < start + 0.5 + (1e-12 if not last else 1)]
        clear = [log for log in logs if start + 1e-12 <= log < start + 0.5 - 1e-12]
        assert len(clear) <= n_features <= len(near)
    if logs:
        assert found["n_features"][0] > 0
        assert found["log10_from"][-1] == -0.5


def test_where_nothing_fires_there_is_no_bin():
    assert density_histogram(np.zeros(3, np.int64), 0) == {"log10_from": [], "n_features": [], "n_never": 3}


def logits(seed: int, n: int = 30, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (4 * torch.randn(n, N_ENTRIES, generator=torch.Generator().manual_seed(seed))).to(dtype)


ROWS = torch.tensor([0, 1, 2, 5, 6, 11, 29])
FOLLOWING = torch.tensor([3, 0, 49, 7, 7, 8, 1])


def obvious(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Loss of b, and KL(a ‖ b), one logit at a time."""
    loss = kl = 0.0
    for row, follows in zip(ROWS.tolist(), FOLLOWING.tolist(), strict=True):
        p, q = ([math.exp(v) for v in each[row].double().tolist()] for each in (a, b))
        p, q = ([v / math.fsum(each) for v in each] for each in (p, q))
        loss -= math.log(q[follows])
        kl += math.fsum(v * math.log(v / w) for v, w in zip(p, q, strict=True))
    return loss, kl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_at_once", [1, 2 * N_ENTRIES, 1 << 18])
def test_loss_and_divergence_are_those_of_float64_arithmetic(dtype, n_at_once):
    a, b = logits(0, dtype=dtype), logits(1, dtype=dtype)
    unchanged = Predictions(a, ROWS, FOLLOWING, n_at_once)
    assert unchanged.loss == pytest.approx(obvious(a, a)[0], rel=1e-12)
    assert unchanged.beside(b) == pytest.approx(obvious(a, b), rel=1e-12)


def test_a_small_divergence_keeps_its_digits():
    a = logits(0)
    b = a + 1e-3 * logits(1)
    assert Predictions(a, ROWS, FOLLOWING).beside(b)[1] == pytest.approx(obvious(a, b)[1], rel=1e-9)


def test_what_does_not_change_has_the_same_loss_and_no_divergence():
    unchanged = Predictions(logits(0), ROWS, FOLLOWING)
    assert unchanged.beside(logits(0)) == (unchanged.loss, 0.0)


def test_a_shift_of_all_logits_is_no_change():
    unchanged = Predictions(logits(0), ROWS, FOLLOWING)
    assert unchanged.beside(logits(0).double() + 300) == pytest.approx((unchanged.loss, 0.0), abs=1e-10)


def test_an_entry_that_is_ruled_out_counts_for_nothing():
    a, b = logits(0), logits(1)
    unchanged = Predictions(a[:, :-1], ROWS, FOLLOWING.clamp(max=48)).beside(b[:, :-1])
    a[:, -1] = b[:, -1] = -math.inf
    assert Predictions(a, ROWS, FOLLOWING.clamp(max=48)).beside(b) == pytest.approx(unchanged, rel=1e-12)


def test_logits_that_are_no_numbers_are_not_passed_over():
    a = logits(0)
    a[5, 3] = math.nan
    assert math.isnan(Predictions(logits(0), ROWS, FOLLOWING).beside(a)[1])


def test_no_predicted_token_has_no_loss():
    none = Predictions(logits(0), ROWS[:0], FOLLOWING[:0])
    assert (none.loss, *none.beside(logits(1))) == (0, 0, 0)


@pytest.mark.parametrize(("spliced", "share"), [(2.0, 1.0), (5.0, 0.0), (3.5, 0.5), (6.5, -0.5), (1.7, 1.1)])
def test_what_is_recovered_is_the_share_of_what_ablation_costs(spliced, share):
    assert recovered(2.0, spliced, 5.0) == pytest.approx(share)


def test_a_share_of_nothing_is_infinite():
    assert (ratio(1, 0), ratio(-1, 0)) == (math.inf, -math.inf)
