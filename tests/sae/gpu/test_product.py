"""The encoder product in tiles: what is found in them is what a dense product in float64 has."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from saeflow.sae.gpu.choice.product import Candidates, Floor, Product, RowList, add_histograms, collect, last_place
from tests.sae.gpu import PLACE
from tests.sae.gpu.dense import Shape, a_product, exact, few_examples, product_of, sizes

SHAPES = st.builds(Shape, st.integers(1, 200), st.integers(1, 150), st.integers(1, 40))


def rows_of(*numbers: int, n_rows: int) -> RowList:
    listed = torch.tensor([*numbers, *[0] * (n_rows - len(numbers))], dtype=torch.int32, device=PLACE)
    return RowList(listed, torch.tensor([len(numbers)], dtype=torch.int32, device=PLACE))


def floor_of(size: torch.Tensor, tie: torch.Tensor | None = None) -> Floor:
    """Return the floor that entries of at least this size reach."""
    bits = size.float().to(PLACE).view(torch.int32)
    return Floor(bits, torch.zeros_like(bits, dtype=torch.int64) if tie is None else tie.to(PLACE))


def found(product: Product, candidates: Candidates) -> torch.Tensor:
    """Return the candidates' values (B, F); zero elsewhere."""
    values = torch.zeros(product.n_rows, product.n_features)
    for number, n in enumerate(candidates.counts.tolist()):
        kept = slice(min(n, candidates.capacity))
        rows = number if candidates.rows is None else candidates.rows[number, kept].long().cpu()
        values[rows, candidates.ids[number, kept].long().cpu()] = candidates.values[number, kept].cpu()
    return values.double()


@few_examples
@given(
    shape=SHAPES, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    signed=st.booleans(), by_row=st.booleans(),
)  # fmt: skip
def test_all_entries_above_the_floor_are_found_with_their_values(shape, seed, dtype, signed, by_row):
    product = a_product(shape, seed, dtype, signed)
    wanted, size = exact(product), sizes(product)
    least = torch.rand(shape.n_rows if by_row else 1) * 2
    candidates = Candidates.room_for(product, by_row, 256 if by_row else 200 * 256)
    collect(product, rows_of(*range(shape.n_rows), n_rows=shape.n_rows), floor_of(least), False, candidates)
    values = found(product, candidates)
    assert candidates.counts.sum() == (values != 0).sum()
    torch.testing.assert_close(values, torch.where(values != 0, wanted, 0), rtol=1e-5, atol=1e-5)
    clear = (size - least[:, None]).abs() > 1e-5
    assert torch.equal((values != 0)[clear], (size > least[:, None])[clear])


def test_a_full_buffer_counts_what_it_does_not_hold():
    product = a_product(Shape(40, 150, 20))
    candidates = Candidates.room_for(product, True, 8)
    collect(product, rows_of(*range(40), n_rows=40), floor_of(torch.full((40,), 1e-3)), False, candidates)
    wanted, values = exact(product), found(product, candidates)
    assert torch.equal(candidates.counts.cpu().long(), (wanted > 1e-3).sum(1))
    assert ((values != 0).sum(1) == candidates.counts.cpu().clamp(max=8)).all()
    torch.testing.assert_close(values, torch.where(values != 0, wanted, 0), rtol=1e-5, atol=1e-5)


def test_only_listed_rows_are_searched():
    product = a_product(Shape(40, 100, 20))
    candidates = Candidates.room_for(product, True, 128)
    collect(product, rows_of(7, 39, 2, n_rows=40), floor_of(torch.zeros(40)), False, candidates)
    assert candidates.counts.nonzero().flatten().tolist() == [2, 7, 39]
    assert (candidates.counts[[2, 7, 39]].cpu() == (exact(product) > 0).sum(1)[[2, 7, 39]]).all()


@pytest.mark.parametrize("group", [1, 3])
def test_every_tile_is_searched_once_in_groups_of_any_height(group, monkeypatch):
    monkeypatch.setattr("saeflow.sae.gpu.choice.product.GROUP", group)
    product = a_product(Shape(300, 200, 20))
    candidates, size = Candidates.room_for(product, True, 256), exact(product)
    least = size.sort(dim=1, descending=True).values[:, 2] * 0.999
    collect(product, rows_of(*range(300), n_rows=300), floor_of(least), False, candidates)
    assert torch.equal(found(product, candidates) != 0, size > least[:, None])
    assert torch.equal(candidates.counts.cpu().long(), (size > least[:, None]).sum(1))


@pytest.mark.parametrize("by_row", [True, False])
def test_of_entries_of_the_floors_size_only_the_first_ones_are_found(by_row):
    product = a_product(Shape(40, 100, 5), whole=2)
    size, last = exact(product), last_place(product, by_row)
    states = 40 if by_row else 1
    furthest = torch.randint(0, 100 if by_row else 4000, (states,), generator=torch.Generator().manual_seed(1))
    floor = floor_of(torch.full((states,), 6.0), last - furthest)
    candidates = Candidates.room_for(product, by_row, 128 if by_row else 4096)
    collect(product, rows_of(*range(40), n_rows=40), floor, True, candidates)
    place = torch.arange(100) + (0 if by_row else torch.arange(40)[:, None] * 100)
    wanted = (size > 6) | ((size == 6) & (place <= furthest[:, None]))
    assert (size == 6).sum() > 100
    assert torch.equal(found(product, candidates), torch.where(wanted, size, 0))


def test_histograms_count_digits_of_sizes_and_places_below_the_floors_higher_digits():
    product = a_product(Shape(40, 100, 5), whole=2, signed=True)
    size, by_row = sizes(product).float(), True
    bits, listed = size.view(torch.int32), rows_of(3, 38, n_rows=40)
    floor = floor_of(torch.full((40,), 6.0))
    histograms = torch.zeros(40, 2048, dtype=torch.int32, device=PLACE)
    add_histograms(product, listed, Floor(floor.bits * 0, floor.tie), (20, 31), False, histograms, by_row)
    for row in (3, 38):
        digits = (bits[row][size[row] > 0] >> 20).long()
        assert torch.equal(histograms[row].cpu().long(), torch.bincount(digits, minlength=2048))
    histograms.zero_()
    add_histograms(product, listed, floor, (0, 7), True, histograms, by_row)
    for row in (3, 38):
        distances = 127 - (size[row] == 6).nonzero().flatten()
        assert len(distances) > 2
        assert torch.equal(histograms[row].cpu().long(), torch.bincount(distances, minlength=2048))
    assert histograms.count_nonzero() == (size[[3, 38]] == 6).sum()


def test_not_a_number_is_found_so_that_the_loss_shows_it():
    low = torch.ones(2, 3)
    low[1] = torch.nan
    product = product_of(low, torch.ones(4, 3), torch.zeros(4))
    candidates = Candidates.room_for(product, True, 4)
    collect(product, rows_of(0, 1, n_rows=2), floor_of(torch.full((2,), 5.0)), False, candidates)
    assert candidates.counts.tolist() == [0, 4]
    assert candidates.values[1].isnan().all()
