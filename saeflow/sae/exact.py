"""Exact encoding: values that depend neither on the batch, nor on the device, nor on the precision of the product.

The quick product only screens: a bound on its error says which features might be chosen, and their pre-activations
are computed again in float64. A training step takes its entries as the product gives them. Values can be sorted by
feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeflow.activations.sparse_values import SparseRows, SparseValues, concatenated
from saeflow.runtime.ranks import ALONE, Ranks
from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae import kernels
from saeflow.sae.encoder import PRODUCT_ENTRIES, Encoder, thread_buffers
from saeflow.sae.kernels import Bits, Doubles, Floats, Ids, Offsets


class FeatureMajor(NamedTuple):
    """Entries by feature; inside a feature in ascending order of row."""

    feature_starts: Offsets
    """(F + 1): feature f owns entries feature_starts[f] to feature_starts[f + 1]."""
    rows: Ids
    values: Floats


class FeatureStatistics(NamedTuple):
    """Number, sum, sum of squares and strongest of each feature's non-zero values, (F) each."""

    n_tokens: NDArray[np.int64]
    sum: Doubles
    sum_squares: Doubles
    strongest: Floats
    """The value of largest magnitude, with its sign; of two such values the positive one."""


def feature_major(sparse: SparseValues, n_features: int, threads: int = 1) -> FeatureMajor:
    """Return the entries sorted by feature, then row."""
    starts, rows, values = sorted_by_feature(
        sparse.row_starts, sparse.feature_ids, sparse.values[None], n_features, threads
    )
    return FeatureMajor(starts, rows, values[0])


