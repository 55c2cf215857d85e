"""Entries sorted by feature, without a word to the host: no size here depends on data.

A feature with more than SEGMENT entries would keep one program busy while all others are done. Its entries are split
into segments, which other programs sum up first: see `update`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as tf
import triton
import triton.language as tl
from torch import Tensor

from saeflow.sae.gpu.specimens import Specimen

SEGMENT = 256
"""Entries that one program sums up. A feature has B * K / F on average: 8 at B = 8,192, K = 64, F = 65,536."""
SUM_ENTRIES = 256
"""Numbers of a feature that `sum_by_feature_kernel` takes at once, with one warp."""
_PIECE = 8192
"""Features of a piece of the encoder: in float32 it takes 128 MiB at D = 4,096."""


class ByFeature(NamedTuple):
    """How entries lie when they are sorted by feature; entries of a feature keep their order."""

    order: Tensor
    """(N) int64: the places of entries, by feature; unused places come last."""
    feature_starts: Tensor
    """(F + 1) int32: feature f owns the sorted entries feature_starts[f] to feature_starts[f + 1]."""
    segment_starts: Tensor
    """(F + 1) int32: feature f owns segments segment_starts[f] to segment_starts[f + 1]; a short feature has none."""
    segment_owners: Tensor
    """(S) int32: the feature of each segment; F where there is no segment."""
    segment: int
    """Entries in a segment; the last one of a feature may have fewer."""

    def take(self, numbers: Tensor) -> Tensor:
        """Return numbers (..., N) of entries sorted by feature."""
        return numbers.index_select(-1, self.order)

    def sums(self, numbers: Tensor) -> Tensor:
        """Return sums (M, F) by feature of numbers (M, N) that are sorted already."""
        n_features = len(self.feature_starts) - 1
        sums = numbers.new_empty(len(numbers), n_features)
        arguments = self.feature_starts, numbers, sums, *numbers.shape, n_features, SUM_ENTRIES
        sum_by_feature_kernel[n_features, len(numbers)](*arguments, num_warps=1, num_stages=1)
        return sums


def rows_of_entries(row_starts: Tensor, room: int) -> Tensor:
    """Return each entry's row (room) int32; B at unused places."""
    places = torch.arange(room, dtype=torch.int32, device=row_starts.device)
    return torch.searchsorted(row_starts[1:], places, right=True, out_int32=True)


def used_ids(ids: Tensor, row_starts: Tensor, n_features: int) -> Tensor:
    """Return feature ids (N), with `n_features` at the places that no row uses."""
    places = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
    return torch.where(places < row_starts[-1], ids, n_features)


def rows_of_residuals(ids: Tensor, rows: Tensor, ends: Tensor, n_rows: int) -> Tensor:
    """Return where the residual of each entry's smallest dictionary lies in residuals (G * B, D_out), int32."""
    return torch.searchsorted(ends, ids, right=True, out_int32=True) * n_rows + rows


def sort_by_feature(ids: Tensor, n_features: int, segment: int = SEGMENT) -> ByFeature:
    """Sort entries by feature ids (N), of which unused places have `n_features`: see `used_ids`."""
    ordered, order = ids.sort(stable=True)
    features = torch.arange(n_features + 1, dtype=ids.dtype, device=ids.device)
    starts = torch.searchsorted(ordered, features, out_int32=True)
    counts = starts.diff()
    n_segments = torch.where(counts > segment, (counts + segment - 1) // segment, 0)
    segment_starts = tf.pad(n_segments.cumsum(0, dtype=torch.int32), (1, 0))
    places = torch.arange(segments_room(len(ids), segment), dtype=torch.int32, device=ids.device)
    owners = torch.searchsorted(segment_starts, places, right=True, out_int32=True) - 1
    return ByFeature(order, starts, segment_starts, owners, segment)


def segments_room(n_entries: int, segment: int = SEGMENT) -> int:
    """Return the most segments there can be: a feature has some only if it has more than one segment's entries."""
    return max(2 * n_entries // segment, 1)


@triton.jit
def sum_by_feature_kernel(feature_starts, numbers, sums, n_kinds, n_entries, n_features, ENTRIES: tl.constexpr):
    """Sum one kind of the numbers (n_kinds, n_entries) of one feature."""
    feature, kind = tl.program_id(0), tl.program_id(1)
    end = tl.load(feature_starts + feature + 1)
    total = tl.zeros((ENTRIES,), tl.float32)
    for e in range(tl.load(feature_starts + feature), end, ENTRIES):
        at = e + tl.arange(0, ENTRIES)
        total += tl.load(numbers + kind.to(tl.int64) * n_entries + at, mask=at < end, other=0.0)
    tl.store(sums + kind.to(tl.int64) * n_features + feature, tl.sum(total))


def gradient_through_centring(d_pre: Tensor, w_enc: Tensor) -> Tensor:
    """Return what the encoder adds to the gradient of the bias that its input has lost (D), before weights change.

    `d_pre` (F) is summed by feature; `w_enc` is (F, D). Pieces of weights in bfloat16 are converted one by one.
    """
    pairs = zip(d_pre.split(_PIECE), w_enc.split(_PIECE), strict=True)
    return -torch.stack([of_features @ weights.float() for of_features, weights in pairs]).sum(0)


SPECIMENS = [
    Specimen(
        sum_by_feature_kernel,
        {"feature_starts": "*i32", "numbers": "*fp32", "sums": "*fp32"}
        | dict.fromkeys(("n_kinds", "n_entries", "n_features"), "i32")
        | {"ENTRIES": "constexpr"},
        {"ENTRIES": SUM_ENTRIES},
        1,
        1,
        "sum by feature",
    )
]
