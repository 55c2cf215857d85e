"""Adam of rows that are often without a gradient, its moments in 8 bits, and weights in bfloat16."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as tf
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from saeflow.sae.gpu.rows.adam import AdamClock, AdamSettings, Wakefulness, update_vector
from saeflow.sae.gpu.rows.moments import AdamRows, nearest_codes
from saeflow.sae.gpu.rows.update import RowGradients
from saeflow.sae.gradients import without_radial
from saeflow.sae.optimizer.codes import code_tables, quantisation_map

LR = 1e-3


def one_entry_each(active: Tensor, low: Tensor, residual: Tensor, on_sphere: bool) -> RowGradients:
    """Return gradients of features: row f of `low` and `residual` if feature f is active, else zero."""
    ids = torch.where(active, torch.arange(len(active)), len(active)).int()
    rows, pair = torch.arange(len(active), dtype=torch.int32), torch.ones(2, len(active))
    return RowGradients.of_entries(ids, rows, rows, pair, low, residual, len(active), on_sphere)


def firing(n_steps: int, generator: torch.Generator) -> Tensor:
    """Return when features fire (n_steps, 6): never, twice with a long pause, and on 1, 10, 50 and 100 % of steps."""
    fires = torch.rand(n_steps, 6, generator=generator) < torch.tensor([0, 0, 0.01, 0.1, 0.5, 1])
    fires[[n_steps // 8, n_steps - n_steps // 8], 1] = True
    return fires


@pytest.mark.parametrize(
    ("n_steps", "beta1"), [(32, 0.3), pytest.param(1000, 0.9, marks=[pytest.mark.long, pytest.mark.timeout(3000)])]
)
def test_rows_that_sleep_end_where_those_of_torch_adam_do(n_steps, beta1):
    generator = torch.Generator().manual_seed(0)
    w_enc, w_dec = torch.randn(6, 5, generator=generator), torch.randn(6, 7, generator=generator)
    w_dec = tf.normalize(w_dec, dim=1)
    wanted = [w_enc.clone(), w_dec.clone()]
    adam = torch.optim.Adam(wanted, lr=LR, betas=(beta1, 0.999))
    clock = AdamClock(AdamSettings(beta1=beta1, highest_lr=LR, tolerance=1e-7))
    encoder, decoder, codes = AdamRows.begin(w_enc), AdamRows.begin(w_dec), code_tables()
    wakefulness, n_stepped = Wakefulness.asleep(6), torch.zeros(6, dtype=torch.int64)
    for step, active in enumerate(firing(n_steps, generator)):
        lr = LR * min(1, (step + 1) / (0.1 * n_steps), (n_steps - step) / (0.3 * n_steps))
        pair = [torch.randn(w.shape, generator=generator) + w for w in wanted]
        adam.param_groups[0]["lr"] = lr
        wanted[0].grad = pair[0] * active[:, None]
        wanted[1].grad = without_radial(pair[1] * active[:, None], wanted[1])
        adam.step()
        wanted[1].copy_(tf.normalize(wanted[1], dim=1))
        clock.lr.fill_(lr)
        clock.advance()
        gradients = one_entry_each(active, *pair, on_sphere=True)
        gradients.update(encoder, decoder, None, codes, wakefulness, clock, seed=0)
        n_stepped += wakefulness.last_step == clock.step
    torch.testing.assert_close(w_enc, wanted[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(w_dec, wanted[1], atol=1e-6, rtol=0)
    wakefulness.settle((encoder, decoder), clock)
    for rows, weights in zip((encoder, decoder), wanted, strict=True):
        torch.testing.assert_close(rows.m, adam.state[weights]["exp_avg"], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(rows.v, adam.state[weights]["exp_avg_sq"], atol=1e-6, rtol=1e-4)
    assert n_stepped[0] == 0
    assert 5 < n_stepped[1] < n_steps / 2
    assert n_stepped[5] == n_steps


@settings(max_examples=20, deadline=None)
@given(active=st.lists(st.booleans(), min_size=1, max_size=9), until=st.integers(0, 5), step=st.integers(1, 5))
def test_rows_with_entries_and_rows_still_awake_are_listed_in_order(active, until, step):
    starts = torch.tensor([0, *active]).cumsum(0).int()
    wakefulness = Wakefulness.asleep(len(active))
    wakefulness.awake_until[: len(active) // 2] = until
    rows, n_rows = wakefulness.awake(starts, torch.tensor([step], dtype=torch.int32))
    awake = [f for f, fires in enumerate(active) if fires or (f < len(active) // 2 and until >= step)]
    assert rows[: int(n_rows)].tolist() == awake


def test_without_tolerance_a_row_that_fired_once_never_sleeps():
    assert AdamSettings(tolerance=0).log_rest == -1e9
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(2, 4, generator=generator) for _ in range(2)]
    clock, wakefulness = AdamClock(AdamSettings()), Wakefulness.asleep(2)
    rows = AdamRows.begin(weights[0]), AdamRows.begin(weights[1])
    for step in range(3):
        clock.advance()
        gradients = one_entry_each(torch.tensor([False, step == 0]), *weights, on_sphere=False)
        gradients.update(*rows, None, code_tables(), wakefulness, clock, seed=0)
    assert wakefulness.last_step.tolist() == [0, 3]
    assert wakefulness.awake_until[1] >= 10**9


@pytest.mark.parametrize("beta2", [0.999, 0.0])
def test_a_vector_takes_the_steps_of_torch_adam(beta2):
    generator = torch.Generator().manual_seed(2)
    weights, m, v = torch.randn(1500, generator=generator), torch.zeros(1500), torch.zeros(1500)
    wanted = weights.double()
    adam, clock = torch.optim.Adam([wanted], lr=LR, betas=(0.9, beta2)), AdamClock(AdamSettings(beta2=beta2))
    clock.lr.fill_(LR)
    for _ in range(5):
        gradient = torch.randn(1500, generator=generator)
        wanted.grad = gradient.double()
        adam.step()
        clock.advance()
        update_vector(weights, gradient, m, v, clock)
    torch.testing.assert_close(weights.double(), wanted, atol=1e-6, rtol=0)


@triton.jit
def codes_kernel(numbers, tables, codes, n, SIGNED: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(codes + at, nearest_codes(tl.load(numbers + at, mask=at < n, other=0.0), tables, SIGNED), mask=at < n)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_nearest_numbers_of_the_map(signed):
    numbers = quantisation_map(signed)
    assert len(numbers) == 256
    assert (numbers.diff() > 0).all()
    sizes = 10.0 ** torch.linspace(-9, 0, 1500)
    x = torch.cat([-sizes, sizes, numbers, torch.zeros(1)]) if signed else torch.cat([sizes, numbers, torch.zeros(1)])
    codes = torch.empty(len(x), dtype=torch.int32)
    codes_kernel[(1,)](x, code_tables(), codes, len(x), signed, 4096)
    errors = (x[:, None].double() - numbers.double()).abs()
    torch.testing.assert_close(
        errors.gather(1, codes[:, None].long())[:, 0], errors.min(1).values, atol=1e-9, rtol=1e-4
    )
    assert (numbers[codes[-257:-1].long()] == numbers).all()


def test_moments_in_eight_bits_stay_near_those_in_float32_and_so_do_weights():
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(2, d, generator=generator) for d in (300, 5)]
    pairs = [[torch.randn(2, d, generator=generator) for d in (300, 5)] for _ in range(4)]
    ends = []
    for eight_bit in (False, True):
        rows = [AdamRows.begin(w.clone(), eight_bit) for w in start]
        clock, wakefulness = AdamClock(AdamSettings()), Wakefulness.asleep(2)
        clock.lr.fill_(LR)
        for pair in pairs:
            clock.advance()
            gradients = one_entry_each(torch.tensor([True, True]), *pair, on_sphere=False)
            gradients.update(rows[0], rows[1], None, code_tables(), wakefulness, clock, seed=0)
        ends.append(rows)
    for plain, small in zip(*ends, strict=True):
        for wanted, found in zip(plain.moments(), small.moments(), strict=True):
            torch.testing.assert_close(found, wanted, atol=0.03 * float(wanted.abs().max()), rtol=0)
        torch.testing.assert_close(small.weights, plain.weights, atol=0.5 * LR, rtol=0)
        assert (small.weights != plain.weights).any()


def test_moments_in_eight_bits_settle_by_their_scales():
    rows, wakefulness = AdamRows.begin(torch.zeros(2, 300), eight_bit=True), Wakefulness.asleep(2)
    rows.m.fill_(255)
    rows.m_scale.fill_(2.0)
    clock = AdamClock(AdamSettings())
    clock.step.fill_(5)
    wakefulness.last_step[1] = 3
    wakefulness.settle([rows], clock)
    torch.testing.assert_close(rows.moments()[0][:, -1], torch.tensor([2 * 0.9**5, 2 * 0.9**2]))
    assert wakefulness.last_step.tolist() == [5, 5]


def bfloat16_after_one_step(seed: int) -> Tensor:
    encoder, decoder = torch.ones(4, 700, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16)
    clock, wakefulness = AdamClock(AdamSettings()), Wakefulness.asleep(4)
    clock.lr.fill_(LR)
    clock.advance()
    gradients = one_entry_each(torch.ones(4, dtype=torch.bool), torch.ones(4, 700), torch.ones(4, 3), on_sphere=False)
    rows = AdamRows.begin(encoder), AdamRows.begin(decoder)
    gradients.update(*rows, None, code_tables(), wakefulness, clock, seed)
    return encoder


def test_rounding_to_bfloat16_keeps_the_mean_and_depends_on_the_seed_alone():
    rounded = bfloat16_after_one_step(seed=1)
    assert rounded.unique().tolist() == [1 - 2**-8, 1]
    deviation = 2**-8 * (0.256 * 0.744 / rounded.numel()) ** 0.5
    assert abs(rounded.double().mean().item() - (1 - LR)) < 4 * deviation
    assert (bfloat16_after_one_step(seed=1) == rounded).all()
    assert (bfloat16_after_one_step(seed=2) != rounded).any()
    assert (rounded[0] != rounded[1]).any()
