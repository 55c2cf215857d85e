"""Sparse kernels for the processor: choose, rescore, decode, differentiate and sort the few active entries.

Only K of F features are active at a token, so after the encoder product nothing of shape (B, F) is needed. A kernel
runs on one thread, releases the interpreter lock, and works on a range of rows or features; `threads.in_parallel`
spreads the ranges over workers. One worker computes an output whole, in a fixed order, so results depend neither on
timing nor on the number of threads.

Sparse entries are in compressed rows: entries `row_starts[r]` to `row_starts[r + 1]` belong to row r, in ascending
order of feature. *Bits* are floating-point numbers seen as integers of the same width. Positive numbers and their bits
have the same order.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray

from saeflow.runtime.compiled import compiled

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bits = NDArray[np.signedinteger[Any]]
Ids = NDArray[np.int32]
Matrix = NDArray[Any]
Offsets = NDArray[np.int64]

VECTOR_SIZE = 32
"""Pre-activations compared at once."""

ROUNDING = np.int64(1) << 41
"""Half a unit in the last of 11 significand bits, in the bits of a float64."""


def bits_of(tensor: torch.Tensor) -> Bits:
    """Return the numbers of a bfloat16 or float32 tensor as integers, without a copy."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy()


def floats_of(bits: Bits) -> Floats:
    """Return as float32 the numbers that are bfloat16 or float32 with these bits."""
    wide = bits.astype(np.int32)
    return (wide << 16 if bits.itemsize == 2 else wide).view(np.float32)


