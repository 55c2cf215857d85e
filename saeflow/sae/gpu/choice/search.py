"""The exact search for rows whose guess was wrong, without asking the device how many there are.

A guess too low finds more entries than a row's buffer holds, one too high finds fewer than k. For such rows a radix
select (Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units") finds a floor from which on at
least k entries lie, and no more than fit. Each pass counts entries by one digit of their size, in a product over the
rows that still need it. One digit is enough unless very many sizes are nearly equal. If too many are exactly equal,
further passes go over the digits of the entries' places. After the last digit exactly k are left, so the number of
passes is fixed; those over no rows end at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from saeflow.sae.gpu.choice.product import (
    DIGIT_BITS,
    Candidates,
    Floor,
    Product,
    RowList,
    add_histograms,
    collect,
    last_place,
)
from saeflow.sae.gpu.memory import BATCH_HISTOGRAMS
from saeflow.sae.gpu.specimens import Specimen, typed

_SIZE_BITS = 31


def complete(product: Product, k: int, floor: Floor, candidates: Candidates) -> Tensor:
    """Make the candidates hold the k largest of each row, or of the batch; return how many rows that took (1) int32.

    `candidates` holds what `collect` found from the floor on, which then moves where it was wrong. k is at most the
    capacity. Memory: 8 KiB of counters a row, or 512 KiB for a batch.
    """
    by_row, counts, n_rows = candidates.rows is None, candidates.counts, product.n_rows
    wrong = (counts > candidates.capacity) | ((counts < k) & (floor.bits > 1))
    for state in (floor.bits, floor.tie, counts):
        state.masked_fill_(wrong, 0)
    wanted = torch.full_like(counts, k)
    histograms = counts.new_zeros(n_rows if by_row else BATCH_HISTOGRAMS, 1 << DIGIT_BITS)
    all_wrong = listed = _listed(wrong.expand(n_rows))
    for shift, high, of_places in _digits(last_place(product, by_row).bit_length()):
        add_histograms(product, listed, floor, (shift, high), of_places, histograms, by_row)
        listed = _descend(listed, floor, wanted, k, shift, of_places, histograms, candidates)
    collect(product, all_wrong, floor, True, candidates)
    return all_wrong.n


def _listed(marked: Tensor) -> RowList:
    """Return the numbers of marked rows, in room for all."""
    ends = marked.cumsum(0, dtype=torch.int32)
    numbers = torch.arange(len(marked), dtype=torch.int32, device=marked.device)
    places = torch.where(marked, ends - 1, len(marked)).long()
    return RowList(numbers.new_zeros(len(marked) + 1).scatter_(0, places, numbers), ends[-1:])


def _digits(place_bits: int) -> Iterator[tuple[int, int, bool]]:
    """Yield lowest bit, bit above the highest, and whether it is one of places, of each digit."""
    for n_bits, of_places in ((_SIZE_BITS, False), (place_bits, True)):
        for high in range(n_bits, 0, -DIGIT_BITS):
            yield max(high - DIGIT_BITS, 0), high, of_places


def _descend(
    listed: RowList, floor: Floor, wanted: Tensor, k: int, shift: int, of_places: bool, histograms: Tensor,
    candidates: Candidates,
) -> RowList:  # fmt: skip
    """Set a digit of the floor of each listed row, clear the histograms, return the rows that need another digit."""
    by_row = candidates.rows is None
    following = RowList(torch.empty_like(listed.rows) if by_row else listed.rows, torch.zeros_like(listed.n))
    descend_kernel[(len(wanted),)](
        listed.rows, listed.n, following.rows, following.n, floor.bits, floor.tie, wanted, histograms,
        k, candidates.capacity, shift, BY_ROW=by_row, OF_PLACES=of_places, BINS=1 << DIGIT_BITS,
        PIECES=1 if by_row else len(histograms), num_warps=_WARPS,
    )  # fmt: skip
    return following


_WARPS = 4
"""For 2,048 counters: 16 a thread."""


@triton.jit(do_not_specialize=["shift"], do_not_specialize_on_alignment=["n_listed"])
def descend_kernel(
    row_list, n_listed, next_rows, n_next, floor, tie_floor, wanted, histograms, k, capacity, shift,
    BY_ROW: tl.constexpr, OF_PLACES: tl.constexpr, BINS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Find the digit of the wanted entry of one row, or of the batch: see `_descend`."""
    number, n = tl.program_id(0), tl.load(n_listed)
    if number < n:
        row = tl.load(row_list + number) if BY_ROW else number
        bins = tl.arange(0, BINS)
        at = histograms + row.to(tl.int64) * BINS + bins
        here = tl.zeros((BINS,), tl.int64)
        for _ in range(PIECES):
            here += tl.load(at)
            tl.store(at, tl.zeros((BINS,), tl.int32))
            at += BINS
        from_here = tl.sum(here) - tl.cumsum(here, 0) + here
        rank = tl.load(wanted + row)
        digit = tl.max(tl.where(from_here >= rank, bins, 0))  # 0, which takes all, if there are fewer than wanted
        n_here = tl.sum(tl.where(bins == digit, here, 0))
        rank -= tl.sum(tl.where(bins > digit, here, 0)).to(tl.int32)
        tl.store(wanted + row, rank)
        if OF_PLACES:
            tl.store(tie_floor + row, tl.load(tie_floor + row) + (digit.to(tl.int64) << shift))
        else:
            tl.store(floor + row, tl.load(floor + row) + (digit << shift))
        if k - rank + n_here > capacity:
            if BY_ROW:
                tl.store(next_rows + tl.atomic_add(n_next, 1, sem="relaxed"), row)
            else:
                tl.store(n_next, n)


_TYPES = typed({
    "*i32": "row_list n_listed next_rows n_next floor wanted histograms",
    "*i64": "tie_floor",
    "i32": "k capacity shift",
})  # fmt: skip

SPECIMENS = [
    Specimen(
        descend_kernel, _TYPES,
        {"BY_ROW": pieces == 1, "OF_PLACES": of_places, "BINS": 1 << DIGIT_BITS, "PIECES": pieces}, _WARPS, 1,
        f"descend_kernel {'rows' if pieces == 1 else 'batch'} {'places' if of_places else 'sizes'}",
        odd=("shift", "n_listed"),
    )
    for pieces in (1, BATCH_HISTOGRAMS)
    for of_places in (False, True)
]  # fmt: skip
