"""The entries that a training step keeps: the largest of each row or of the batch, or all above a cut.

A guess says which entries might be among the largest, `product` finds those, `search` finds them anew where the guess
was wrong. So a guess costs time, never an entry. Among equals, lower rows and then lower features are chosen, as on the
processor. Nothing here asks the device for a number: entries lie in fixed room, and `row_starts` says where they end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as tf
import triton
import triton.language as tl
from torch import Tensor

from saeflow.sae.gpu.choice.product import Candidates, Floor, Product, RowList, collect
from saeflow.sae.gpu.choice.search import complete
from saeflow.sae.gpu.specimens import Specimen, typed


class Entries(NamedTuple):
    """Entries by row, inside a row in ascending order of feature, in room for N. Those beyond the last row are zero."""

    row_starts: Tensor
    """int32 (B + 1)."""
    ids: Tensor
    """int32 (N)."""
    values: Tensor
    """Pre-activations, float32 (N)."""


class Choice(NamedTuple):
    """The largest entries of each row, or of the batch."""

    entries: Entries
    kth: Tensor
    """Size of the smallest chosen entry of each row (B), or of the batch (1); 0 where fewer than k are positive."""
    n_wrong: Tensor
    """int32 (1): rows whose guess was wrong, or all rows if the batch's was."""


def largest_of_rows(product: Product, k: int, guess: Tensor, capacity: int) -> Choice:
    """Return the k largest positive entries of each row, or of largest magnitude if the product is signed.

    `guess` (B) float32: about 2 to 8 k entries of a row are thought to be larger. `capacity`, a power of two of at
    least k: entries that each row's buffer holds.
    """
    floor, candidates = _above(guess), Candidates.room_for(product, True, capacity)
    collect(product, _all_rows(product), floor, False, candidates)
    n_wrong = complete(product, k, floor, candidates)
    n_rows, place = product.n_rows, product.low.device
    row_starts = tf.pad(candidates.counts.clamp(max=k).cumsum(0, dtype=torch.int32), (1, 0))
    ids = torch.zeros(n_rows * k, dtype=torch.int32, device=place)
    values, kth = torch.zeros(n_rows * k, device=place), torch.zeros(n_rows, device=place)
    together = _rows_together(capacity)
    select_kernel[(triton.cdiv(n_rows, together),)](
        candidates.counts, candidates.ids, candidates.values, row_starts, ids, values, kth, k, n_rows,
        CAPACITY=capacity, K=triton.next_power_of_2(k), ROWS=together, num_warps=_WARPS,
    )  # fmt: skip
    return Choice(Entries(row_starts, ids, values), kth, n_wrong)


def largest_of_batch(product: Product, n: int, guess: Tensor, capacity: int) -> Choice:
    """Return the n largest positive entries of all rows together.

    `guess` (1) float32: about 1.5 n entries are thought to be larger. `capacity`: entries that the buffer holds, at
    least n.
    """
    floor, candidates = _above(guess), Candidates.room_for(product, False, capacity)
    collect(product, _all_rows(product), floor, False, candidates)
    n_wrong = complete(product, n, floor, candidates)
    values = torch.where(_filled(candidates), candidates.values[0], 0.0)
    kth = values.topk(n, sorted=False).values.amin(0, keepdim=True)
    return Choice(_by_place(product, candidates, kth, n - (values > kth).sum(), n), kth, n_wrong)


def above_cut(product: Product, cut: Tensor | None, room: int) -> tuple[Entries, Tensor]:
    """Return all entries above zero, in room for so many, and how many there are (1) int32.

    `cut` (F) is what the product's bias lacks; the values returned have it again. If there are more than the room
    holds, some are missing.
    """
    candidates = Candidates.room_for(product, False, room)
    zero = torch.zeros(1, device=product.low.device)
    collect(product, _all_rows(product), _above(zero), False, candidates)
    entries = _by_place(product, candidates, zero, zero.int(), room)
    if cut is not None:
        filled = torch.arange(room, device=cut.device) < entries.row_starts[-1]
        entries = entries._replace(values=entries.values + torch.where(filled, cut[entries.ids.long()], 0.0))
    return entries, candidates.counts