def sorted_by_feature(
    row_starts: Offsets, ids: Ids, values: Floats, n_features: int, threads: int
) -> tuple[Offsets, Ids, Floats]:
    """Return feature starts (F + 1), rows (nnz) and values (n, nnz) in the order of features, by a stable sort."""
    parts = ranges(len(row_starts) - 1, max(-(-len(row_starts) // threads), 1))
    counts = np.array(
        [np.bincount(ids[row_starts[a] : row_starts[b]], minlength=n_features) for a, b in parts]
        or [np.zeros(n_features, np.int64)]
    )
    feature_starts = np.concatenate([[0], counts.sum(0).cumsum()]).astype(np.int64)
    positions = feature_starts[:-1] + np.concatenate([np.zeros((1, n_features), np.int64), counts[:-1].cumsum(0)])
    rows, out = np.empty(len(ids), np.int32), np.empty_like(values)

    def place_part(part: int) -> None:
        kernels.transpose(*parts[part], row_starts, ids, values, positions[part], rows, out)

    in_parallel(place_part, range(len(parts)), threads)
    return feature_starts, rows, out


def feature_statistics(sparse: SparseValues, n_features: int) -> FeatureStatistics:
    """Return each feature's statistics; its values are added in the order of rows."""
    out = FeatureStatistics(
        np.zeros(n_features, np.int64), np.zeros(n_features), np.zeros(n_features), np.zeros(n_features, np.float32)
    )
    kernels.statistics(sparse.feature_ids, sparse.values, *out)
    return out


_GUESS_ROWS = 64
"""Rows of a batch that stand for all of them where a guess will do."""


def chosen_entries(bits: Bits, kernel: Callable[..., None], argument: Any) -> SparseValues:
    """Return the entries, with their bits as values, that a choosing kernel takes from pre-activations (n, F)."""
    starts = np.empty(len(bits) + 1, np.int64)
    ids = thread_buffers.take("ids", bits.size, torch.int32).numpy()
    out = thread_buffers.take("bits", bits.size, torch.int16 if bits.itemsize == 2 else torch.int32).numpy()
    kernel(bits, argument, starts, ids, out)
    return SparseRows(starts, ids[: starts[-1]].copy(), out[: starts[-1]].copy())


def top_entries(rows: Tensor, encoder: Encoder, k: int, signed: bool) -> SparseValues:
    """Return each row's k largest positive pre-activations, or if `signed` those of largest magnitude.

    Among equals, those of the lower features are chosen.
    """
    return _with_floats(_chosen_by_workers(rows, encoder, kernels.select_top, lambda bits: k, signed))


def positive_entries(rows: Tensor, encoder: Encoder) -> SparseValues:
    """Return all positive pre-activations, less the encoder's cut."""
    return _with_floats(_chosen_above(rows, encoder, _cut_above(0.0, encoder)))


def share_positive(rows: Tensor, encoder: Encoder) -> float:
    """Return the share of pre-activations, less the encoder's cut, that are positive, in a sample of the rows."""
    encoder.prepare()
    return float((encoder.pre_activations(_sample(rows)) > 0).float().mean())


def top_entries_of_batch(
    rows: Tensor, encoder: Encoder, n: int, guess: float, ranks: Ranks = ALONE
) -> tuple[SparseValues, float]:
    """Return the n largest positive pre-activations of all rows together, and a guess for the next batch.

    Among equals the first ones are chosen. `guess` is a number that about n pre-activations, and rather more, are
    thought to exceed; 0 means none. A wrong guess costs time and never changes what is chosen. Of several ranks, each
    returns all its pre-activations above a number that n or more exceed.
    """
    encoder.prepare()
    guess = guess or ranks.total(_sampled_guess(rows, encoder, n // ranks.n)) / ranks.n
    while True:
        cut = _cut_above(guess, encoder)
        starts, ids, bits = _chosen_above(rows, encoder, cut)
        if ranks.total(len(bits)) >= n or cut[0] == 0:
            break
        guess = 0.6 * guess if guess > 1e-6 else 0.0
    if ranks.n > 1 or len(bits) <= n:
        return _with_floats(SparseRows(starts, ids, bits)), 0.0
    kth = np.partition(bits, len(bits) - n)[len(bits) - n]
    keep = bits > kth
    keep[np.flatnonzero(bits == kth)[: n - np.count_nonzero(keep)]] = True
    starts = np.concatenate([[0], keep.cumsum()])[starts]
    next_guess = 0.93 * float(kernels.floats_of(kth[None])[0])
    return _with_floats(SparseRows(starts, ids[keep], bits[keep])), next_guess


def _with_floats(entries: SparseValues) -> SparseValues:
    return entries._replace(values=kernels.floats_of(entries.values))


def _cut_above(number: float, encoder: Encoder) -> Bits:
    """(1): bits that all bits of larger positive numbers exceed."""
    return np.maximum(kernels.cut_bits(np.array([number]), encoder.dtype), 0)


def _chosen_above(rows: Tensor, encoder: Encoder, cut: Bits) -> SparseValues:
    return _chosen_by_workers(rows, encoder, kernels.select_above, lambda bits: np.broadcast_to(cut, len(bits)).copy())


def _chosen_by_workers(
    rows: Tensor, encoder: Encoder, kernel: Callable[..., None], argument_for: Callable[[Bits], Any],
    signed: bool = False,
) -> SparseValues:  # fmt: skip
    """Run a choosing kernel, whose argument may depend on the chunk, on the pre-activations of all rows."""
    encoder.prepare()

    def choose_in_chunk(part: tuple[int, int]) -> SparseValues:
        bits = kernels.bits_of(encoder.pre_activations(rows[slice(*part)]))
        if not signed:
            return chosen_entries(bits, kernel, argument_for(bits))
        found = chosen_entries(bits & np.iinfo(bits.dtype).max, kernel, argument_for(bits))
        return found._replace(values=bits[found.rows, found.feature_ids])

    return concatenated(in_parallel(choose_in_chunk, ranges(len(rows), encoder.chunk_rows), encoder.threads))


def _sampled_guess(rows: Tensor, encoder: Encoder, n: int) -> float:
    sample = _sample(rows)
    pre = encoder.pre_activations(sample).float().flatten()
    rank = min(2 * n * len(sample) // len(rows) + 1, pre.numel())
    return max(pre.topk(rank).values[-1].item(), 0.0)


def _sample(rows: Tensor) -> Tensor:
    return rows[:: max(len(rows) // _GUESS_ROWS, 1)]


@dataclass(frozen=True)
class ActivationFunction:
    """How an exact pre-activation becomes a value: stretch * pre + shift where that is positive, else 0.

    Only pre-activations above their feature's threshold count; if `k` is given, only the k largest of a token. If
    `signed`, all this is said of magnitudes, and a value has the sign of its pre-activation. All arrays (F) in float64.
    """

    thresholds: Doubles
    stretch: Doubles
    shift: Doubles
    k: int | None
    signed: bool = False

    @classmethod
    def identity(cls, thresholds: Tensor, k: int | None = None, signed: bool = False) -> ActivationFunction:
        """Return the function whose value is the pre-activation itself."""
        wide = thresholds.detach().double().cpu().numpy()
        return cls(wide, np.ones_like(wide), np.zeros_like(wide), k, signed)

    def on(self, place: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return thresholds, stretch and shift on a device."""
        thresholds, stretch, shift = map(torch.from_numpy, (self.thresholds, self.stretch, self.shift))
        return thresholds.to(place), stretch.to(place), shift.to(place)


def encode_on_processor(x: Tensor, encoder: Encoder, function: ActivationFunction) -> SparseValues:
    """Return the values of rows x (B, D). The encoder's cut must be the function's thresholds."""
    encoder = encoder.suited_to(x)
    encoder.prepare()

    def encode_chunk(part: tuple[int, int]) -> SparseValues:
        return _encode_rows(x[slice(*part)].detach().float(), encoder, function)

    return concatenated(in_parallel(encode_chunk, ranges(len(x), encoder.chunk_rows), encoder.threads))


def _encode_rows(x: Tensor, encoder: Encoder, function: ActivationFunction) -> SparseValues:
    rows, row_bounds = encoder.bounded(x)
    relative = encoder.relative_error
    widest = row_bounds @ encoder.bounds[:2].max(1) + encoder.bounds[2].max()
    bits = kernels.bits_of(encoder.pre_activations(rows))
    if function.signed:
        bits &= np.iinfo(bits.dtype).max  # the sign bit goes: magnitudes have the same bound on their error
    firsts = np.full(len(x), -np.inf)
    lower = -widest
    if function.k is not None:
        firsts = _kth_values(chosen_entries(bits, kernels.select_top, function.k), function.k)
        lower = np.maximum(firsts * (1 - relative) - widest, 0) - widest
    cuts = kernels.cut_bits(np.where(lower > 0, lower / (1 + relative), lower / (1 - relative)), encoder.dtype)
    starts, ids, near = chosen_entries(bits, kernels.select_above, cuts)
    kept, values = np.empty_like(starts), np.empty(len(ids), np.float32)
    kernels.rescore(
        x.numpy(), encoder.b_in.double().numpy(), encoder.w_enc.numpy(), encoder.b_enc.double().numpy(),
        encoder.bounds, row_bounds, relative, firsts, function.thresholds, function.stretch, function.shift,
        function.k or len(encoder.w_enc) + 1, function.signed, starts, ids, kernels.floats_of(near), kept, values,
    )  # fmt: skip
    return SparseRows(kept, ids[: kept[-1]], values[: kept[-1]])


def _kth_values(top: SparseValues, k: int) -> Doubles:
    """Return each row's k-th largest value; 0 where fewer are positive."""
    starts, _, bits = top
    full = np.diff(starts) == k
    kth = np.zeros(len(full))
    kth[full] = np.minimum.reduceat(kernels.floats_of(bits), starts[:-1][full]) if full.any() else 0
    return kth


def encode_on_accelerator(x: Tensor, encoder: Encoder, function: ActivationFunction) -> SparseValues:
    """Return the values of rows x (B, D), computed and sorted on their device, `device_rows` rows at a time."""
    parts = ranges(len(x), encoder.device_rows)
    return concatenated([_encode_on_device(x[start:stop], encoder, function) for start, stop in parts])


def _encode_on_device(x: Tensor, encoder: Encoder, function: ActivationFunction) -> SparseValues:
    rows, ids = screened(x, encoder, function)
    return values_of_entries(rows, ids, _exact_pre_activations(x, encoder, rows, ids), function, len(x))


def screened(x: Tensor, encoder: Encoder, function: ActivationFunction) -> tuple[Tensor, Tensor]:
    """Return rows and features (n), in this order, of all entries that may be values of x (B, D)."""
    place = encoder.w_enc.device
    low, row_bounds = encoder.bounded(x.float())
    pre = encoder.pre_activations(low).float()
    if function.signed:
        pre = pre.abs()
    widest = torch.from_numpy(row_bounds @ encoder.bounds[:2].max(1) + encoder.bounds[2].max()).to(place)
    least = -widest
    if function.k is not None:
        kth = pre.topk(min(function.k, pre.shape[1]), dim=1).values[:, -1].double()
        least = (kth * (1 - encoder.relative_error) - widest).clamp(min=0) - widest
    cut = least - encoder.relative_error * least.abs() - 1e-30
    rows, ids = (pre.double() > cut[:, None]).nonzero(as_tuple=True)
    return rows, ids


def values_of_entries(
    rows: Tensor, ids: Tensor, exact: Tensor, function: ActivationFunction, n_rows: int
) -> SparseValues:
    """Return the values among entries (n), from their rows, features and exact pre-activations."""
    thresholds, stretch, shift = function.on(rows.device)
    signs = exact.sign() if function.signed else 1.0
    exact = exact * signs
    keep = exact > thresholds[ids]
    if function.k is not None:
        keep &= _places_in_rows(rows, torch.where(keep, exact, -torch.inf), n_rows) < function.k
    values = rounded((stretch[ids] * exact + shift[ids]).clamp(min=0))
    keep &= values > 0
    values = (values * signs).float()
    return _from_device(rows[keep], ids[keep], values[keep], n_rows)


def _exact_pre_activations(x: Tensor, encoder: Encoder, rows: Tensor, ids: Tensor) -> Tensor:
    """Return float64 pre-activations of these entries; their memory at any time is that of the product."""
    centred, n = x.double() - encoder.b_in.double(), max(PRODUCT_ENTRIES // x.shape[1], 1)
    chunks = zip(rows.split(n), ids.split(n), strict=True)
    dots = [(centred[r] * encoder.w_enc[f].double()).sum(1) for r, f in chunks]
    none = torch.empty(0, dtype=torch.float64, device=rows.device)
    return (torch.cat(dots) if dots else none) + encoder.b_enc.double()[ids]


def _places_in_rows(rows: Tensor, values: Tensor, n_rows: int) -> Tensor:
    """Return the place of each entry in its row by value, largest first, equals in the order given; rows are sorted."""
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    counts = torch.bincount(rows, minlength=n_rows)
    first = counts.cumsum(0) - counts
    places = torch.empty_like(rows)
    places[order] = torch.arange(len(rows), device=rows.device) - first[rows]
    return places


def _from_device(rows: Tensor, ids: Tensor, values: Tensor, n_rows: int) -> SparseValues:
    starts = torch.bincount(rows, minlength=n_rows).cumsum(0).cpu().numpy()
    return SparseRows(np.concatenate([[0], starts]), ids.int().cpu().numpy(), values.cpu().numpy())


def rounded(values: Tensor) -> Tensor:
    """Return float64 values as float32 numbers of 11 significand bits, halves to even; the exponent is kept."""
    bits = values.view(torch.int64)
    bits = bits + (1 << 41) - 1 + ((bits >> 42) & 1)
    return ((bits >> 42) << 42).view(torch.float64).float()
