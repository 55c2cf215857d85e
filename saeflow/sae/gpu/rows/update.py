"""Gradients of the rows of both matrices, and Adam's step of these rows, in one kernel: no gradient (F, D) is stored.

One program takes a feature. A feature of more than one segment has its segments summed up before, by a kernel of its
own. All sums are added in an order that is always the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from saeflow.sae.gpu.rows.adam import (
    LOG_M,
    LOG_V,
    MOST_RATIO,
    AdamClock,
    Wakefulness,
    adam_step,
    faded,
    largest_ratio,
    steps_awake,
)
from saeflow.sae.gpu.rows.by_feature import SEGMENT, ByFeature, segments_room, sort_by_feature
from saeflow.sae.gpu.rows.moments import BLOCK, AdamRows, load_moments, store_moments, store_weights
from saeflow.sae.gpu.specimens import Specimen

UNROLL, UPDATE_UNROLL = 8, 4
"""Rows read at once, so that their loads are under way together: by a kernel that only adds, and by one that also takes
the step. The latter reads half as many if they are in float32."""


@triton.jit
def _columns(BLOCKS: tl.constexpr):
    return tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _weighted_sum(matrix, places, factors, begin, end, d, BLOCKS: tl.constexpr, UNROLL: tl.constexpr):
    """Return the sum of rows `places[begin:end]` of a matrix (n, d), each times its factor, as a tile."""
    columns = _columns(BLOCKS)
    total = tl.zeros((BLOCKS, BLOCK), tl.float32)
    for e in range(begin, end, UNROLL):
        for i in tl.static_range(UNROLL):
            inside = e + i < end
            row = tl.load(places + e + i, mask=inside, other=0).to(tl.int64)
            factor = tl.load(factors + e + i, mask=inside, other=0.0)
            numbers = tl.load(matrix + row * d + columns, mask=columns < tl.where(inside, d, 0), other=0.0)
            total += factor * numbers.to(tl.float32)
    return total


@triton.jit
def _gradient(
    matrix, places, factors, sums, feature, feature_starts, segment_starts, d,
    BLOCKS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Return a row's gradient: the weighted sum of its entries' rows, or the sum of its segments' sums."""
    first, last = tl.load(segment_starts + feature), tl.load(segment_starts + feature + 1)
    begin = tl.load(feature_starts + feature)
    end = tl.where(last > first, begin, tl.load(feature_starts + feature + 1))
    total = _weighted_sum(matrix, places, factors, begin, end, d, BLOCKS, UNROLL)
    columns = _columns(BLOCKS)
    place = sums + first.to(tl.int64) * d
    for _ in range(first, last):
        total += tl.load(place + columns, mask=columns < d, other=0.0)
        place += d
    return total