def _above(guess: Tensor) -> Floor:
    bits = guess.clamp(min=0).view(torch.int32) + 1
    return Floor(bits, torch.zeros_like(bits, dtype=torch.int64))


def _all_rows(product: Product) -> RowList:
    rows = torch.arange(product.n_rows, dtype=torch.int32, device=product.low.device)
    return RowList(rows, torch.full_like(rows[:1], product.n_rows))


def _filled(candidates: Candidates) -> Tensor:
    return torch.arange(candidates.capacity, device=candidates.counts.device) < candidates.counts


def _by_place(product: Product, candidates: Candidates, kth: Tensor, n_equal: Tensor, room: int) -> Entries:
    """Return the candidates larger than `kth` and the first `n_equal` of that size, by row and feature."""
    assert candidates.rows is not None
    beyond = product.n_rows * product.n_features
    places = candidates.rows[0].long() * product.n_features + candidates.ids[0]
    places, order = torch.where(_filled(candidates), places, beyond).sort()
    values = candidates.values[0][order]
    equal = values == kth
    keep = (places < beyond) & ((values > kth) | (equal & (equal.cumsum(0) <= n_equal)))
    ends = keep.cumsum(0)
    to = torch.where(keep, ends - 1, room)
    ids = torch.zeros(room + 1, dtype=torch.int32, device=to.device).scatter_(
        0, to, (places % product.n_features).int()
    )
    kept = torch.zeros(room + 1, device=to.device).scatter_(0, to, values)
    firsts = torch.arange(product.n_rows + 1, device=to.device) * product.n_features
    row_starts = tf.pad(ends, (1, 0))[torch.searchsorted(places, firsts)].int()
    return Entries(row_starts, ids[:room], kept[:room])


_WARPS, _TOGETHER = 4, 1024
"""Entries of the buffers that a program sorts: 8 a thread."""


@triton.jit
def select_kernel(
    counts, cand_ids, cand_values, row_starts, ids, values, kth, k, n_rows,
    CAPACITY: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the k largest candidates of some rows by ascending feature, and the sizes of the last ones.

    An entry is one number: its size, then how far its feature is from the last one, then its sign. The largest of
    these are chosen by a bitonic top-k. K: the power of two from k on.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.minimum(tl.load(counts + row, mask=row < n_rows, other=0), CAPACITY)[:, None]
    column = tl.arange(0, CAPACITY)[None, :]
    at = (row.to(tl.int64) * CAPACITY)[:, None] + column
    feature = tl.load(cand_ids + at, mask=column < n, other=0).to(tl.int64)
    bits = tl.load(cand_values + at, mask=column < n, other=0.0).to(tl.int32, bitcast=True).to(tl.int64)
    key = ((bits & 0x7FFFFFFF) << 32) | ((0x7FFFFFFF - feature) << 1) | ((bits >> 31) & 1)
    key = tl.topk(tl.where(column < n, key, 0), K)

    place = tl.arange(0, K)[None, :]
    chosen = place < tl.minimum(n, k)
    size, feature = key >> 32, 0x7FFFFFFF - ((key >> 1) & 0x7FFFFFFF)
    last = tl.sum(tl.where(place == k - 1, size, 0), 1).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(kth + row, last, mask=row < n_rows)
    signed = size | ((key & 1) << 31)
    by_feature = tl.sort(tl.where(chosen, (feature << 32) | signed, 0x7FFFFFFFFFFFFFFF))
    to = tl.load(row_starts + row, mask=row < n_rows, other=0)[:, None] + place
    tl.store(ids + to, (by_feature >> 32).to(tl.int32), mask=chosen)
    tl.store(values + to, by_feature.to(tl.int32).to(tl.float32, bitcast=True), mask=chosen)


def _rows_together(capacity: int) -> int:
    return max(_TOGETHER // capacity, 1)


_TYPES = typed({"*i32": "counts cand_ids row_starts ids", "*fp32": "cand_values values kth", "i32": "k n_rows"})

SPECIMENS = [
    Specimen(
        select_kernel, _TYPES, {"CAPACITY": capacity, "K": k, "ROWS": _rows_together(capacity)}, _WARPS, 1,
        f"select_kernel {k} of {capacity}",
    )
    for k, capacity in ((64, 512), (64, 1024), (256, 2048))
]  # fmt: skip
