import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.sae import kernels
from saeflow.sae.exact import chosen_entries

DTYPES = [torch.bfloat16, torch.float32]
numbers = st.sampled_from([-3.0, -1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0, 1.0078125, 2.0, 40.0])


def rows_of(data, n_rows, width):
    flat = data.draw(st.lists(numbers, min_size=n_rows * width, max_size=n_rows * width))
    return torch.tensor(flat).view(n_rows, width)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None)  # the first call compiles
@given(data=st.data(), n_rows=st.integers(1, 3), width=st.integers(1, 70), k=st.integers(1, 12))
def test_the_top_entries_are_those_of_a_stable_sort(dtype, data, n_rows, width, k):
    rows = rows_of(data, n_rows, width)
    starts, ids, bits = chosen_entries(kernels.bits_of(rows.to(dtype)), kernels.select_top, k)
    for r, row in enumerate(rows):
        wanted = row.sort(descending=True, stable=True).indices[:k]
        wanted = wanted[row[wanted] > 0].sort().values
        mine = slice(starts[r], starts[r + 1])
        np.testing.assert_array_equal(ids[mine], wanted)
        np.testing.assert_array_equal(kernels.floats_of(bits[mine]), row[wanted])


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None)  # the first call compiles
@given(data=st.data(), n_rows=st.integers(1, 3), width=st.integers(1, 70), cut=st.floats(-4, 4))
def test_no_entry_above_a_cut_is_missed_and_none_well_below_is_taken(dtype, data, n_rows, width, cut):
    rows = rows_of(data, n_rows, width)
    cuts = kernels.cut_bits(np.full(n_rows, cut), dtype)
    starts, ids, bits = chosen_entries(kernels.bits_of(rows.to(dtype)), kernels.select_above, cuts)
    taken = np.zeros(rows.shape, bool)
    taken[np.repeat(np.arange(n_rows), np.diff(starts)), ids] = True
    assert taken[rows.numpy() > cut].all()
    assert not taken[rows.numpy() < cut - 0.01 * abs(cut) - 1e-30].any()
    np.testing.assert_array_equal(kernels.floats_of(bits), rows.numpy()[taken])


def test_many_columns_are_searched_whatever_their_number():
    generator = torch.Generator().manual_seed(0)
    for width in (127, 128, 129, 1000, 4096):
        rows = torch.rand(5, width, generator=generator)
        for k in (1, 32, 100):
            _, ids, _ = chosen_entries(kernels.bits_of(rows), kernels.select_top, k)
            np.testing.assert_array_equal(ids.reshape(5, -1), rows.topk(k).indices.sort().values)
