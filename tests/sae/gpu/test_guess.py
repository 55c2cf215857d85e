"""Guesses from the batch before are seldom wrong, and a first batch has one too."""

import pytest
import torch

pytest.importorskip("triton")

from saeflow.sae.gpu.choice import guess
from saeflow.sae.gpu.choice.choose import largest_of_batch, largest_of_rows
from tests.sae.gpu.dense import Shape, a_product, product_of, sizes

F, D, K = 4096, 128, 16


def batches(n_rows: int, spread: float, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return two batches with some directions much stronger than others and lengths that differ, and weights."""
    made = torch.Generator().manual_seed(seed)
    strengths = torch.exp(torch.randn(D, generator=made) * 0.7)
    mixed = [torch.randn(n_rows, D, generator=made) * strengths for _ in range(2)]
    lengths = [torch.exp(torch.randn(n_rows, 1, generator=made) * spread) for _ in range(2)]
    weights = torch.randn(F, D, generator=made) / D**0.5
    return [x * length for x, length in zip(mixed, lengths, strict=True)], weights


def sorted_sizes(low: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (low @ weights.T).sort(dim=1, descending=True).values


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.5])
def test_few_rows_are_searched_anew_whatever_their_lengths(spread):
    (before, now), weights = batches(2048, spread)
    ratio = guess.next_ratio(sorted_sizes(before, weights)[:, K - 1], guess.lengths(before))
    above = (sorted_sizes(now, weights) > (ratio * guess.lengths(now))[:, None]).sum(1)
    assert (above < K).float().mean() < 0.01
    assert (above > 16 * K).float().mean() < 0.01


def test_a_first_guess_from_a_few_rows_serves_nearly_all():
    (low, _), weights = batches(2048, 0.5)
    product = product_of(low, weights, torch.zeros(F))
    ratio = guess.first_ratio(product, K).cpu()
    above = (sorted_sizes(low, weights) > (ratio * guess.lengths(low))[:, None]).sum(1)
    assert ((above < K) | (above > 16 * K)).float().mean() < 0.1


def test_rows_of_zeros_do_not_count():
    kth, lengths = torch.tensor([0.0, 3.0, 2.0]), torch.tensor([0.0, 1.0, 1.0])
    assert guess.next_ratio(kth, lengths).tolist() == pytest.approx([2 * guess.MARGIN])
    assert guess.next_ratio(kth * 0, lengths).tolist() == [0.0]


def test_the_choice_says_how_many_guesses_were_wrong():
    product, k = a_product(Shape(30, 100, 30), 4), 3
    kth = sizes(product).sort(dim=1, descending=True).values[:, k - 1].float()
    factor = torch.tensor([0.95, 0.3, 1.05]).repeat(10)
    above = (sizes(product) > (factor * kth)[:, None]).sum(1)
    assert (above < k).sum() == 10
    assert (above > 8).sum() > 5
    choice = largest_of_rows(product, k, (factor * kth).to(product.low.device), 8)
    assert choice.n_wrong == ((above < k) | (above > 8)).sum()


def test_a_batchs_guess_serves_for_the_next_one():
    (before, now), weights = batches(40, 0.5)
    first, second = (product_of(low, weights[:128], torch.zeros(128)) for low in (before, now))
    n = 40 * 4
    start = guess.first_of_batch(first, n)
    assert n < (sizes(first) > start.item()).sum() < 3 * n
    choice = largest_of_batch(first, n, start, 3 * n)
    following = largest_of_batch(second, n, choice.kth * guess.BATCH_MARGIN, 3 * n)
    assert [int(choice.n_wrong), int(following.n_wrong)] == [0, 0]
