"""The encoder product of activations that are mostly zero, as after a ReLU: only other numbers are multiplied.

Weights are read in bfloat16, in pairs. In a group of 32 columns, 32-bit word i holds column i in its low half and
column i + 16 in its high half: a shift or a mask turns a vector of words into 16 float32 numbers. Sums are in float32.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor

from saeflow.runtime.linear import converted
from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae import kernels
from saeflow.sae.kernels import Floats, Ids, Offsets, compiled

GROUP_COLUMNS = 32
"""Columns in a group; the number of features must be a multiple."""

_MOST_NONZERO = 0.25
"""Share of numbers other than zero up to which this product is the quicker one, with a margin."""

_TILE_COLUMNS = 8 * GROUP_COLUMNS
"""Columns summed up at once: 16 vectors of 16 numbers."""


def mostly_zero(x: Tensor) -> bool:
    """True if x (B, D) has so many zeros that the sparse product is quicker."""
    return x.device.type == "cpu" and x.numel() > 0 and int(torch.count_nonzero(x)) <= _MOST_NONZERO * x.numel()


def packed(w: Tensor, threads: int) -> Ids:
    """Return weights (F, D) as words (D, F / 2)."""
    words = np.empty((w.shape[1], len(w) // 2), np.int32)
    halves = kernels.bits_of(converted(w, torch.bfloat16, threads))
    in_parallel(lambda rows: _pack(*rows, halves, words), ranges(len(w), 16 * GROUP_COLUMNS), threads)
    return words


@compiled
def _pack(start: int, stop: int, halves: kernels.Bits, words: Ids) -> None:
    """Pack columns start..stop of the product, which are rows of `halves`."""
    half = GROUP_COLUMNS // 2
    for group in range(start, stop, GROUP_COLUMNS):
        for d in range(halves.shape[1]):
            for i in range(half):
                low, high = halves[group + i, d], halves[group + half + i, d]
                words[d, group // 2 + i] = (np.int32(high) << 16) | (np.int32(low) & 0xFFFF)


def _summing(
    typing: Any, n_groups: Any, ids: Any, values: Any, n: Any, words: Any, width: Any, column: Any, base: Any,
    out: Any, place: Any,
) -> Any:  # fmt: skip
    """Set out[place:] = base[column:] + sum(values[:n] * rows `ids[:n]` of words), for n_groups groups of columns.

    Written as vector instructions, because the compiler by itself does not keep the sums in vector registers.
    """
    vectors = 2 * n_groups.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        int32, index, vector = ir.IntType(32), ir.IntType(64), ir.VectorType(ir.FloatType(), GROUP_COLUMNS // 2)
        integers = ir.VectorType(int32, GROUP_COLUMNS // 2)
        _, ids_, values_, n_, words_, width_, column_, base_, out_, place_ = (
            context.make_array(kind)(context, builder, value).data if isinstance(kind, numba.types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        )

        def place_of(pointer: Any, at: Any, i: int, kind: Any) -> Any:
            at = builder.add(at, index(i * (GROUP_COLUMNS // 2)))
            return builder.bitcast(builder.gep(pointer, [at]), kind.as_pointer())

        first = [builder.load(place_of(base_, column_, i, vector), align=4) for i in range(vectors)]
        before, loop, after = builder.block, builder.append_basic_block("row"), builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed(">", n_, index(0)), loop, after)

        builder.position_at_end(loop)
        entry, sums = builder.phi(index), [builder.phi(vector) for _ in first]
        undefined, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(integers, None)
        value = builder.insert_element(undefined, builder.load(builder.gep(values_, [entry])), int32(0))
        value = builder.shuffle_vector(value, undefined, zeros)
        row = builder.mul(builder.sext(builder.load(builder.gep(ids_, [entry])), index), width_)
        start = builder.add(row, builder.lshr(column_, index(1)))
        added = []
        for i in range(0, vectors, 2):
            word = builder.load(place_of(words_, start, i // 2, integers), align=4)
            low = builder.shl(word, ir.Constant(integers, [16] * (GROUP_COLUMNS // 2)))
            high = builder.and_(word, ir.Constant(integers, [0xFFFF0000] * (GROUP_COLUMNS // 2)))
            for half, total in zip((low, high), sums[i : i + 2], strict=True):
                product = builder.fmul(value, builder.bitcast(half, vector), flags=("contract",))
                added.append(builder.fadd(product, total, flags=("contract",)))
        following = builder.add(entry, index(1))
        for phi, initial, update in zip([entry, *sums], [index(0), *first], [following, *added], strict=True):
            phi.add_incoming(initial, before)
            phi.add_incoming(update, loop)
        builder.cbranch(builder.icmp_signed("<", following, n_), loop, after)

        builder.position_at_end(after)
        for i, (initial, update) in enumerate(zip(first, added, strict=True)):
            total = builder.phi(vector)
            total.add_incoming(initial, before)
            total.add_incoming(update, loop)
            first[i] = total
        for i, total in enumerate(first):
            builder.store(total, place_of(out_, place_, i, vector), align=4)
        return context.get_dummy_value()

    floats, int32s = numba.float32[::1], numba.int32[::1]
    kinds = n_groups, int32s, floats, numba.intp, int32s, numba.intp, numba.intp, floats, floats, numba.intp
    return numba.void(*kinds), generate


_sum_columns: Any = intrinsic(prefer_literal=True)(_summing)


@compiled
def _compress(x: Floats, starts: Offsets, ids: Ids, values: Floats) -> None:
    n = 0
    starts[0] = 0
    for r in range(len(x)):
        for c in range(x.shape[1]):
            ids[n] = c
            values[n] = x[r, c]
            n += x[r, c] != 0
        starts[r + 1] = n


@compiled
def _multiply(starts: Offsets, ids: Ids, values: Floats, words: Ids, width: int, base: Floats, out: Floats) -> None:
    """Multiply one tile of columns at a time: its weights stay in the cache for all rows."""
    n_columns = 2 * width
    n_tiled = n_columns - n_columns % _TILE_COLUMNS
    for column in range(0, n_tiled, _TILE_COLUMNS):
        for r in range(len(starts) - 1):
            a, n = starts[r], starts[r + 1] - starts[r]
            _sum_columns(8, ids[a:], values[a:], n, words, width, column, base, out, r * n_columns + column)
    for column in range(n_tiled, n_columns, GROUP_COLUMNS):
        for r in range(len(starts) - 1):
            a, n = starts[r], starts[r + 1] - starts[r]
            _sum_columns(1, ids[a:], values[a:], n, words, width, column, base, out, r * n_columns + column)


def product(x: Floats, words: Ids, base: Floats, out: Floats) -> None:
    """Write x (n, D) times the weights, plus base (F), to `out` (n * F)."""
    starts = np.empty(len(x) + 1, np.int64)
    ids, values = np.empty(x.size + 1, np.int32), np.empty(x.size + 1, np.float32)
    _compress(x, starts, ids, values)
    _multiply(starts, ids, values, words.reshape(-1), words.shape[1], base, out)
