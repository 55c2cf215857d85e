"""Sparse kernels for the processor: choose, rescore, decode, differentiate and sort the few active entries.

Only K of F features are active at a token, so after the encoder product nothing of shape (B, F) is needed. The
kernels are single-threaded, release the interpreter lock, and work on ranges of rows or features;
`in_parallel` spreads the ranges over `torch.get_num_threads()` workers. Each output is computed whole by one worker in
a fixed order, so results depend neither on timing nor on the number of threads.

Sparse entries are in compressed rows: entries `row_starts[r]` to `row_starts[r + 1]` belong to row r, in ascending
order of feature. *Bits* are floating-point numbers seen as integers of the same width: positive ones are ordered alike.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bits = NDArray[np.signedinteger[Any]]
Ids = NDArray[np.int32]
Offsets = NDArray[np.int64]
Item = TypeVar("Item")
Result = TypeVar("Result")
Kernel = TypeVar("Kernel", bound=Callable[..., Any])

BLOCK = 32
"""Pre-activations looked at together: a block whose largest is below the cut is skipped."""

ROUNDING = np.int64(1) << 41
"""Half a unit in the last of 11 significand bits, in the bits of a float64."""


def _compiled(kernel: Kernel) -> Kernel:
    """Reassociating sums lets them use vector registers; the order stays the same from run to run."""
    return cast(
        Kernel, numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})(kernel)
    )


@torch.no_grad()
def in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply `function` to all items, in order, on as many workers as torch has threads.

    A worker runs torch on one thread, so that nothing competes for cores. `function` must not call `in_parallel`.
    """
    n_threads = torch.get_num_threads()
    if n_threads == 1 or len(items) < 2:
        return [function(item) for item in items]
    return list(_workers(n_threads, os.getpid()).map(function, items))


@cache
def _workers(n_threads: int, process: int) -> ThreadPoolExecutor:
    barrier = threading.Barrier(n_threads + 1)

    def use_one_thread() -> None:
        torch.get_num_threads()  # the first call in a thread would otherwise undo the next line
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)  # this too is a setting of the thread
        barrier.wait()

    workers = ThreadPoolExecutor(n_threads, "saeflow", initializer=use_one_thread)
    for _ in range(n_threads):
        workers.submit(int)
    barrier.wait()
    torch.set_num_threads(n_threads)  # threads started later take this as their default
    return workers


def ranges(n: int, size: int) -> list[tuple[int, int]]:
    """Cut 0..n into consecutive ranges of at most `size`."""
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def bits_of(tensor: torch.Tensor) -> Bits:
    """The numbers of a bfloat16 or float32 tensor as integers, without a copy."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy()


def floats_of(bits: Bits) -> Floats:
    """Back from the bits of bfloat16 or float32 numbers to float32."""
    wide = bits.astype(np.int32)
    return (wide << 16 if bits.itemsize == 2 else wide).view(np.float32)


def cut_bits(cut: Doubles | Floats, dtype: torch.dtype) -> Bits:
    """The largest `c` for which `ordered(bits) > c` holds for all numbers of `dtype` above the cut."""
    bits = np.nextafter(cut.astype(np.float32), np.float32(-np.inf)).view(np.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered >> 16).astype(np.int16) if dtype.itemsize == 2 else ordered


@_compiled
def _above(row: Bits, cut: int, ids: Ids, out: Bits, n: int) -> int:
    """Append the places and bits of all numbers above the cut to `ids` and `out`, from entry n on."""
    limit = row.dtype.type(cut)
    if cut < 0:
        flip = (1 << (8 * row.itemsize - 1)) - 1
        for j in range(len(row)):
            ids[n] = j
            out[n] = row[j]
            n += row[j] >= 0 or (row[j] ^ flip) > cut
        return n
    for start in range(0, len(row), BLOCK):
        block = row[start : start + BLOCK]
        largest = block[0]
        for j in range(len(block)):
            number = block[j]
            largest = number if number > largest else largest
        if largest > limit:
            for j in range(len(block)):
                ids[n] = start + j
                out[n] = block[j]
                n += block[j] > limit
    return n


@_compiled
def _kth_largest(numbers: Bits, k: int) -> int:
    """The largest t with at least k of the numbers >= t, by bisection; 0 if fewer than k are positive."""
    low, high = 0, 1
    for i in range(len(numbers)):
        high = max(high, numbers[i] + 1)
    while high - low > 1:
        middle = (low + high) // 2
        limit = numbers.dtype.type(middle)
        count = np.int32(0)
        for i in range(len(numbers)):
            count = np.int32(count + np.int32(numbers[i] >= limit))
        if count >= k:
            low = middle
        else:
            high = middle
    return low


@_compiled
def select_above(bits: Bits, cuts: Bits, row_starts: Offsets, ids: Ids, out: Bits) -> None:
    """All entries of each row above the row's cut. `ids` and `out` have room for every entry."""
    n = 0
    row_starts[0] = 0
    for r in range(len(bits)):
        n = _above(bits[r], cuts[r], ids, out, n)
        row_starts[r + 1] = n


