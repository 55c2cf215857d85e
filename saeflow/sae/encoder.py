"""The encoder product, in the precision that is quickest, with a bound on its error; another one for rows that are
mostly zero.
"""

from __future__ import annotations

import copy
import threading
from functools import cached_property
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor

from saeflow.runtime.compiled import compiled
from saeflow.runtime.linear import converted, linear
from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae import kernels
from saeflow.sae.kernels import Doubles, Floats, Ids, Offsets

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


def multiply_nonzero(x: Floats, words: Ids, base: Floats, out: Floats) -> None:
    """Write x (n, D) times the weights, plus base (F), to `out` (n * F)."""
    starts = np.empty(len(x) + 1, np.int64)
    ids, values = np.empty(x.size + 1, np.int32), np.empty(x.size + 1, np.float32)
    _compress(x, starts, ids, values)
    _multiply(starts, ids, values, words.reshape(-1), words.shape[1], base, out)


PRODUCT_ENTRIES = 1 << 22
"""Pre-activations one worker holds at a time: they stay in the processor's cache until they are searched."""


class ThreadBuffers(threading.local):
    """Memory that a thread uses again and again: fresh pages cost more than the search of them."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, n: int, dtype: torch.dtype) -> Tensor:
        """Return `n` uninitialised numbers, valid until the thread's next call with this name."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < n or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(n, dtype=dtype)
        return buffer[:n]


thread_buffers = ThreadBuffers()


