"""Reconstructions of rows from their active entries, residuals, and derivatives by the entries' values.

One program takes a row, a piece of its columns after the other. It reads a piece of each active direction twice: for
the reconstruction, then, out of the cache, for the products with the residual. So a row of any width and any number of
entries needs few registers. Sums are added in an order that is always the same.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from saeflow.sae.gpu.specimens import Specimen

COLUMNS = 512
"""Columns of a piece: 2 warps read them by 16 bytes a thread (bfloat16), or twice as many (float32)."""
ENTRIES = 4
"""Directions read at once. With 32 numbers of them a thread has about 60 registers: 32 warps a multiprocessor."""
WARPS = 2
"""Few, because each product of a direction with the residual is summed over all threads."""


@triton.jit
def _decoded(ids, values, w_dec, begin, end, columns, d_out, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """Return values @ w_dec over entries begin..end, for some columns."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for e in range(begin, end, ENTRIES):
        at = e + tl.arange(0, ENTRIES)
        feature = tl.load(ids + at, mask=at < end, other=0).to(tl.int64)
        value = tl.load(values + at, mask=at < end, other=0.0)
        inside = (at < end)[:, None] & (columns < d_out)[None, :]
        direction = tl.load(w_dec + feature[:, None] * d_out + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(value[:, None] * direction.to(tl.float32), 0)
    return total


@triton.jit
def _add_products(
    ids, residual, w_dec, g, begin, end, columns, d_out, fresh, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):
    """Add the products of some columns of a residual with the directions of entries begin..end to `g`."""
    for e in range(begin, end, ENTRIES):
        at = e + tl.arange(0, ENTRIES)
        feature = tl.load(ids + at, mask=at < end, other=0).to(tl.int64)
        inside = (at < end)[:, None] & (columns < d_out)[None, :]
        direction = tl.load(w_dec + feature[:, None] * d_out + columns[None, :], mask=inside, other=0.0)
        product = tl.sum(direction.to(tl.float32) * residual[None, :], 1)
        before = tl.load(g + at, mask=(at < end) & (not fresh), other=0.0)
        tl.store(g + at, before + product, mask=at < end)


@triton.jit
def _stops(ids, ends, first, last, n_nested, ENTRIES: tl.constexpr, NESTED: tl.constexpr):
    """Return for each nested dictionary where its entries of a row end."""
    nested = tl.arange(0, NESTED)
    sizes = tl.load(ends + nested, mask=nested < n_nested, other=0)
    stops = tl.zeros((NESTED,), tl.int32) + first
    for e in range(first, last, ENTRIES):
        at = e + tl.arange(0, ENTRIES)
        feature = tl.load(ids + at, mask=at < last, other=2147483647)
        stops += tl.sum((feature[:, None] < sizes[None, :]).to(tl.int32), 0)
    return stops


@triton.jit
def decode_kernel(
    row_starts, ids, values, w_dec, target, ends, residual, low_residual, losses, g, n_rows, d_out, n_nested,
    HAS_LOW: tl.constexpr, NESTED: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Reconstruct one row, a piece of columns after the other: see `decode_rows`."""
    row = tl.program_id(0).to(tl.int64)
    first, last = tl.load(row_starts + row), tl.load(row_starts + row + 1)
    nested = tl.arange(0, NESTED)
    stops = _stops(ids, ends, first, last, n_nested, ENTRIES, NESTED)
    squares = tl.zeros((NESTED,), tl.float32)
    for column in range(0, d_out, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        inside = columns < d_out
        total = -tl.load(target + row * d_out + columns, mask=inside, other=0.0)
        begin = first
        for n in range(n_nested):
            end = tl.max(tl.where(nested == n, stops, first))
            total += _decoded(ids, values, w_dec, begin, end, columns, d_out, ENTRIES, COLUMNS)
            squares += tl.where(nested == n, tl.sum(total * total), 0.0)
            tl.store(residual + (n * n_rows + row) * d_out + columns, total, mask=inside)
            begin = end
        tl.debug_barrier()  # what other threads have written, to `g` too, is read below
        later = tl.zeros((COLUMNS,), tl.float32)
        for back in range(n_nested):
            n = n_nested - 1 - back
            place = (n * n_rows + row) * d_out + columns
            if NESTED == 1:
                later = total
            else:
                later += tl.load(residual + place, mask=inside, other=0.0)
                tl.store(residual + place, later, mask=inside)
            if HAS_LOW:
                tl.store(low_residual + place, later.to(low_residual.dtype.element_ty), mask=inside)
            begin = tl.max(tl.where(nested == n - 1, stops, first))
            end = tl.max(tl.where(nested == n, stops, first))
            _add_products(ids, later, w_dec, g, begin, end, columns, d_out, column == 0, ENTRIES, COLUMNS)
    tl.store(losses + nested * n_rows + row, squares, mask=nested < n_nested)


def decode_rows(
    row_starts: Tensor, ids: Tensor, values: Tensor, w_dec: Tensor, target: Tensor, ends: Tensor, residual: Tensor,
    losses: Tensor, g: Tensor, low_residual: Tensor | None = None,
) -> None:  # fmt: skip
    """Write residuals (G, B, D_out), their squared norms `losses` (G, B), and products `g` (N) with the directions.

    The same as `saeflow.sae.kernels.reconstruct`. Entries are rows of a CSR matrix: `row_starts` (B + 1), `ids` and
    `values` (N), ascending by feature inside a row; N may be larger than their number. `ends` (G) has the sizes of
    nested dictionaries, ascending. `residual[n]` is the sum of the residuals of dictionary n and all larger ones, and
    `losses[n]` is the squared norm of dictionary n's own. An entry's product is that with the residual of the smallest
    dictionary that has its feature. `low_residual` (G, B, D_out) gets the residuals in its own precision.
    """
    n_rows, d_out = target.shape
    low = residual if low_residual is None else low_residual
    arrays = row_starts, ids, values, w_dec, target, ends, residual, low, losses, g
    sizes = n_rows, d_out, len(ends)
    constexprs = low_residual is not None, triton.next_power_of_2(len(ends)), ENTRIES, COLUMNS
    decode_kernel[(n_rows,)](*arrays, *sizes, *constexprs, num_warps=WARPS, num_stages=1)


@triton.jit
def products_kernel(
    row_starts, ids, w_dec, ends, residual, g, n_rows, d_out, n_nested,
    NESTED: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Multiply the residuals of one row with its active directions: see `multiply_residuals`."""
    row = tl.program_id(0).to(tl.int64)
    first, last = tl.load(row_starts + row), tl.load(row_starts + row + 1)
    nested = tl.arange(0, NESTED)
    stops = _stops(ids, ends, first, last, n_nested, ENTRIES, NESTED)
    for column in range(0, d_out, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        tl.debug_barrier()  # what other threads have written to `g` is read below
        for n in range(n_nested):
            part = tl.load(residual + (n * n_rows + row) * d_out + columns, mask=columns < d_out, other=0.0)
            begin = tl.max(tl.where(nested == n - 1, stops, first))
            end = tl.max(tl.where(nested == n, stops, first))
            _add_products(ids, part, w_dec, g, begin, end, columns, d_out, column == 0, ENTRIES, COLUMNS)


def multiply_residuals(
    row_starts: Tensor, ids: Tensor, w_dec: Tensor, ends: Tensor, residual: Tensor, g: Tensor
) -> None:
    """Write the products `g` (N) of residuals (G, B, D_out), summed as in `decode_rows`, with the directions."""
    n_nested, n_rows, d_out = residual.shape
    constexprs = triton.next_power_of_2(n_nested), ENTRIES, COLUMNS
    arrays = row_starts, ids, w_dec, ends, residual, g
    products_kernel[(n_rows,)](*arrays, n_rows, d_out, n_nested, *constexprs, num_warps=WARPS, num_stages=1)


def room_for_residuals(n_nested: int, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return room for the residuals and the losses that `decode_rows` writes."""
    return target.new_empty(n_nested, *target.shape), target.new_empty(n_nested, len(target))


def _specimen(weights: str, nested: int) -> Specimen:
    pointers = dict.fromkeys(("row_starts", "ids", "ends"), "*i32") | {"w_dec": weights, "low_residual": "*bf16"}
    names = decode_kernel.arg_names
    types = {name: pointers.get(name, "*fp32") for name in names[:10]} | dict.fromkeys(names[10:13], "i32")
    constexprs = {"HAS_LOW": True, "NESTED": nested, "ENTRIES": ENTRIES, "COLUMNS": COLUMNS}
    signature = types | dict.fromkeys(constexprs, "constexpr")
    return Specimen(decode_kernel, signature, constexprs, WARPS, 1, f"decode {weights} nested={nested}")


def _products_specimen(weights: str, nested: int) -> Specimen:
    pointers = dict.fromkeys(("row_starts", "ids", "ends"), "*i32") | {"w_dec": weights}
    names = products_kernel.arg_names
    types = {name: pointers.get(name, "*fp32") for name in names[:6]} | dict.fromkeys(names[6:9], "i32")
    constexprs = {"NESTED": nested, "ENTRIES": ENTRIES, "COLUMNS": COLUMNS}
    signature = types | dict.fromkeys(constexprs, "constexpr")
    return Specimen(products_kernel, signature, constexprs, WARPS, 1, f"products {weights} nested={nested}")


SPECIMENS = [
    make(weights, nested) for make in (_specimen, _products_specimen) for weights in ("*fp32", "*bf16")
    for nested in (1, 8)
]  # fmt: skip
"""The same for every width: a program loops over pieces of columns."""