@triton.jit
def _decoder_gradient(gradient, weights, length_sums, feature, ON_SPHERE: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """Take the part along the row off, as `without_radial` does, or add what a price on the row's length gives."""
    if ON_SPHERE:
        gradient -= tl.sum(gradient * weights) / tl.sum(weights * weights) * weights
    if HAS_LENGTHS:
        gradient += tl.load(length_sums + feature) / tl.sqrt(tl.sum(weights * weights)) * weights
    return gradient


@triton.jit
def sum_segments_kernel(
    feature_starts, segment_starts, owners, rows, residual_rows, d_pre, values, low, residual, encoder_sums,
    decoder_sums, n_features, d_in, d_out,
    SEGMENT: tl.constexpr, IN_BLOCKS: tl.constexpr, OUT_BLOCKS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sum up one segment of a long feature, for both matrices."""
    segment = tl.program_id(0)
    if segment < tl.load(segment_starts + n_features):
        feature = tl.load(owners + segment)
        begin = tl.load(feature_starts + feature) + (segment - tl.load(segment_starts + feature)) * SEGMENT
        end = tl.minimum(begin + SEGMENT, tl.load(feature_starts + feature + 1))
        columns = _columns(IN_BLOCKS)
        total = _weighted_sum(low, rows, d_pre, begin, end, d_in, IN_BLOCKS, UNROLL)
        tl.store(encoder_sums + segment.to(tl.int64) * d_in + columns, total, mask=columns < d_in)
        columns = _columns(OUT_BLOCKS)
        total = _weighted_sum(residual, residual_rows, values, begin, end, d_out, OUT_BLOCKS, UNROLL)
        tl.store(decoder_sums + segment.to(tl.int64) * d_out + columns, total, mask=columns < d_out)


@triton.jit
def square_gradients_kernel(
    feature_starts, segment_starts, rows, residual_rows, d_pre, values, low, residual, encoder_sums, decoder_sums,
    length_sums, w_dec, squares, d_in, d_out,
    IN_BLOCKS: tl.constexpr, OUT_BLOCKS: tl.constexpr, UNROLL: tl.constexpr, ON_SPHERE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Write the squared length of one feature's gradients."""
    feature = tl.program_id(0).to(tl.int64)
    square = 0.0
    if tl.load(feature_starts + feature) < tl.load(feature_starts + feature + 1):
        gradient = _gradient(
            low, rows, d_pre, encoder_sums, feature, feature_starts, segment_starts, d_in, IN_BLOCKS, UNROLL
        )
        square = tl.sum(gradient * gradient)
        gradient = _gradient(
            residual, residual_rows, values, decoder_sums, feature, feature_starts, segment_starts, d_out, OUT_BLOCKS,
            UNROLL,
        )  # fmt: skip
        columns = _columns(OUT_BLOCKS)
        weights = tl.load(w_dec + feature * d_out + columns, mask=columns < d_out, other=0.0).to(tl.float32)
        gradient = _decoder_gradient(gradient, weights, length_sums, feature, ON_SPHERE, HAS_LENGTHS)
        square += tl.sum(gradient * gradient)
    tl.store(squares + feature, square)


@triton.jit
def advance_row(
    weights, gradient, matrix, copy, m, v, m_scale, v_scale, codes, table, feature, columns, d, now, n_asleep, seed,
    WHICH: tl.constexpr, ON_SPHERE: tl.constexpr, HAS_COPY: tl.constexpr, EIGHT_BIT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Take Adam's step of a row: write its weights, a copy and its moments; return its largest |m| / sqrt(v)."""
    m_row = load_moments(m, m_scale, codes, feature, columns, d, EIGHT_BIT, True)
    v_row = load_moments(v, v_scale, codes, feature, columns, d, EIGHT_BIT, False)
    if EIGHT_BIT:  # a small v may have become zero, and its m not
        most = tl.load(table + MOST_RATIO) * tl.sqrt(v_row)
        m_row = tl.minimum(tl.maximum(m_row, -most), most)
    m_row, v_row = faded(m_row, table, LOG_M, n_asleep), faded(v_row, table, LOG_V, n_asleep)
    weights, m_row, v_row = adam_step(weights, gradient, m_row, v_row, table)
    ratio = largest_ratio(m_row, v_row, table)
    if ON_SPHERE:
        weights = weights / tl.sqrt(tl.sum(weights * weights))
    weights = store_weights(matrix, feature, columns, d, weights, seed, now, WHICH, STOCHASTIC)
    if HAS_COPY:
        store_weights(copy, feature, columns, d, weights, seed, now, WHICH, False)
    if EIGHT_BIT:
        tl.debug_barrier()  # to do these three one after the other needs fewer registers
    store_moments(m, m_scale, codes, feature, columns, d, m_row, EIGHT_BIT, True)
    if EIGHT_BIT:
        tl.debug_barrier()
    store_moments(v, v_scale, codes, feature, columns, d, v_row, EIGHT_BIT, False)
    return ratio


@triton.jit
def update_rows_kernel(
    feature_starts, segment_starts, rows, residual_rows, d_pre, values, low, residual, encoder_sums, decoder_sums,
    length_sums, awake, n_awake, last_step, awake_until, table, step, codes,
    w_low, w_enc, m_enc, v_enc, m_enc_scale, v_enc_scale, w_dec, m_dec, v_dec, m_dec_scale, v_dec_scale,
    seed, d_in, d_low, d_out,
    IN_BLOCKS: tl.constexpr, OUT_BLOCKS: tl.constexpr, UNROLL: tl.constexpr, ON_SPHERE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_LOW: tl.constexpr, EIGHT_BIT: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Take the step of one awake feature's rows."""
    place = tl.program_id(0)
    if place < tl.load(n_awake):
        feature = tl.load(awake + place).to(tl.int64)
        now = tl.load(step)
        n_asleep = now - 1 - tl.load(last_step + feature)

        columns = _columns(IN_BLOCKS)
        gradient = _gradient(
            low, rows, d_pre, encoder_sums, feature, feature_starts, segment_starts, d_in, IN_BLOCKS, UNROLL
        )
        weights = tl.load(w_enc + feature * d_in + columns, mask=columns < d_in, other=0.0).to(tl.float32)
        copy = w_low + feature * (d_low - d_in)
        ratio = advance_row(
            weights, gradient, w_enc, copy, m_enc, v_enc, m_enc_scale, v_enc_scale, codes, table, feature, columns,
            d_in, now, n_asleep, seed, 0, False, HAS_LOW, EIGHT_BIT, STOCHASTIC,
        )  # fmt: skip

        columns = _columns(OUT_BLOCKS)
        gradient = _gradient(
            residual, residual_rows, values, decoder_sums, feature, feature_starts, segment_starts, d_out, OUT_BLOCKS,
            UNROLL,
        )  # fmt: skip
        weights = tl.load(w_dec + feature * d_out + columns, mask=columns < d_out, other=0.0).to(tl.float32)
        gradient = _decoder_gradient(gradient, weights, length_sums, feature, ON_SPHERE, HAS_LENGTHS)
        of_decoder = advance_row(
            weights, gradient, w_dec, w_dec, m_dec, v_dec, m_dec_scale, v_dec_scale, codes, table, feature, columns,
            d_out, now, n_asleep, seed, 1, ON_SPHERE, False, EIGHT_BIT, STOCHASTIC,
        )  # fmt: skip
        tl.store(last_step + feature, now)
        tl.store(awake_until + feature, now + steps_awake(tl.maximum(ratio, of_decoder), table))


def tiles_for(d_in: int, d_out: int) -> dict[str, int]:
    """Return the sizes of kernels for rows of these widths. A thread holds 16 numbers of the wider tile."""
    blocks = [triton.next_power_of_2(triton.cdiv(d, BLOCK.value)) for d in (d_in, d_out)]
    warps = min(max(max(blocks) // 2, 1), 16)
    return {"IN_BLOCKS": blocks[0], "OUT_BLOCKS": blocks[1], "num_warps": warps, "num_stages": 1}


@dataclass(frozen=True)
class RowGradients:
    """Everything the gradients of rows are made of; they themselves are never stored."""

    by: ByFeature
    rows: Tensor
    """(N) int32, as all arrays of entries sorted by feature: each entry's row of `low`."""
    residual_rows: Tensor
    """(N) int32: each entry's row of `residual`."""
    d_pre: Tensor
    """(N): derivatives by the pre-activations, times the scale of the loss."""
    values: Tensor
    """(N): values, times the scale of the loss."""
    low: Tensor
    """(B, D): the centred batch, in any precision."""
    residual: Tensor
    """(R, D_out): residuals in any precision, of all nested dictionaries, and others that entries point to."""
    on_sphere: bool
    """True if rows of the decoder have unit length."""
    length_sums: Tensor | None = None
    """(F): derivatives of a price on lengths of decoder rows, by the lengths."""

    @classmethod
    def of_entries(
        cls, ids: Tensor, rows: Tensor, residual_rows: Tensor, pair: Tensor, low: Tensor, residual: Tensor,
        n_features: int, on_sphere: bool, segment: int = SEGMENT,
    ) -> Self:  # fmt: skip
        """Sort entries by feature. `ids`, `rows` and `residual_rows` (N) are those of `by_feature`, in any order.

        `pair` (2, N) holds values, and derivatives by pre-activations, both times the scale of the loss. Entries of
        several reconstructions may follow one another, if `residual` has the residuals of all.
        """
        by = sort_by_feature(ids, n_features, segment)
        values, d_pre = by.take(pair)
        return cls(by, by.take(rows), by.take(residual_rows), d_pre, values, low, residual, on_sphere)

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Sums (S, D) and (S, D_out) of the segments of long features."""
        room = segments_room(len(self.rows), self.by.segment)
        sums = [torch.empty(room, d, device=self.low.device) for d in self._widths]
        sum_segments_kernel[(room,)](
            self.by.feature_starts, self.by.segment_starts, self.by.segment_owners, self.rows, self.residual_rows,
            self.d_pre, self.values, self.low, self.residual, *sums, self._n_features, *self._widths,
            SEGMENT=self.by.segment, UNROLL=UNROLL, **self._tiles,
        )  # fmt: skip
        return sums[0], sums[1]

    def squares(self, w_dec: Tensor) -> Tensor:
        """Return the squared length (F) of each feature's gradients: see `AdamClock.clip`."""
        squares = torch.empty(self._n_features, device=w_dec.device)
        square_gradients_kernel[(self._n_features,)](
            *self._arrays, w_dec, squares, *self._widths, UNROLL=self._at_once(UNROLL), **self._tiles, **self._kind
        )
        return squares

    def update(
        self, encoder: AdamRows, decoder: AdamRows, w_low: Tensor | None, codes: Tensor, wakefulness: Wakefulness,
        clock: AdamClock, seed: int, allowed: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Let all awake rows take the step that `clock.advance` has begun.

        `w_low` (F, D or wider), if any, gets the encoder's new rows for the next product. `codes` are those of
        `code_tables`. Weights in bfloat16 are rounded at random, by `seed`. If `allowed` (1) is 0, nothing changes.
        """
        awake, n_awake = wakefulness.awake(self.by.feature_starts, clock.step)
        if allowed is not None:
            n_awake = n_awake * allowed.int()
        tables = wakefulness.last_step, wakefulness.awake_until, clock.table, clock.step, codes
        low = encoder.weights if w_low is None else w_low
        unroll = UPDATE_UNROLL if encoder.eight_bit else self._at_once(UPDATE_UNROLL)  # with fewer, 8 bits spill on 9.0
        widths = encoder.weights.shape[1], low.shape[1], decoder.weights.shape[1]
        update_rows_kernel[(self._n_features,)](
            *self._arrays, awake, n_awake, *tables, low, *encoder, *decoder, seed, *widths, **self._tiles, **self._kind,
            UNROLL=unroll, HAS_LOW=w_low is not None, EIGHT_BIT=encoder.eight_bit,
            STOCHASTIC=encoder.weights.dtype == torch.bfloat16,
        )  # fmt: skip

    def _at_once(self, n_rows: int) -> int:
        return n_rows * 2 // max(self.low.itemsize, self.residual.itemsize)

    @property
    def _n_features(self) -> int:
        return len(self.by.feature_starts) - 1

    @property
    def _widths(self) -> tuple[int, int]:
        return self.low.shape[1], self.residual.shape[1]

    @property
    def _tiles(self) -> dict[str, int]:
        return tiles_for(*self._widths)

    @property
    def _kind(self) -> dict[str, bool]:
        return {"ON_SPHERE": self.on_sphere, "HAS_LENGTHS": self.length_sums is not None}

    @property
    def _arrays(self) -> tuple[Tensor, ...]:
        """What both kernels begin with; sums of lengths that are not there are never read."""
        entries = self.rows, self.residual_rows, self.d_pre, self.values
        lengths = self.d_pre if self.length_sums is None else self.length_sums
        starts = self.by.feature_starts, self.by.segment_starts
        return *starts, *entries, self.low, self.residual, *self.sums, lengths


def _specimens(d_in: int, d_out: int) -> Iterator[Specimen]:
    """Yield every kernel at these widths."""
    constexprs: dict[str, Any] = tiles_for(d_in, d_out)
    warps, stages = (constexprs.pop(name) for name in ("num_warps", "num_stages"))
    plain: dict[str, Any] = {"UNROLL": UPDATE_UNROLL // 2, "ON_SPHERE": True, "HAS_LENGTHS": False}
    full = plain | {"HAS_LOW": True, "EIGHT_BIT": False, "STOCHASTIC": False}
    small = plain | {"UNROLL": UPDATE_UNROLL, "HAS_LOW": False, "EIGHT_BIT": True, "STOCHASTIC": True}
    cases: tuple[tuple[Any, dict[str, Any], str, str], ...] = (
        (sum_segments_kernel, {"SEGMENT": SEGMENT, "UNROLL": UNROLL}, "*bf16", "sums of segments"),
        (sum_segments_kernel, {"SEGMENT": SEGMENT, "UNROLL": UNROLL}, "*fp32", "sums of segments in float32"),
        (square_gradients_kernel, plain | {"UNROLL": UNROLL // 2}, "*bf16", "squared gradients"),
        (update_rows_kernel, full, "*bf16", "update"),
        (update_rows_kernel, full | {"HAS_LOW": False}, "*fp32", "update in float32"),
    )
    if max(d_in, d_out) <= 4096:
        cases += (
            (update_rows_kernel, small, "*bf16", "update in 8 bits and bfloat16"),
            (update_rows_kernel, small | {"HAS_LOW": True, "STOCHASTIC": False}, "*bf16", "update in 8 bits"),
            (update_rows_kernel, full | {"HAS_LOW": False, "STOCHASTIC": True}, "*bf16", "update in bfloat16"),
            (update_rows_kernel, small | {"HAS_LOW": True}, "*bf16", "update in 8 bits and bfloat16 with a copy"),
            (update_rows_kernel, full | {"STOCHASTIC": True}, "*bf16", "update in bfloat16 with a copy"),
        )
    for kernel, own, low, name in cases:
        types = {argument: _type(argument, own, low) for argument in kernel.arg_names}
        signature = types | dict.fromkeys(constexprs | own, "constexpr")
        yield Specimen(kernel, signature, constexprs | own, warps, stages, f"{name}, D = {d_in}, D_out = {d_out}")


def _type(argument: str, kind: dict[str, Any], low: str) -> str:
    weights, moments = "*bf16" if kind.get("STOCHASTIC") else "*fp32", "*u8" if kind.get("EIGHT_BIT") else "*fp32"
    floats = ("d_pre", "values", "encoder_sums", "decoder_sums", "length_sums", "table", "codes", "squares")
    names_of_moments = ("m_enc", "v_enc", "m_dec", "v_dec")
    types = dict.fromkeys((*floats, "residual"), "*fp32") | dict.fromkeys(("low", "w_low"), low)
    types |= dict.fromkeys(("w_enc", "w_dec"), weights) | dict.fromkeys(names_of_moments, moments)
    types |= dict.fromkeys((f"{name}_scale" for name in names_of_moments), "*fp32")
    types |= dict.fromkeys(("seed", "d_in", "d_low", "d_out", "n_features"), "i32")
    return types.get(argument, "*i32")


SPECIMENS = [specimen for width in (2304, 4096, 8192) for specimen in _specimens(width, width)]
