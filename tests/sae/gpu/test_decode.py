"""Reconstructions from active entries, against products of whole matrices in float64."""

import pytest
import torch

pytest.importorskip("triton")

from saeflow.sae.gpu.decode import decode_rows, room_for_residuals
from tests.sae.gpu.entries import nested_losses, random_entries


@pytest.mark.parametrize(
    ("n_rows", "n_features", "d_out", "share", "ends"),
    [
        (7, 29, 13, 0.3, [29]),
        (5, 11, 700, 0.2, [11]),
        (3, 21, 5, 1.0, [21]),
        (6, 40, 33, 0.05, [1, 7, 7, 40]),
        (4, 17, 520, 0.4, [3, 9, 17]),
        (2, 9, 3, 1e-9, [4, 9]),
    ],
    ids=[
        "ragged",
        "two pieces of columns",
        "all features",
        "one in twenty, nested",
        "nested, two pieces",
        "no entries",
    ],
)
def test_residuals_losses_and_derivatives_are_those_of_the_dense_formula(n_rows, n_features, d_out, share, ends):
    generator = torch.Generator().manual_seed(n_rows)
    entries = random_entries(n_rows, n_features, share, generator)
    w_dec, target = (torch.randn(n, d_out, generator=generator) for n in (n_features, n_rows))
    residual, losses = room_for_residuals(len(ends), target)
    low, g = torch.empty_like(residual, dtype=torch.bfloat16), torch.full_like(entries.values, -7)
    sizes = torch.tensor(ends, dtype=torch.int32)
    decode_rows(*entries[:3], w_dec, target, sizes, residual, losses, g, low)

    dense = entries.dense.requires_grad_()
    wanted, wanted_losses = nested_losses(dense, w_dec.double(), target.double(), ends)
    (wanted_losses.sum() / 2).backward()
    torch.testing.assert_close(losses.double(), wanted_losses, atol=1e-5, rtol=1e-5)
    summed = wanted.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(residual.double(), summed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(low, residual.bfloat16())
    n_entries = int(entries.row_starts[-1])
    torch.testing.assert_close(g[:n_entries].double(), dense.grad[dense > 0], atol=1e-5, rtol=1e-5)
    assert (g[n_entries:] == -7).all()


def test_a_decoder_in_bfloat16_is_read_as_it_is():
    generator = torch.Generator().manual_seed(4)
    entries = random_entries(3, 6, 0.5, generator)
    w_dec, target = torch.randn(6, 10, generator=generator).bfloat16(), torch.randn(3, 10, generator=generator)
    residual, losses = room_for_residuals(1, target)
    ends = torch.tensor([6], dtype=torch.int32)
    decode_rows(*entries[:3], w_dec, target, ends, residual, losses, torch.empty_like(entries.values))
    wanted, _ = nested_losses(entries.dense, w_dec.double(), target.double(), [6])
    torch.testing.assert_close(residual.double(), wanted, atol=1e-5, rtol=1e-5)