def cut_bits(cut: Doubles, dtype: torch.dtype) -> Bits:
    """Return for each cut a number c: `ordered(bits) > c` holds for all numbers of `dtype` above it, and hardly any
    other.

    `ordered` flips all bits but the sign of negative numbers, so that the order of bits is the order of all numbers.
    """
    bits = np.nextafter(cut.astype(np.float32), np.float32(-np.inf)).view(np.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if dtype.itemsize == 4:
        return ordered
    return np.where(ordered < 0, ((ordered + 1) >> 16) - 1, ordered >> 16).astype(np.int16)


@intrinsic  # type: ignore[untyped-decorator]
def _mask_above(typing: Any, numbers: Any, start: Any, limit: Any) -> Any:
    """Return one bit for each of VECTOR_SIZE numbers from `start` on, set where the number is above the limit.

    Written as vector instructions, because the compiler does not find them and a whole matrix goes through here.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = context.get_data_type(numbers.dtype)
        vector = ir.VectorType(element, VECTOR_SIZE)
        array = context.make_array(numbers)(context, builder, arguments[0])
        place = builder.bitcast(builder.gep(array.data, [arguments[1]]), vector.as_pointer())
        loaded = builder.load(place, align=element.width // 8)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[2], ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), VECTOR_SIZE), None)
        limits = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)
        return builder.bitcast(builder.icmp_signed(">", loaded, limits), ir.IntType(VECTOR_SIZE))

    return numba.uint32(numbers, numba.intp, numbers.dtype), generate


@intrinsic  # type: ignore[untyped-decorator]
def _lowest_bit(typing: Any, mask: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1)), ir.IntType(64))

    return numba.intp(numba.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _float(typing: Any, number: Any) -> Any:
    """Return as float32 the bfloat16 whose bits an int16 holds; return a float32 as it is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if number != numba.int16:
            return arguments[0]
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return numba.float32(number), generate


@compiled
def _append_above(row: Bits, cut: int, ids: Ids, out: Bits, n: int) -> int:
    """Append the places and bits of all numbers above the cut to `ids` and `out`, from entry n on."""
    limit = row.dtype.type(cut)
    if cut < 0:
        flip = (1 << (8 * row.itemsize - 1)) - 1
        for j in range(len(row)):
            ids[n] = j
            out[n] = row[j]
            n += row[j] >= 0 or (row[j] ^ flip) > cut
        return n
    n_blocks = len(row) // VECTOR_SIZE
    for block in range(n_blocks):
        mask = _mask_above(row, block * VECTOR_SIZE, limit)
        while mask != 0:
            j = block * VECTOR_SIZE + _lowest_bit(mask)
            ids[n] = j
            out[n] = row[j]
            n += 1
            mask = np.uint32(mask & np.uint32(mask - np.uint32(1)))
    for j in range(n_blocks * VECTOR_SIZE, len(row)):
        if row[j] > limit:
            ids[n] = j
            out[n] = row[j]
            n += 1
    return n


@compiled
def _kth_largest(numbers: Bits, k: int) -> int:
    """Return a t with exactly k numbers >= t, by bisection; if there is none, the k-th largest number.

    0 if fewer than k numbers are positive.
    """
    low, high = 0, 1
    for i in range(len(numbers)):
        high = max(high, numbers[i] + 1)
    while high - low > 1:
        middle = (low + high) // 2
        limit = numbers.dtype.type(middle)
        count = np.int32(0)
        for i in range(len(numbers)):
            count = np.int32(count + np.int32(numbers[i] >= limit))
        if count == k:
            return middle
        if count > k:
            low = middle
        else:
            high = middle
    return low


@compiled
def select_above(bits: Bits, cuts: Bits, row_starts: Offsets, ids: Ids, out: Bits) -> None:
    """Write all entries of each row above the row's cut. `ids` and `out` have room for every entry."""
    n = 0
    row_starts[0] = 0
    for r in range(len(bits)):
        n = _append_above(bits[r], cuts[r], ids, out, n)
        row_starts[r + 1] = n


@compiled
def select_top(bits: Bits, k: int, row_starts: Offsets, ids: Ids, out: Bits) -> None:
    """Write the k largest positive entries of each row; among equals, the lower features.

    A row's columns are dealt out to lanes. The k-th largest maximum of a lane is a first cut: at least k entries reach
    it, and few more.
    """
    width = bits.shape[1]
    n_lanes = 128
    while n_lanes < 4 * k:
        n_lanes *= 2
    n_lanes = min(n_lanes, width)
    lanes = np.empty(n_lanes, bits.dtype)
    near = np.empty(width + VECTOR_SIZE, np.int32)
    near_bits = np.empty(width + VECTOR_SIZE, bits.dtype)
    n = 0
    row_starts[0] = 0
    for r in range(len(bits)):
        row = bits[r]
        lanes[:] = 0
        for start in range(0, width, n_lanes):
            part = row[start : start + n_lanes]
            for lane in range(len(part)):
                number = part[lane]
                lanes[lane] = number if number > lanes[lane] else lanes[lane]
        first_cut = max(_kth_largest(lanes, k) - 1, 0)
        n_near = _append_above(row, first_cut, near, near_bits, 0)
        kth = _kth_largest(near_bits[:n_near], k)
        ties = k
        for i in range(n_near):
            ties -= near_bits[i] > kth
        for i in range(n_near):
            if near_bits[i] > kth or (near_bits[i] == kth and ties > 0):
                ties -= near_bits[i] == kth
                ids[n] = near[i]
                out[n] = near_bits[i]
                n += 1
        row_starts[r + 1] = n


@compiled
def pursue_rows(products: Floats, gram: Floats, features: Offsets) -> None:
    """Write the features (n, k) that a matching pursuit chooses, the lower one among equals; -1 where none is positive.

    `products` (n, F) of the rows with all directions become those of what the pursuit leaves, by rows of `gram` (F, F).
    """
    n_lanes = 64
    lanes, starts = np.empty(n_lanes, np.float32), np.empty(n_lanes, np.int32)
    for r in range(len(products)):
        row, taken, gram_row = products[r], np.float32(0), gram[0]
        for step in range(features.shape[1]):
            lanes[:] = 0
            starts[:] = 0
            for start in range(0, len(row), n_lanes):
                part, other = row[start : start + n_lanes], gram_row[start : start + n_lanes]
                for lane in range(len(part)):
                    number = part[lane] - taken * other[lane]
                    part[lane] = number
                    starts[lane] = np.int32(start) if number > lanes[lane] else starts[lane]
                    lanes[lane] = number if number > lanes[lane] else lanes[lane]
            taken, best = np.float32(0), -1
            for lane in range(n_lanes):
                f = starts[lane] + lane
                if lanes[lane] > taken or (best >= 0 and lanes[lane] == taken and f < best):
                    taken, best = lanes[lane], f
            features[r, step] = best
            if best < 0:
                features[r, step:] = -1
                break
            gram_row = gram[best]


@compiled
def _dot(doubles: Doubles, floats: Floats) -> float:
    total = 0.0
    for c in range(len(doubles)):
        total += doubles[c] * np.float64(floats[c])
    return total


@compiled
def rescore(
    x: Floats, b_dec: Doubles, w_enc: Floats, b_enc: Doubles, bounds: Doubles, row_bounds: Doubles, relative: float,
    firsts: Doubles, thresholds: Doubles, stretch: Doubles, shift: Doubles, k: int, signed: bool, row_starts: Offsets,
    ids: Ids, approximate: Floats, kept_starts: Offsets, values: Floats,
) -> None:  # fmt: skip
    """Recompute candidates in float64, keep the k largest of those above their thresholds, and round.

    `approximate` is the approximate pre-activation less the feature's threshold. A candidate is not recomputed if even
    with the bound on its error, `row_bounds[r] @ bounds[:, j] + relative * abs(approximate)`, it stays below the number
    needed. Candidates of at least `firsts[r]` come first: if there are k, the least of them raises the number that the
    others need. A kept entry has the value stretch[j] * pre + shift[j], where positive, and is written over `ids`.
    If `signed`, pre is its magnitude everywhere, and the value gets its sign at the end.
    """
    longest = 0
    for r in range(len(x)):
        longest = max(longest, row_starts[r + 1] - row_starts[r])
    exact = np.empty(longest)
    exact_bits = exact.view(np.int64)
    signs = np.ones(longest, np.float32)
    centred = np.empty(x.shape[1])
    n = 0
    kept_starts[0] = 0
    for r in range(len(x)):
        for c in range(len(centred)):
            centred[c] = np.float64(x[r, c]) - b_dec[c]
        row_ids = ids[row_starts[r] : row_starts[r + 1]]
        guesses = approximate[row_starts[r] : row_starts[r + 1]]
        needed = 0.0
        for first in (True, False):
            n_exact = 0
            least = np.inf
            for i in range(len(row_ids)):
                j = row_ids[i]
                guess = np.float64(guesses[i])
                if first:
                    exact[i] = 0
                if (guess >= firsts[r]) != first:
                    continue
                error = row_bounds[r, 0] * bounds[0, j] + row_bounds[r, 1] * bounds[1, j] + bounds[2, j]
                if guess + error + relative * abs(guess) < needed:
                    continue
                pre = _dot(centred, w_enc[j]) + b_enc[j]
                if signed:
                    signs[i] = 1 if pre > 0 else -1
                    pre = abs(pre)
                if pre > thresholds[j]:
                    exact[i] = max(stretch[j] * pre + shift[j], 0.0)
                least = min(least, pre - thresholds[j])
                n_exact += 1
            if n_exact >= k:
                needed = max(needed, least)
        n = _round_largest(exact[: len(row_ids)], exact_bits[: len(row_ids)], signs, k, row_ids, ids, values, n)
        kept_starts[r + 1] = n


@compiled
def _round_largest(
    exact: Doubles, exact_bits: Bits, signs: Floats, k: int, row_ids: Ids, ids: Ids, values: Floats, n: int
) -> int:
    """Append the k largest positive numbers, among equals the first ones, rounded to 11 bits and with their signs."""
    n_above = 0
    for i in range(len(exact)):
        n_above += exact[i] > 0
    kth = np.int64(0)
    ties = np.int64(k)
    if n_above > k:
        kth = _kth_largest(exact_bits, k)
        for i in range(len(exact)):
            ties -= exact_bits[i] > kth
    for i in range(len(exact)):
        number = exact_bits[i]
        if exact[i] > 0 and (number > kth or (number == kth and ties > 0)):
            ties -= number == kth
            number += ROUNDING - 1 + ((number >> 42) & 1)
            exact_bits[i] = (number >> 42) << 42
            ids[n] = row_ids[i]
            values[n] = np.float32(exact[i]) * signs[i]
            n += values[n] != 0
    return n


@compiled
def reconstruct(
    start: int, stop: int, row_starts: Offsets, ids: Ids, values: Floats, w_dec: Floats, target: Floats, ends: Ids,
    residual: Floats, d_values: Floats, losses: Floats,
) -> None:  # fmt: skip
    """Write for rows start..stop the residuals, their squared norms, and their products with the active directions.

    The residual is values @ w_dec - target; `d_values` is residual @ w_dec.T where there are values. Features up to
    `ends[g]` make dictionary g, each inside the next. `losses` (G, B) has the squared norm for each dictionary.
    `residual[g]` (B, D) is the sum of the residuals of dictionary g and all larger ones: every feature that is in g,
    but in no smaller one, is part of these dictionaries. One pass does it all, while a row's K directions are in cache.
    """
    n_nested = len(ends)
    d = target.shape[1]
    for r in range(start, stop):
        e = row_starts[r]
        end = row_starts[r + 1]
        for g in range(n_nested):
            row = residual[g, r]
            if g == 0:
                for c in range(d):
                    row[c] = -target[r, c]
            else:
                before = residual[g - 1, r]
                for c in range(d):
                    row[c] = before[c]
            last = e
            while last < end and ids[last] < ends[g]:
                last += 1
            while e + 4 <= last:
                i0, i1, i2, i3 = ids[e], ids[e + 1], ids[e + 2], ids[e + 3]
                v0, v1, v2, v3 = values[e], values[e + 1], values[e + 2], values[e + 3]
                for c in range(d):
                    row[c] += v0 * w_dec[i0, c] + v1 * w_dec[i1, c] + v2 * w_dec[i2, c] + v3 * w_dec[i3, c]
                e += 4
            while e < last:
                i0, v0 = ids[e], values[e]
                for c in range(d):
                    row[c] += v0 * w_dec[i0, c]
                e += 1
            loss = np.float32(0)
            for c in range(d):
                loss += row[c] * row[c]
            losses[g, r] = loss
        for g in range(n_nested - 2, -1, -1):
            row = residual[g, r]
            after = residual[g + 1, r]
            for c in range(d):
                row[c] += after[c]
        g = 0
        for e in range(row_starts[r], end):
            i0 = ids[e]
            while i0 >= ends[g]:
                g += 1
            row = residual[g, r]
            dot = np.float32(0)
            for c in range(d):
                dot += row[c] * w_dec[i0, c]
            d_values[e] = dot


@compiled
def transpose(
    start: int, stop: int, row_starts: Offsets, ids: Ids, values: Floats, positions: Offsets, rows: Ids,
    sorted_values: Floats,
) -> None:  # fmt: skip
    """Put each entry of rows start..stop at its feature's next free place, which `positions` holds.

    Both `values` and `sorted_values` are (n, nnz): one or more numbers go with each entry.
    """
    for r in range(start, stop):
        for e in range(row_starts[r], row_starts[r + 1]):
            place = positions[ids[e]]
            positions[ids[e]] = place + 1
            rows[place] = r
            for i in range(len(values)):
                sorted_values[i, place] = values[i, e]


@compiled
def _add_two(out: Floats, a: float, first: Matrix, b: float, second: Matrix) -> None:
    for c in range(len(out)):
        out[c] += a * _float(first[c]) + b * _float(second[c])


@compiled
def accumulate(
    start: int, stop: int, feature_starts: Offsets, rows: Ids, values: Floats, d_pre: Floats, ends: Ids,
    residual: Matrix, centred: Matrix, w_dec: Floats, on_sphere: bool, fresh: bool, d_w_enc: Floats, d_w_dec: Floats,
) -> None:  # fmt: skip
    """Add the gradients of features start..stop to `d_w_enc` and `d_w_dec`, or write them to `fresh` memory.

    `residual` (G, B, D) and `centred` (B, D) are float32, or bfloat16 as bits: to read them takes most of the time.
    With `on_sphere` the part of `d_w_dec` along a row of `w_dec` is taken out: it is the gradient for unit rows.
    """
    g = 0
    for f in range(start, stop):
        while f >= ends[g]:
            g += 1
        of_nested = residual[g]
        d_enc, d_dec = d_w_enc[f], d_w_dec[f]
        if fresh:
            d_enc[:] = 0
            d_dec[:] = 0
        for e in range(feature_starts[f], feature_starts[f + 1], 2):
            more = e + 1 < feature_starts[f + 1]
            last = e + 1 if more else e
            r0, r1 = rows[e], rows[last]
            v1 = values[last] if more else np.float32(0)
            g1 = d_pre[last] if more else np.float32(0)
            _add_two(d_dec, values[e], of_nested[r0], v1, of_nested[r1])
            _add_two(d_enc, d_pre[e], centred[r0], g1, centred[r1])
        if on_sphere:
            _project_out(d_dec, w_dec[f])


@compiled
def _project_out(vector: Floats, direction: Floats) -> None:
    along = np.float32(0)
    length = np.float32(0)
    for c in range(len(vector)):
        along += vector[c] * direction[c]
        length += direction[c] * direction[c]
    along /= length
    for c in range(len(vector)):
        vector[c] -= along * direction[c]


@compiled
def statistics(
    ids: Ids, values: Floats, n_tokens: Offsets, total: Doubles, total_squares: Doubles, strongest: Floats
) -> None:
    """Add entries to each feature's count, sum, sum of squares and strongest value."""
    for e in range(len(ids)):
        j = ids[e]
        value = np.float64(values[e])
        n_tokens[j] += 1
        total[j] += value
        total_squares[j] += value * value
        size, most = abs(values[e]), abs(strongest[j])
        if size > most or (size == most and values[e] > 0):
            strongest[j] = values[e]