@_compiled
def select_top(bits: Bits, k: int, row_starts: Offsets, ids: Ids, out: Bits) -> None:
    """The k largest positive entries of each row; among equals, the lower features.

    The k-th largest of the maxima of many columns of a row is a first cut: k entries at least reach it, and few more.
    """
    width = bits.shape[1]
    n_lanes = 128
    while n_lanes < 4 * k:
        n_lanes *= 2
    n_lanes = min(n_lanes, width)
    lanes = np.empty(n_lanes, bits.dtype)
    near = np.empty(width + BLOCK, np.int32)
    near_bits = np.empty(width + BLOCK, bits.dtype)
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
        n_near = _above(row, first_cut, near, near_bits, 0)
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


@_compiled
def rescore(
    x: Floats,
    b_dec: Doubles,
    w_enc: Floats,
    b_enc: Doubles,
    bounds: Doubles,
    row_bounds: Doubles,
    floors: Doubles,
    relative: float,
    threshold: float,
    k: int,
    row_starts: Offsets,
    ids: Ids,
    approximate: Floats,
    kept_starts: Offsets,
    values: Floats,
) -> None:
    """Recompute candidates in float64, keep those above the threshold, of these the k largest, and round.

    A candidate is skipped unread when its approximate value plus the bound on its error stays below the row's floor.
    The bound is `row_bounds[r] @ bounds[:, j] + relative * abs(approximate)`. Kept entries are written over `ids`.
    """
    d = x.shape[1]
    centred = np.empty(d)
    longest = 0
    for r in range(len(x)):
        longest = max(longest, row_starts[r + 1] - row_starts[r])
    exact = np.empty(longest)
    exact_bits = exact.view(np.int64)
    places = np.empty(longest, np.int32)
    n = 0
    kept_starts[0] = 0
    for r in range(len(x)):
        for c in range(d):
            centred[c] = np.float64(x[r, c]) - b_dec[c]
        n_exact = 0
        for e in range(row_starts[r], row_starts[r + 1]):
            j = ids[e]
            guess = np.float64(approximate[e])
            error = row_bounds[r, 0] * bounds[0, j] + row_bounds[r, 1] * bounds[1, j] + bounds[2, j]
            if guess + error + relative * abs(guess) < floors[r]:
                continue
            total = 0.0
            for c in range(d):
                total += centred[c] * np.float64(w_enc[j, c])
            total += b_enc[j]
            exact[n_exact] = total
            places[n_exact] = j
            n_exact += total > threshold
        kth = np.int64(0)
        ties = np.int64(k)
        if n_exact > k:
            kth = _kth_largest(exact_bits[:n_exact], k)
            for i in range(n_exact):
                ties -= exact_bits[i] > kth
        for i in range(n_exact):
            number = exact_bits[i]
            if number > kth or (number == kth and ties > 0):
                ties -= number == kth
                number += ROUNDING - 1 + ((number >> 42) & 1)
                exact_bits[i] = (number >> 42) << 42
                ids[n] = places[i]
                values[n] = exact[i]
                n += values[n] > 0
        kept_starts[r + 1] = n