class Encoder:
    """Encoder weights (F, D) and bias (F), and the product of centred rows with them in `dtype`, on `threads` threads.

    A product gives pre-activations, less `cut` (F) if there is one: a number above zero is above its feature's cut.
    The product is quick and has an error, which `bounds` and `relative_error` bound.
    """

    def __init__(
        self, w_enc: Tensor, b_enc: Tensor, b_in: Tensor, dtype: torch.dtype, cut: Tensor | None = None,
        threads: int = 1,
    ) -> None:  # fmt: skip
        self.w_enc, self.b_enc, self.b_in, self.dtype = w_enc.detach(), b_enc.detach(), b_in.detach(), dtype
        self.cut, self.threads = cut, threads
        self.bias = self.b_enc if cut is None else self.b_enc.double() - cut.double()

    def with_cut(self, cut: Tensor) -> Encoder:
        """Return this encoder with another cut; both share the weights in the form of the product."""
        self.prepare()
        other = copy.copy(self)
        other.cut, other.bias = cut, self.b_enc.double() - cut.double()
        for made_of_bias in ("low_b", "base", "bounds", "_for_sparse_inputs"):
            other.__dict__.pop(made_of_bias, None)
        return other

    def suited_to(self, x: Tensor) -> Encoder:
        """Return this encoder, or, if most of x (B, D) is zero, one that reads only the other numbers."""
        if len(self.w_enc) % GROUP_COLUMNS or not mostly_zero(x):
            return self
        return self._for_sparse_inputs

    @cached_property
    def _for_sparse_inputs(self) -> Encoder:
        return SparseInputEncoder(self.w_enc, self.b_enc, self.b_in, torch.float32, self.cut, self.threads)

    @cached_property
    def low_w(self) -> Tensor:
        return converted(self.w_enc, self.dtype, self.threads)

    @cached_property
    def low_b(self) -> Tensor:
        return self.bias.to(self.dtype)

    def prepare(self) -> None:
        """Bring the weights into the form of the product, before several threads ask for them."""
        _ = self.low_w, self.low_b

    @property
    def chunk_rows(self) -> int:
        """Rows that one worker takes at a time."""
        return min(max(PRODUCT_ENTRIES // len(self.w_enc), 64), 512)

    @property
    def device_rows(self) -> int:
        """Rows that an accelerator takes at once: it has no cache to stay in, and memory for more."""
        return max(16 * PRODUCT_ENTRIES // len(self.w_enc), 256)

    def bounded(self, x: Tensor) -> tuple[Tensor, Doubles]:
        """Return what `pre_activations` takes for rows x (n, D) in float32, called x~, and two numbers a row (n, 2).

        The numbers are |x - x~|, with the rounding of x - b_in to float32, and |x~|; too large, never too small.
        """
        centred = x - self.b_in
        low = centred.to(self.dtype)
        wide = low.float()
        of_centred, of_low = centred.norm(dim=1).double(), wide.norm(dim=1).double()
        lost = (wide - centred).norm(dim=1).double() + 2.0**-23 * of_centred
        return low, torch.stack([lost, of_low], 1).mul(1.001).cpu().numpy()

    def pre_activations(self, rows: Tensor) -> Tensor:
        """Return pre-activations (n, F), valid until the thread's next call."""
        return linear(rows, self.low_w, self.low_b)

    @property
    def relative_error(self) -> float:
        """Relative error of rounding a pre-activation: product and bias may be rounded one after the other."""
        return 2.05 * 2.0 ** (-8 if self.dtype == torch.bfloat16 else -24)

    @property
    def error_of_sums(self) -> float:
        """Relative error of a sum of D + 2 terms in float32: as many roundings, doubled."""
        return (self.w_enc.shape[1] + 2) * 2.0**-23

    @cached_property
    def bounds(self) -> Doubles:
        """(3, F): what bounds the error of a feature: factors of a row's two numbers, and a constant.

        x.w + b - (x~.w~ + b~) = (x - x~).w + x~.(w - w~) + b - b~. Each product is at most the product of the lengths
        (Cauchy-Schwarz). To that comes `error_of_sums`.
        """
        return self._bounds_for(self.low_w.double(), self.bias.double(), self.low_b.double())

    def _bounds_for(self, low_w: Tensor, b: Tensor, low_b: Tensor) -> Doubles:
        rounding = self.error_of_sums
        w = self.w_enc.double()
        of_low = (w - low_w).norm(dim=1) + rounding * low_w.norm(dim=1)
        fixed = (b - low_b).abs() + (rounding + self.relative_error) * low_b.abs() + 1e-30
        return torch.stack([w.norm(dim=1), of_low, fixed]).mul(1 + 1e-6).cpu().numpy()


class SparseInputEncoder(Encoder):
    """An encoder for rows that are mostly zero: x.w + (b_enc - b_in.w), with w in bfloat16 and x as it is."""

    @cached_property
    def words(self) -> Ids:
        return packed(self.w_enc, self.threads)

    @cached_property
    def base(self) -> Floats:
        """(F): what a row of zeros gives."""
        bias = self.bias.float()
        base = torch.empty_like(bias)

        def subtract_product(part: tuple[int, int]) -> None:
            rows = slice(*part)
            torch.addmv(bias[rows], self.w_enc[rows], self.b_in, alpha=-1, out=base[rows])

        in_parallel(subtract_product, ranges(len(base), 512), self.threads)
        return base.numpy()

    def prepare(self) -> None:
        _ = self.words, self.base

    @property
    def chunk_rows(self) -> int:
        return max(super().chunk_rows // 2, 64)

    def bounded(self, x: Tensor) -> tuple[Tensor, Doubles]:
        lengths = x.norm(dim=1).double()
        return x, torch.stack([torch.zeros_like(lengths), lengths], 1).mul(1.001).numpy()

    def pre_activations(self, rows: Tensor) -> Tensor:
        shape = len(rows), len(self.w_enc)
        out = thread_buffers.take("product", shape[0] * shape[1], torch.float32)
        multiply_nonzero(rows.numpy(), self.words, self.base, out.numpy())
        return out.view(shape)

    @cached_property
    def bounds(self) -> Doubles:
        exact = self.bias.double() - self.w_enc.double() @ self.b_in.double()
        return self._bounds_for(self.w_enc.bfloat16().double(), exact, torch.from_numpy(self.base).double())
