"""Gradients and steps of rows, against autograd of the dense formula and torch.optim.Adam in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as tf
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton")

from saeflow.sae.gpu.decode import decode_rows, room_for_residuals
from saeflow.sae.gpu.rows.adam import AdamClock, AdamSettings, Wakefulness
from saeflow.sae.gpu.rows.by_feature import (
    gradient_through_centring,
    rows_of_entries,
    rows_of_residuals,
    sort_by_feature,
    used_ids,
)
from saeflow.sae.gpu.rows.moments import AdamRows
from saeflow.sae.gpu.rows.update import RowGradients
from saeflow.sae.optimizer.codes import code_tables
from tests.sae.gpu.entries import Entries, nested_losses, random_entries

SCALE, LR = 0.1, 1e-2


@dataclass(frozen=True)
class Case:
    n_rows: int
    n_features: int
    d_in: int
    d_out: int
    share: float
    ends: list[int]
    unit_norm: bool = True
    segment: int = 256


def weights_of(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    w_enc = torch.randn(case.n_features, case.d_in, generator=generator) / case.d_in**0.5
    w_dec = torch.randn(case.n_features, case.d_out, generator=generator)
    return w_enc, tf.normalize(w_dec, dim=1)


def gradients_of(
    case: Case, entries: Entries, w_enc: Tensor, w_dec: Tensor, low: Tensor, target: Tensor
) -> RowGradients:
    """Return the gradients of SCALE times the squared residuals of all nested dictionaries, by the kernels."""
    rows, ids = rows_of_entries(entries.row_starts, len(entries.ids)), entries.ids
    ids = used_ids(ids, entries.row_starts, case.n_features)
    pre = low @ w_enc.t()
    used = int(entries.row_starts[-1])
    values = torch.full_like(entries.values, torch.nan)
    values[:used] = pre[rows[:used].long(), ids[:used].long()]
    residual, losses = room_for_residuals(len(case.ends), target)
    ends, g = torch.tensor(case.ends, dtype=torch.int32), torch.full_like(values, torch.nan)
    decode_rows(entries.row_starts, entries.ids, values, w_dec, target, ends, residual, losses, g)
    pair = torch.stack([values, g]) * (2 * SCALE)
    places = rows_of_residuals(ids, rows, ends, case.n_rows)
    residuals = residual.flatten(0, 1)
    return RowGradients.of_entries(
        ids, rows, places, pair, low, residuals, case.n_features, case.unit_norm, case.segment
    )


def loss_in_float64(case: Case, entries: Entries, w_enc: Tensor, w_dec: Tensor, low: Tensor, target: Tensor) -> Tensor:
    values = (low.double() @ w_enc.t()) * (entries.dense > 0)
    w_dec = tf.normalize(w_dec, dim=1) if case.unit_norm else w_dec
    return SCALE * nested_losses(values, w_dec, target.double(), case.ends)[1].sum()


CASES = {
    "ragged": Case(9, 13, 7, 7, 0.4, [13]),
    "transcoder, two blocks": Case(6, 5, 300, 11, 0.5, [5]),
    "free length": Case(6, 7, 12, 10, 0.5, [7], unit_norm=False),
    "one feature": Case(5, 1, 9, 9, 0.6, [1]),
    "all features, in segments": Case(11, 6, 10, 10, 1.0, [6], segment=4),
    "nested, in segments": Case(12, 14, 10, 8, 0.3, [2, 5, 14], segment=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_steps_are_those_of_dense_gradients_and_torch_adam(case: Case):
    generator = torch.Generator().manual_seed(1)
    w_enc, w_dec = weights_of(case, generator)
    wanted = [w.double().requires_grad_() for w in (w_enc, w_dec)]
    adam = torch.optim.Adam(wanted, lr=LR)
    encoder, decoder = AdamRows.begin(w_enc), AdamRows.begin(w_dec)
    clock, wakefulness = AdamClock(AdamSettings()), Wakefulness.asleep(case.n_features)
    clock.lr.fill_(LR)
    w_low = torch.zeros(case.n_features, case.d_in + 3, dtype=torch.bfloat16)
    for _ in range(3):
        entries = random_entries(case.n_rows, case.n_features, case.share, generator)
        low, target = (torch.randn(case.n_rows, d, generator=generator) for d in (case.d_in, case.d_out))
        clock.advance()
        gradients = gradients_of(case, entries, w_enc, w_dec, low, target)
        gradients.update(encoder, decoder, w_low, code_tables(), wakefulness, clock, seed=0)
        adam.zero_grad()
        loss_in_float64(case, entries, *wanted, low, target).backward()
        adam.step()
        if case.unit_norm:
            with torch.no_grad():
                wanted[1].copy_(tf.normalize(wanted[1], dim=1))
    torch.testing.assert_close(w_enc.double(), wanted[0].detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(w_dec.double(), wanted[1].detach(), atol=1e-5, rtol=0)
    stepped = wakefulness.last_step > 0
    torch.testing.assert_close(w_low[stepped], tf.pad(w_enc[stepped], (0, 3)).bfloat16())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_squared_gradients_are_those_of_the_dense_formula(case: Case):
    generator = torch.Generator().manual_seed(2)
    weights = weights_of(case, generator)
    entries = random_entries(case.n_rows, case.n_features, case.share, generator)
    low, target = (torch.randn(case.n_rows, d, generator=generator) for d in (case.d_in, case.d_out))
    squares = gradients_of(case, entries, *weights, low, target).squares(weights[1])
    wanted = [w.double().requires_grad_() for w in weights]
    loss_in_float64(case, entries, *wanted, low, target).backward()
    by_feature = sum(w.grad.square().sum(1) for w in wanted)
    torch.testing.assert_close(squares.double(), by_feature, atol=1e-5, rtol=1e-5)


def test_a_clipped_step_is_that_of_a_shorter_gradient():
    case, generator = CASES["ragged"], torch.Generator().manual_seed(3)
    w_enc, w_dec = weights_of(case, generator)
    entries = random_entries(case.n_rows, case.n_features, case.share, generator)
    low, target = (torch.randn(case.n_rows, d, generator=generator) for d in (case.d_in, case.d_out))
    gradients = gradients_of(case, entries, w_enc, w_dec, low, target)
    clock, wakefulness = AdamClock(AdamSettings(eps=1e-2)), Wakefulness.asleep(case.n_features)
    clock.lr.fill_(LR)
    clock.advance()
    wanted = [w.double().requires_grad_() for w in (w_enc, w_dec)]
    adam = torch.optim.Adam(wanted, lr=LR, eps=1e-2)
    loss_in_float64(case, entries, *wanted, low, target).backward()
    length = torch.nn.utils.clip_grad_norm_(wanted, 0.5)
    torch.testing.assert_close(clock.clip(gradients.squares(w_dec).sum(), 0.5).double(), length, atol=0, rtol=1e-5)
    rows = AdamRows.begin(w_enc), AdamRows.begin(w_dec)
    gradients.update(*rows, None, code_tables(), wakefulness, clock, seed=0)
    adam.step()
    torch.testing.assert_close(w_enc.double(), wanted[0].detach(), atol=1e-6, rtol=0)


def test_a_price_on_lengths_pulls_along_the_rows():
    case, generator = CASES["free length"], torch.Generator().manual_seed(4)
    w_enc, w_dec = weights_of(case, generator)
    w_dec = w_dec * 3
    entries = random_entries(case.n_rows, case.n_features, case.share, generator)
    low, target = (torch.randn(case.n_rows, d, generator=generator) for d in (case.d_in, case.d_out))
    prices = torch.rand(case.n_features, generator=generator) * (entries.dense.sum(0) > 0)
    gradients = replace(gradients_of(case, entries, w_enc, w_dec, low, target), length_sums=prices)
    wanted = [w.double().requires_grad_() for w in (w_enc, w_dec)]
    (loss_in_float64(case, entries, *wanted, low, target) + wanted[1].norm(dim=1) @ prices.double()).backward()
    squares = sum(w.grad.square().sum(1) for w in wanted)
    torch.testing.assert_close(gradients.squares(w_dec).double(), squares, atol=1e-5, rtol=1e-5)


def test_bfloat16_batches_and_residuals_are_read_as_they_are():
    generator = torch.Generator().manual_seed(5)
    entries = random_entries(8, 5, 0.5, generator)
    rows, used = rows_of_entries(entries.row_starts, len(entries.ids)), int(entries.row_starts[-1])
    ids = used_ids(entries.ids, entries.row_starts, 5)
    low, residual = torch.randn(8, 6, generator=generator).bfloat16(), torch.randn(8, 9, generator=generator).bfloat16()
    pair = torch.stack([entries.values, 2 * entries.values])
    gradients = RowGradients.of_entries(ids, rows, rows, pair, low, residual, 5, False)
    dense = entries.dense.t()
    wanted = (2 * dense @ low.double()).square().sum(1) + (dense @ residual.double()).square().sum(1)
    torch.testing.assert_close(gradients.squares(torch.zeros(5, 9)).double(), wanted, atol=1e-5, rtol=1e-5)
    assert used < len(ids)


@settings(max_examples=15, deadline=None)
@given(
    n_rows=st.integers(1, 9), n_features=st.integers(1, 12), share=st.floats(0.01, 1), segment=st.integers(1, 5),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_entries_are_sorted_by_feature_and_every_segment_belongs_to_a_long_feature(
    n_rows, n_features, share, segment, seed
):
    entries = random_entries(n_rows, n_features, share, torch.Generator().manual_seed(seed))
    used = int(entries.row_starts[-1])
    rows = rows_of_entries(entries.row_starts, len(entries.ids))
    by = sort_by_feature(used_ids(entries.ids, entries.row_starts, n_features), n_features, segment)
    features, owners = (entries.dense.t() > 0).nonzero(as_tuple=True)
    torch.testing.assert_close(by.take(rows)[:used].long(), owners)
    counts = torch.bincount(features, minlength=n_features)
    torch.testing.assert_close(by.feature_starts.diff().long(), counts)
    wanted = [f for f, n in enumerate(counts.tolist()) if n > segment for _ in range(-(-n // segment))]
    owners = by.segment_owners.tolist()
    assert owners == wanted + [n_features] * (len(owners) - len(wanted))
    numbers = torch.stack([entries.values, entries.values * 3])
    summed = by.sums(by.take(numbers))
    torch.testing.assert_close(summed[0].double(), entries.dense.sum(0))
    torch.testing.assert_close(summed[1], 3 * summed[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_before_the_encoder_gets_its_gradient(dtype):
    generator = torch.Generator().manual_seed(6)
    low, w_enc, d_pre = (torch.randn(*size, generator=generator) for size in ((5, 4), (7, 4), (5, 7)))
    w_enc, bias = w_enc.to(dtype), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    ((low.double() - bias) @ w_enc.double().t() * d_pre.double()).sum().backward()
    torch.testing.assert_close(gradient_through_centring(d_pre.sum(0), w_enc).double(), bias.grad, atol=1e-5, rtol=1e-5)
