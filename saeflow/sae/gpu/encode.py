"""Exact encoding by kernels: the product is searched where it is made, and only entries near a decision are rescored.

As on the processor (`saeflow.sae.exact`), a bound on the product's error says which entries may be values, and float64
decides. Here products and bias are added in float32 and never rounded to bfloat16, so only the sums have an error.
Rows for which a guess was wrong, or that have more candidates than fit, are screened by a product that is stored. So a
guess costs time, never a value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saeflow.activations.sparse_values import SparseValues, concatenated
from saeflow.runtime.threads import ranges
from saeflow.sae.encoder import Encoder
from saeflow.sae.exact import ActivationFunction, encode_on_accelerator, screened, values_of_entries
from saeflow.sae.gpu.choice import guess
from saeflow.sae.gpu.choice.product import Candidates, Floor, Product, RowList, collect
from saeflow.sae.gpu.specimens import Specimen

CHUNK_ROWS = 4096
"""Rows at once: with the largest buffers 256 MiB."""
LEAST_ROOM, MOST_ROOM = 256, 8192
"""Candidates of a row; where more are near, the stored product is the quicker one."""
_PER_K = 16
"""Buffers hold so many times k. About twice k entries are candidates in bfloat16 at F = 65,536, k = 64."""
_RELATIVE = 2.05 * 2.0**-24


def encode_by_kernels(x: Tensor, encoder: Encoder, function: ActivationFunction) -> SparseValues:
    """Return the values of rows x (B, D): those of `saeflow.sae.exact`, on any device."""
    parts = [x[start:stop] for start, stop in ranges(len(x), CHUNK_ROWS)]
    return concatenated([_encode_chunk(part.contiguous(), encoder, function) for part in parts])


def _encode_chunk(x: Tensor, encoder: Encoder, function: ActivationFunction) -> SparseValues:
    screen = _Screen(x, encoder, function)
    capacity = screen.capacity()
    if capacity is None:
        return encode_on_accelerator(x, encoder, function)
    candidates, found = screen.candidates(capacity)
    entries = [candidates.unbind(1)]
    left = (~found).nonzero()[:, 0]
    for start, stop in ranges(len(left), encoder.device_rows):
        some = left[start:stop]
        rows, ids = screened(x[some], encoder, function)
        entries.append((some[rows], ids))
    rows, ids = (torch.cat(each) for each in zip(*entries, strict=True))
    order = (rows * len(encoder.w_enc) + ids).argsort()
    rows, ids = rows[order], ids[order]
    return values_of_entries(rows, ids, _rescored(x, encoder, rows, ids), function, len(x))


class _Screen:
    """The product of some rows, and how far from the truth it may be."""

    def __init__(self, x: Tensor, encoder: Encoder, function: ActivationFunction) -> None:
        self.function = function
        low, row_bounds = encoder.bounded(x.float())
        of_row = torch.from_numpy(row_bounds @ encoder.bounds[:2].max(1)).to(low.device)
        bias = encoder.bias.double()
        self.shift = bias.new_zeros(())
        """Added to pre-activations if those near zero count: the kernels find only numbers above zero."""
        if function.k is None:
            self.shift = 1.01 * (of_row.max() + _error_of_bias(bias, encoder).max())
        bias = bias + self.shift
        self.widest = of_row + _error_of_bias(bias, encoder).max()
        """(B) float64: the largest error of a row's pre-activations."""
        self.product = Product.of(low, encoder.low_w, bias.float(), function.signed)

    def capacity(self) -> int | None:
        """Return how many candidates a row's buffer holds; None if too many are near."""
        k = self.function.k
        n, needed = (4 * self._sampled_counts(),) * 2 if k is None else (_PER_K * k, 4 * k)
        if needed > MOST_ROOM:
            return None
        return min(max(int(triton.next_power_of_2(n)), LEAST_ROOM), MOST_ROOM)

    def candidates(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Return row and feature of all entries (n, 2) that may be values, and in which rows (B) these were found."""
        floor = self._floor()
        room = Candidates.room_for(self.product, True, capacity)
        bits = floor.view(torch.int32) + 1
        rows = torch.arange(self.product.n_rows, dtype=torch.int32, device=floor.device)
        listed = RowList(rows, torch.full_like(rows[:1], len(rows)))
        collect(self.product, listed, Floor(bits, torch.zeros_like(bits, dtype=torch.int64)), False, room)
        column = torch.arange(capacity, device=floor.device)
        sizes = torch.where(column < room.counts[:, None], room.values, 0.0)
        if self.function.signed:
            sizes = sizes.abs()
        cut = self._cut(sizes)
        found = (room.counts <= capacity) & (cut >= floor)
        places = ((sizes > cut[:, None]) & found[:, None]).nonzero()
        return torch.stack([places[:, 0], room.ids[places[:, 0], places[:, 1]].long()], 1), found

    def _floor(self) -> Tensor:
        """Return a number for each row (B) float32 that all of its candidates, it is thought, exceed."""
        if self.function.k is None:
            return (self._cut_of_all() * (1 - 2.0**-22)).clamp(min=0).float()
        rows, sizes = guess.sample(self.product)
        kth = sizes.topk(min(self.function.k, sizes.shape[1]), dim=1).values[:, -1]
        lengths = guess.lengths(rows)
        ratio = guess.next_ratio(self._least_of_k(kth, guess.sampled(self.widest)).float(), lengths)
        return ratio * guess.lengths(self.product.low)

    def _cut(self, sizes: Tensor) -> Tensor:
        """Return for each row (B) float64 a number that exceeds no entry which may be a value."""
        if self.function.k is None:
            return self._cut_of_all()
        k = self.function.k
        return self._least_of_k(sizes.topk(k, dim=1).values[:, -1], self.widest)

    def _cut_of_all(self) -> Tensor:
        return (self.shift - self.widest) * (1 - _RELATIVE)

    def _least_of_k(self, kth: Tensor, widest: Tensor) -> Tensor:
        """Return what a size must exceed to be, perhaps, one of the k largest, from the approximate k-th size."""
        least = (kth.double() * (1 - _RELATIVE) - widest).clamp(min=0) - widest
        return least - _RELATIVE * least.abs() - 1e-30

    def _sampled_counts(self) -> int:
        _, sizes = guess.sample(self.product)
        return int((sizes > guess.sampled(self._cut_of_all())[:, None]).sum(1).max())


def _error_of_bias(bias: Tensor, encoder: Encoder) -> Tensor:
    """Return what the bias (F) float64, rounded to float32, adds to the bound on an entry's error."""
    low = bias.float().double()
    return ((bias - low).abs() + (encoder.error_of_sums + _RELATIVE) * low.abs() + 1e-30) * (1 + 1e-6)


RESCORED, RESCORE_WARPS = 512, 2
"""Numbers of a row multiplied at once: eight of float64 a thread, whose loads are under way together."""


@triton.jit
def rescore_kernel(x, b_in, w_enc, rows, ids, exact, width, COLUMNS: tl.constexpr):
    """Write the product of one entry's centred row and encoder row, in float64."""
    entry = tl.program_id(0)
    row, feature = tl.load(rows + entry), tl.load(ids + entry)
    total = tl.zeros((COLUMNS,), tl.float64)
    for column in range(0, width, COLUMNS):
        at = column + tl.arange(0, COLUMNS)
        inside = at < width
        number = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float64)
        number -= tl.load(b_in + at, mask=inside, other=0.0).to(tl.float64)
        total += number * tl.load(w_enc + feature * width + at, mask=inside, other=0.0).to(tl.float64)
    tl.store(exact + entry, tl.sum(total))


def _rescored(x: Tensor, encoder: Encoder, rows: Tensor, ids: Tensor) -> Tensor:
    """Return the pre-activations of entries (n) in float64."""
    exact = torch.empty(len(rows), dtype=torch.float64, device=x.device)
    if len(rows):
        arrays = x, encoder.b_in, encoder.w_enc, rows, ids, exact
        rescore_kernel[(len(rows),)](*arrays, x.shape[1], RESCORED, num_warps=RESCORE_WARPS, num_stages=1)
    return exact + encoder.b_enc.double()[ids]


SPECIMENS = [
    Specimen(
        rescore_kernel,
        {"x": stored, "b_in": "*fp32", "w_enc": "*fp32", "rows": "*i64", "ids": "*i64", "exact": "*fp64",
         "width": "i32", "COLUMNS": "constexpr"},
        {"COLUMNS": RESCORED}, RESCORE_WARPS, 1, f"rescore {stored}",
    )
    for stored in ("*fp16", "*bf16", "*fp32")
]  # fmt: skip
