"""What is chosen from the tiles of a product is exact, whatever was guessed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from saeflow.sae.encoder import Encoder
from saeflow.sae.gpu.choice import guess
from saeflow.sae.gpu.choice.choose import Choice, above_cut, largest_of_batch, largest_of_rows
from saeflow.sae.step import entries_above_cut, largest_entries
from tests.sae.gpu import PLACE
from tests.sae.gpu.dense import (
    Shape,
    a_product,
    exact,
    few_examples,
    largest,
    largest_of_all,
    product_of,
    sizes,
    spread,
)
from tests.sae.gpu.questions import Idle, NoQuestions

SHAPES = st.builds(Shape, st.integers(1, 90), st.integers(10, 150), st.integers(1, 20))
SEEDS = st.integers(0, 99)
GUESSES = [0.0, 0.5, 1.0, 1.5, 1e30, float("inf")]
"""Guesses as factors of the k-th size: too low, right, too high."""


def guesses(n: int, seed: int, kth: torch.Tensor) -> torch.Tensor:
    drawn = torch.randint(0, len(GUESSES), (n,), generator=torch.Generator().manual_seed(seed))
    return torch.nan_to_num(torch.tensor(GUESSES)[drawn] * kth.float().clamp(min=1e-3)).to(PLACE)


def kth_of(size: torch.Tensor, chosen: torch.Tensor, k: int) -> torch.Tensor:
    """Return each row's smallest chosen size; 0 where fewer than k are chosen."""
    smallest = torch.where(chosen, size, torch.inf).amin(1)
    return torch.where(chosen.sum(1) == k, smallest, 0)


def check(choice: Choice, size: torch.Tensor, pre: torch.Tensor, wanted: torch.Tensor) -> None:
    """Check what was chosen of whole numbers, which have no rounding."""
    chosen, values = spread(choice.entries, size.shape[1])
    assert torch.equal(chosen, wanted)
    assert torch.equal(values, torch.where(wanted, pre, 0))


@few_examples
@given(shape=SHAPES, seed=SEEDS, k=st.integers(1, 5), signed=st.booleans(), whole=st.integers(1, 3))
def test_each_rows_largest_entries_are_chosen_whatever_was_guessed(shape, seed, k, signed, whole):
    product = a_product(shape, seed, signed=signed, whole=whole)
    size = sizes(product)
    wanted = largest(size, k)
    kth = kth_of(size, wanted, k)
    choice = largest_of_rows(product, k, guesses(shape.n_rows, seed, kth), 8)
    check(choice, size, exact(product), wanted)
    assert torch.equal(choice.kth.cpu().double(), kth)


@few_examples
@given(shape=SHAPES, seed=SEEDS, k=st.integers(1, 4), room=st.integers(0, 40), whole=st.integers(1, 3))
def test_the_largest_entries_of_a_batch_are_chosen_whatever_was_guessed(shape, seed, k, room, whole):
    product = a_product(shape, seed, whole=whole)
    size, n = sizes(product), k * shape.n_rows
    wanted = largest_of_all(size, n)
    kth = kth_of(size.reshape(1, -1), wanted.reshape(1, -1), n)
    choice = largest_of_batch(product, n, guesses(1, seed, kth), n + room)
    check(choice, size, exact(product), wanted)
    assert torch.equal(choice.kth.cpu().double(), kth)