@_compiled
def reconstruct(
    start: int,
    stop: int,
    row_starts: Offsets,
    ids: Ids,
    values: Floats,
    w_dec: Floats,
    target: Floats,
    residual: Floats,
    d_values: Floats,
    losses: Floats,
) -> None:
    """For rows start..stop: residual = values @ w_dec - target, its squared norm, and d_values = residual @ w_dec.T.

    One pass while a row's K directions are in cache; d_values only where values are.
    """
    d = target.shape[1]
    for r in range(start, stop):
        row = residual[r]
        for c in range(d):
            row[c] = -target[r, c]
        e = row_starts[r]
        end = row_starts[r + 1]
        while e + 4 <= end:
            i0, i1, i2, i3 = ids[e], ids[e + 1], ids[e + 2], ids[e + 3]
            v0, v1, v2, v3 = values[e], values[e + 1], values[e + 2], values[e + 3]
            for c in range(d):
                row[c] += v0 * w_dec[i0, c] + v1 * w_dec[i1, c] + v2 * w_dec[i2, c] + v3 * w_dec[i3, c]
            e += 4
        while e < end:
            i0, v0 = ids[e], values[e]
            for c in range(d):
                row[c] += v0 * w_dec[i0, c]
            e += 1
        loss = np.float32(0)
        for c in range(d):
            loss += row[c] * row[c]
        losses[r] = loss
        for e in range(row_starts[r], end):
            i0 = ids[e]
            dot = np.float32(0)
            for c in range(d):
                dot += row[c] * w_dec[i0, c]
            d_values[e] = dot


@_compiled
def transpose(
    start: int,
    stop: int,
    row_starts: Offsets,
    ids: Ids,
    values: Floats,
    positions: Offsets,
    rows: Ids,
    sorted_values: Floats,
) -> None:
    """Put the entries of rows start..stop where `positions` (next free place of each feature) says.

    Both `values` and `sorted_values` are (n, nnz): one or more numbers go with each entry.
    """
    for r in range(start, stop):
        for e in range(row_starts[r], row_starts[r + 1]):
            place = positions[ids[e]]
            positions[ids[e]] = place + 1
            rows[place] = r
            for i in range(len(values)):
                sorted_values[i, place] = values[i, e]


@_compiled
def _add_two(out: Floats, a: float, first: Floats, b: float, second: Floats) -> None:
    for c in range(len(out)):
        out[c] += a * first[c] + b * second[c]


@_compiled
def accumulate(
    start: int,
    stop: int,
    feature_starts: Offsets,
    rows: Ids,
    values: Floats,
    d_values: Floats,
    residual: Floats,
    centred: Floats,
    w_dec: Floats,
    on_sphere: bool,
    d_w_enc: Floats,
    d_b_enc: Floats,
    d_w_dec: Floats,
) -> None:
    """Gradients of features start..stop. Rows past the end of `centred` are its first rows once more.

    With `on_sphere` the part of `d_w_dec` along a row of `w_dec` is taken out: the gradient of the loss of unit rows.
    """
    d = residual.shape[1]
    n_rows = len(centred)
    for f in range(start, stop):
        d_enc, d_dec = d_w_enc[f], d_w_dec[f]
        d_enc[:] = 0
        d_dec[:] = 0
        bias = np.float32(0)
        for e in range(feature_starts[f], feature_starts[f + 1]):
            bias += d_values[e]
        e = feature_starts[f]
        while e + 2 <= feature_starts[f + 1]:
            r0, r1 = rows[e], rows[e + 1]
            _add_two(d_dec, values[e], residual[r0], values[e + 1], residual[r1])
            r0, r1 = r0 if r0 < n_rows else r0 - n_rows, r1 if r1 < n_rows else r1 - n_rows
            _add_two(d_enc, d_values[e], centred[r0], d_values[e + 1], centred[r1])
            e += 2
        if e < feature_starts[f + 1]:
            r0 = rows[e]
            _add_two(d_dec, values[e], residual[r0], np.float32(0), residual[r0])
            r0 = r0 if r0 < n_rows else r0 - n_rows
            _add_two(d_enc, d_values[e], centred[r0], np.float32(0), centred[r0])
        d_b_enc[f] = bias
        if on_sphere:
            along = np.float32(0)
            length = np.float32(0)
            for c in range(d):
                along += d_dec[c] * w_dec[f, c]
                length += w_dec[f, c] * w_dec[f, c]
            along /= length
            for c in range(d):
                d_dec[c] -= along * w_dec[f, c]


@_compiled
def statistics(
    ids: Ids, values: Floats, n_tokens: Offsets, total: Doubles, total_squares: Doubles, largest: Floats
) -> None:
    """Add entries to each feature's count, sum, sum of squares and maximum."""
    for e in range(len(ids)):
        j = ids[e]
        value = np.float64(values[e])
        n_tokens[j] += 1
        total[j] += value
        total_squares[j] += value * value
        largest[j] = max(largest[j], values[e])
