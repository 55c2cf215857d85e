"""The 256 numbers of the paper, and the nearest of them."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from saeflow.sae.optimizer import codes


def test_the_map_has_the_numbers_of_the_paper():
    signed, unsigned = codes.quantisation_map(True), codes.quantisation_map(False)
    assert signed[127] == 0
    assert signed[-1] == unsigned[-1] == 1
    torch.testing.assert_close(signed[128], torch.tensor(0.55e-6))
    torch.testing.assert_close(signed[0], torch.tensor(-(1 - 0.45 / 64)))
    torch.testing.assert_close(unsigned[1:3], torch.tensor([0.325e-6, 0.775e-6]))


@pytest.mark.parametrize("signed", [True, False])
def test_all_numbers_of_a_pattern_of_upper_bits_have_the_least_code_or_the_next(signed):
    upper = torch.arange(0x3F80 + 1)  # up to 1.0
    upper = torch.cat([upper, upper | 0x8000]) if signed else upper
    least = codes.least_codes(signed)[upper].long()
    for lower in (0, 1, 0x7FFF, 0xFFFF):
        numbers = (upper << 16 | lower).int().view(torch.float32)
        rest = torch.searchsorted(codes.midpoints(signed), numbers, right=True) - least
        assert ((rest == 0) | (rest == 1) | (numbers.abs() > 1)).all()


@given(
    gradients=st.lists(st.floats(-100, 100), min_size=1, max_size=50), beta1=st.sampled_from([0.0, 0.5, 0.9]),
    beta2=st.sampled_from([0.8, 0.999]),
)  # fmt: skip
def test_no_gradients_lead_to_a_larger_ratio_of_moments_than_the_bound(gradients, beta1, beta2):
    m, v = 0.0, 0.0
    for gradient in gradients:
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
    assert abs(m) <= codes.most_ratio(beta1, beta2) * v**0.5 * (1 + 1e-9) + 1e-12