@pytest.mark.parametrize(("dtype", "signed"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("factor", [0.0, 0.9, 2.0])
def test_entries_that_rounding_cannot_confuse_are_chosen_as_in_float64(dtype, signed, factor):
    product = a_product(Shape(70, 131, 37), 3, dtype, signed)
    size, pre, k = sizes(product), exact(product), 4
    ordered = size.sort(dim=1, descending=True).values
    clear = (ordered[:, k - 1] - ordered[:, k]) > 1e-5 * ordered[:, 0]
    wanted = largest(size, k)
    choice = largest_of_rows(product, k, factor * ordered[:, k - 1].float().to(PLACE), 16)
    chosen, values = spread(choice.entries, 131)
    assert clear.sum() > 60
    assert torch.equal(chosen[clear], wanted[clear])
    torch.testing.assert_close(values, torch.where(chosen, pre, 0), rtol=1e-5, atol=1e-5)
    assert (choice.n_wrong > 0) == (factor != 0.9)


def test_values_have_the_same_bits_whatever_was_guessed():
    product = a_product(Shape(40, 90, 30))
    kth = sizes(product).sort(dim=1, descending=True).values[:, 3].float().to(PLACE)
    right, low, high = (largest_of_rows(product, 4, factor * kth, 16) for factor in (0.9, 0.0, 2.0))
    assert [int(choice.n_wrong) for choice in (right, low, high)] == [0, 40, 40]
    for other in (low, high):
        assert all(torch.equal(a, b) for a, b in zip(right.entries, other.entries, strict=True))


def test_more_equal_entries_than_the_buffer_holds_give_the_lower_rows_and_features():
    ones = torch.ones(20, 3), torch.ones(70, 3), torch.zeros(70)
    for signed, sign in ((False, 1), (True, -1)):
        choice = largest_of_rows(product_of(sign * ones[0], *ones[1:], signed), 3, torch.zeros(20, device=PLACE), 4)
        assert choice.entries.ids.view(20, 3).cpu().tolist() == [[0, 1, 2]] * 20
        assert choice.entries.values.unique().tolist() == [3.0 * sign]
    choice = largest_of_batch(product_of(*ones), 80, torch.ones(1, device=PLACE), 90)
    assert choice.entries.row_starts.tolist() == [0, 70, *[80] * 19]
    assert choice.entries.ids.tolist() == [*range(70), *range(10)]


def test_zeros_and_negative_numbers_are_never_chosen():
    low = torch.tensor([[1.0], [0.0], [-1.0]])
    product = product_of(low, torch.tensor([[1.0], [-1.0], [0.0], [2.0]]), torch.zeros(4))
    rows = largest_of_rows(product, 3, torch.ones(3, device=PLACE), 4)
    assert rows.entries.row_starts.tolist() == [0, 2, 2, 3]
    assert rows.entries.ids.tolist() == [0, 3, 1, 0, 0, 0, 0, 0, 0]
    assert rows.entries.values.tolist() == [1.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert rows.kth.tolist() == [0.0, 0.0, 0.0]
    batch = largest_of_batch(product, 5, torch.ones(1, device=PLACE), 8)
    assert batch.entries.row_starts.tolist() == [0, 2, 2, 3]
    assert batch.entries.ids.tolist() == [0, 3, 1, 0, 0]


@pytest.mark.parametrize("kind", ["topk", "abstopk", "batch"])
def test_the_choice_is_that_of_the_processor(kind):
    product, k = a_product(Shape(70, 200, 24), 1, signed=kind == "abstopk"), 4
    low, w_low, bias = product.low.cpu(), product.w_low.cpu(), product.bias.cpu()
    encoder = Encoder(w_low, bias, torch.zeros(24), torch.float32)
    wanted, _ = largest_entries(low, encoder, k, kind != "batch", 0.0, True, kind == "abstopk")
    if kind == "batch":
        entries = largest_of_batch(product, k * 70, guess.first_of_batch(product, k * 70), 3 * k * 70).entries
    else:
        ratio = guess.first_ratio(product, k)
        entries = largest_of_rows(product, k, ratio * guess.lengths(product.low), 32).entries
    assert torch.equal(entries.row_starts.cpu().long(), wanted.row_starts)
    assert torch.equal(entries.ids.cpu(), wanted.feature_ids)
    torch.testing.assert_close(entries.values.cpu(), wanted.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_cut", [False, True])
def test_all_entries_above_the_cut_are_those_of_the_processor(has_cut):
    product = a_product(Shape(40, 70, 24), 2)
    low, w_low, bias = product.low.cpu(), product.w_low.cpu(), product.bias.cpu()
    cut = torch.rand(70) * 4 if has_cut else None
    wanted = entries_above_cut(low, Encoder(w_low, bias, torch.zeros(24), torch.float32, cut), True)
    less = bias if cut is None else bias - cut
    n = len(wanted.values)
    for room in (n, n - 1):
        entries, n_found = above_cut(product_of(low, w_low, less), None if cut is None else cut.to(PLACE), room)
        assert int(n_found) == n
        if room >= n:
            assert torch.equal(entries.row_starts.cpu().long(), wanted.row_starts)
            assert torch.equal(entries.ids[:n].cpu(), wanted.feature_ids)
            torch.testing.assert_close(entries.values[:n].cpu(), wanted.values, rtol=1e-5, atol=1e-5)


def test_the_device_is_asked_for_no_number(monkeypatch):
    product = a_product(Shape(20, 64, 8))
    monkeypatch.setattr("saeflow.sae.gpu.choice.product.Product.launch", lambda *arguments: None)
    for name in ("choose.select_kernel", "search.descend_kernel"):
        monkeypatch.setattr(f"saeflow.sae.gpu.choice.{name}", Idle())
    with NoQuestions():
        kth = largest_of_rows(product, 4, torch.zeros(20, device=PLACE), 16).kth
        guess.next_ratio(kth, guess.lengths(product.low))
        largest_of_batch(product, 80, guess.first_of_batch(product, 80), 240)
        above_cut(product, product.bias, 100)
        guess.first_ratio(product, 4)
