"""From activations to the few non-zero values: the encoder product, and what is chosen from it.

Choosing for training takes the rounded pre-activations as they are. Exact encoding takes them as a screen only: a
bound on their error says which features might be chosen, and these are recomputed in float64.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeflow.sae import kernels, sparse_inputs
from saeflow.sae.kernels import Bits, Doubles, Floats, Ids, Offsets, in_parallel, ranges

PRODUCT_ENTRIES = 1 << 22
"""Pre-activations one worker holds at a time: they stay in the processor's cache until they are searched."""


_SAMPLE_ROWS = 64
"""Rows of a batch that stand for all of them where a guess will do."""


class SparseValues(NamedTuple):
    """Non-zero values of consecutive tokens, by row; inside a row in ascending order of feature."""

    row_starts: Offsets
    """(B + 1): row r owns entries row_starts[r] to row_starts[r + 1]."""
    feature_ids: Ids
    values: Floats


class FeatureMajor(NamedTuple):
    """The same entries by feature (F + 1 starts); inside a feature in ascending order of row."""

    feature_starts: Offsets
    rows: Ids
    values: Floats


class FeatureStatistics(NamedTuple):
    """Of each feature's non-zero values: (F) each."""

    n_tokens: NDArray[np.int64]
    sum: Doubles
    sum_squares: Doubles
    max: Floats


def fast_dtype(place: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where it is multiplied clearly quicker than float32: by measurement on the processor; else float32."""
    if torch.device(place).type == "cpu":
        return _fast_here()
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


@lru_cache(maxsize=1)
def _fast_here() -> torch.dtype:
    """Processor time of one thread is compared: a busy machine must not change the answer, and with it the weights."""
    seconds = np.min(in_parallel(_product_seconds, range(2)), axis=0)
    return torch.bfloat16 if seconds[1] < 0.75 * seconds[0] else torch.float32


def linear(rows: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (n, D) @ weights (F, D).T + bias (F): (n, F).

    On the processor in float32 by oneDNN, where torch has it: it would ask MKL, which is 1.2 to 1.5 times slower on
    AMD's processors.
    """
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        pair = rows.contiguous(), weights.contiguous()  # for other layouts it has kernels a thousand times slower
        product: Tensor = torch.ops.mkldnn._linear_pointwise(*pair, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(rows, weights, bias)


def _product_seconds(_: int) -> list[float]:
    pairs = [(torch.ones(256, 512, dtype=d), torch.ones(512, 512, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    return [min(_seconds(a, b) for _ in range(8)) for a, b in pairs]


def _seconds(a: Tensor, b: Tensor) -> float:
    began = time.thread_time()
    linear(a, b)
    return time.thread_time() - began


class _Buffers(threading.local):
    """Memory that a worker uses again and again: fresh pages cost more than the search of them."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def take(self, name: str, n: int, dtype: torch.dtype) -> Tensor:
        held = self.held.get(name)
        if held is None or len(held) < n or held.dtype != dtype:
            held = self.held[name] = torch.empty(n, dtype=dtype)
        return held[:n]


_buffers = _Buffers()


class Encoder:
    """Encoder weights (F, D) and bias (F), and the product of centred rows with them in `dtype`.

    A product gives pre-activations, less `cut` (F) where there is one, quickly and with an error that `bounds` and
    `relative_error` bound: what is positive is above its feature's cut.
    """

    def __init__(
        self, w_enc: Tensor, b_enc: Tensor, b_in: Tensor, dtype: torch.dtype, cut: Tensor | None = None
    ) -> None:
        self.w_enc, self.b_enc, self.b_in, self.dtype = w_enc.detach(), b_enc.detach(), b_in.detach(), dtype
        self.cut = cut
        self.bias = self.b_enc if cut is None else self.b_enc.double() - cut.double()

    def with_cut(self, cut: Tensor) -> Encoder:
        """The same with another cut; weights brought into the form of the product stay so."""
        self.prepare()
        other = copy.copy(self)
        other.cut, other.bias = cut, self.b_enc.double() - cut.double()
        for made_of_bias in ("low_b", "base", "bounds", "_of_zeros"):
            other.__dict__.pop(made_of_bias, None)
        return other

    def suited_to(self, x: Tensor) -> Encoder:
        """This one, or one that reads only what is not zero where most of x (B, D) is zero, as after a ReLU."""
        if len(self.w_enc) % sparse_inputs.COLUMNS or not sparse_inputs.mostly_zero(x):
            return self
        return self._of_zeros

    @cached_property
    def _of_zeros(self) -> Encoder:
        return SparseInputEncoder(self.w_enc, self.b_enc, self.b_in, torch.float32, self.cut)

    @cached_property
    def low_w(self) -> Tensor:
        return kernels.converted(self.w_enc, self.dtype)

    @cached_property
    def low_b(self) -> Tensor:
        return self.bias.to(self.dtype)

    def prepare(self) -> None:
        """Bring the weights into the form of the product, before several threads ask for them."""
        _ = self.low_w, self.low_b

    @property
    def chunk_rows(self) -> int:
        return min(max(PRODUCT_ENTRIES // len(self.w_enc), 64), 512)

    @property
    def device_rows(self) -> int:
        """Rows that an accelerator takes at once: it has no cache to stay in, and memory for more."""
        return max(16 * PRODUCT_ENTRIES // len(self.w_enc), 256)

    def bounded(self, x: Tensor) -> tuple[Tensor, Doubles]:
        """Of rows x (n, D) in float32: what `pre_activations` takes, x~, and the two numbers of a row's bound (n, 2).

        These are |x - x~|, with the rounding of x - b_in to float32, and |x~|; too large, never too small.
        """
        centred = x - self.b_in
        low = centred.to(self.dtype)
        wide = low.float()
        of_centred, of_low = centred.norm(dim=1).double(), wide.norm(dim=1).double()
        lost = (wide - centred).norm(dim=1).double() + 2.0**-23 * of_centred
        return low, torch.stack([lost, of_low], 1).mul(1.001).cpu().numpy()

    def pre_activations(self, rows: Tensor) -> Tensor:
        """(n, F), valid until the thread's next call."""
        return linear(rows, self.low_w, self.low_b)

    @property
    def relative_error(self) -> float:
        """Of rounding a pre-activation: product and bias may be rounded one after the other."""
        return 2.05 * 2.0 ** (-8 if self.dtype == torch.bfloat16 else -24)

    @cached_property
    def bounds(self) -> Doubles:
        """(3, F): factors of the two numbers of a row's bound, and what no row changes, in a bound on the error.

        x.w + b - (x~.w~ + b~) = (x - x~).w + x~.(w - w~) + b - b~, each product at most that of the lengths
        (Cauchy-Schwarz); sums of D + 2 terms in float32 add D + 2 of its roundings, here doubled.
        """
        return self._bounds(self.low_w.double(), self.bias.double(), self.low_b.double())

    def _bounds(self, low_w: Tensor, b: Tensor, low_b: Tensor) -> Doubles:
        rounding = (self.w_enc.shape[1] + 2) * 2.0**-23
        w = self.w_enc.double()
        of_low = (w - low_w).norm(dim=1) + rounding * low_w.norm(dim=1)
        fixed = (b - low_b).abs() + (rounding + self.relative_error) * low_b.abs() + 1e-30
        return torch.stack([w.norm(dim=1), of_low, fixed]).mul(1 + 1e-6).cpu().numpy()


class SparseInputEncoder(Encoder):
    """The same for rows that are mostly zero: x.w + (b_enc - b_in.w), with w in bfloat16 and x as it is."""

    @cached_property
    def words(self) -> Ids:
        return sparse_inputs.packed(self.w_enc)

    @cached_property
    def base(self) -> Floats:
        bias = self.bias.float()
        base = torch.empty_like(bias)

        def work(part: tuple[int, int]) -> None:
            rows = slice(*part)
            torch.addmv(bias[rows], self.w_enc[rows], self.b_in, alpha=-1, out=base[rows])

        in_parallel(work, ranges(len(base), 512))
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
        out = _buffers.take("product", shape[0] * shape[1], torch.float32)
        sparse_inputs.product(rows.numpy(), self.words, self.base, out.numpy())
        return out.view(shape)

    @cached_property
    def bounds(self) -> Doubles:
        exact = self.bias.double() - self.w_enc.double() @ self.b_in.double()
        return self._bounds(self.w_enc.bfloat16().double(), exact, torch.from_numpy(self.base).double())


Chosen = tuple[Offsets, Ids, Bits]


def choose(bits: Bits, kernel: Callable[..., None], *how: Any) -> Chosen:
    """Run a selecting kernel on pre-activations and copy out what it chose."""
    starts = np.empty(len(bits) + 1, np.int64)
    ids = _buffers.take("ids", bits.size, torch.int32).numpy()
    out = _buffers.take("bits", bits.size, torch.int16 if bits.itemsize == 2 else torch.int32).numpy()
    kernel(bits, *how, starts, ids, out)
    return starts, ids[: starts[-1]].copy(), out[: starts[-1]].copy()


def joined(parts: list[Any]) -> Any:
    """Put row-wise sparse triples of consecutive rows together."""
    starts, ids, values = zip(*parts, strict=True)
    ends = np.concatenate([[0], *(np.diff(s) for s in starts)]).cumsum()
    return ends.astype(np.int64), np.concatenate(ids), np.concatenate(values)


def select_top(rows: Tensor, encoder: Encoder, k: int) -> SparseValues:
    """Each row's k largest positive pre-activations; among equals, the lower features."""
    encoder.prepare()

    def work(part: tuple[int, int]) -> Chosen:
        bits = kernels.bits_of(encoder.pre_activations(rows[slice(*part)]))
        return choose(bits, kernels.select_top, k)

    starts, ids, bits = joined(in_parallel(work, ranges(len(rows), encoder.chunk_rows)))
    return SparseValues(starts, ids, kernels.floats_of(bits))


def select_positive(rows: Tensor, encoder: Encoder) -> SparseValues:
    """All positive pre-activations, less the encoder's cut."""
    encoder.prepare()

    def work(part: tuple[int, int]) -> Chosen:
        bits = kernels.bits_of(encoder.pre_activations(rows[slice(*part)]))
        return choose(bits, kernels.select_above, np.zeros(len(bits), bits.dtype))

    starts, ids, bits = joined(in_parallel(work, ranges(len(rows), encoder.chunk_rows)))
    return SparseValues(starts, ids, kernels.floats_of(bits))


def share_positive(rows: Tensor, encoder: Encoder) -> float:
    """Share of pre-activations, less the encoder's cut, that are positive, in a sample of the rows."""
    encoder.prepare()
    sample = rows[:: max(len(rows) // _SAMPLE_ROWS, 1)]
    return float((encoder.pre_activations(sample) > 0).float().mean())


def select_batch(rows: Tensor, encoder: Encoder, n: int, guess: float) -> tuple[SparseValues, float]:
    """The n largest positive pre-activations of all rows together; among equals, the first ones.

    `guess` is a number that about n, and rather more, are thought to exceed: it costs time if wrong, and never
    changes what is chosen. Returned is the guess for the next batch; 0 means none.
    """
    dtype = encoder.dtype
    encoder.prepare()
    guess = guess or _sampled_guess(rows, encoder, n)
    while True:
        cut = np.maximum(kernels.cut_bits(np.array([guess]), dtype), 0)

        def work(part: tuple[int, int], cut: Bits = cut) -> Chosen:
            bits = kernels.bits_of(encoder.pre_activations(rows[slice(*part)]))
            return choose(bits, kernels.select_above, np.broadcast_to(cut, len(bits)).copy())

        starts, ids, bits = joined(in_parallel(work, ranges(len(rows), encoder.chunk_rows)))
        if len(bits) >= n or cut[0] == 0:
            break
        guess = 0.6 * guess if guess > 1e-6 else 0.0
    if len(bits) <= n:
        return SparseValues(starts, ids, kernels.floats_of(bits)), 0.0
    kth = np.partition(bits, len(bits) - n)[len(bits) - n]
    keep = bits > kth
    keep[np.flatnonzero(bits == kth)[: n - np.count_nonzero(keep)]] = True
    starts = np.concatenate([[0], keep.cumsum()])[starts]
    next_guess = 0.93 * float(kernels.floats_of(kth[None])[0])
    return SparseValues(starts, ids[keep], kernels.floats_of(bits[keep])), next_guess


def _sampled_guess(rows: Tensor, encoder: Encoder, n: int) -> float:
    sample = rows[:: max(len(rows) // _SAMPLE_ROWS, 1)]
    pre = encoder.pre_activations(sample).float().flatten()
    rank = min(2 * n * len(sample) // len(rows) + 1, pre.numel())
    return max(pre.topk(rank).values[-1].item(), 0.0)


@dataclass(frozen=True)
class Readout:
    """How exact pre-activations become values: those above their feature's threshold, of these the k largest of a token
    if `k` is given; the value is stretch * pre + shift where that is positive. All (F) in float64."""

    thresholds: Doubles
    stretch: Doubles
    shift: Doubles
    k: int | None

    @classmethod
    def plain(cls, thresholds: Tensor, k: int | None = None) -> Readout:
        """The value is the pre-activation."""
        each = thresholds.detach().double().cpu().numpy()
        return cls(each, np.ones_like(each), np.zeros_like(each), k)

    def on(self, place: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Thresholds, stretch and shift there."""
        thresholds, stretch, shift = map(torch.from_numpy, (self.thresholds, self.stretch, self.shift))
        return thresholds.to(place), stretch.to(place), shift.to(place)


def encode(x: Tensor, encoder: Encoder, readout: Readout) -> SparseValues:
    """Exact encoding on the processor: float64 pre-activations chosen, then values rounded to 11 significand bits.

    The encoder's cut must be the readout's thresholds. A row's result depends on nothing but the row.
    """
    encoder = encoder.suited_to(x)
    encoder.prepare()

    def work(part: tuple[int, int]) -> tuple[Offsets, Ids, Floats]:
        return _encode_rows(x[slice(*part)].detach().float(), encoder, readout)

    parts = in_parallel(work, ranges(len(x), encoder.chunk_rows))
    return SparseValues(*joined(parts)) if parts else SparseValues(*nothing())


def nothing() -> tuple[Offsets, Ids, Floats]:
    return np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)


def _encode_rows(x: Tensor, encoder: Encoder, readout: Readout) -> tuple[Offsets, Ids, Floats]:
    rows, row_bounds = encoder.bounded(x)
    relative = encoder.relative_error
    widest = row_bounds @ encoder.bounds[:2].max(1) + encoder.bounds[2].max()
    bits = kernels.bits_of(encoder.pre_activations(rows))
    firsts = np.full(len(x), -np.inf)
    lower = -widest
    if readout.k is not None:
        firsts = _kth(choose(bits, kernels.select_top, readout.k), readout.k)
        lower = np.maximum(firsts * (1 - relative) - widest, 0) - widest
    cuts = kernels.cut_bits(np.where(lower > 0, lower / (1 + relative), lower / (1 - relative)), encoder.dtype)
    starts, ids, near = choose(bits, kernels.select_above, cuts)
    kept, values = np.empty_like(starts), np.empty(len(ids), np.float32)
    kernels.rescore(
        x.numpy(), encoder.b_in.double().numpy(), encoder.w_enc.numpy(), encoder.b_enc.double().numpy(),
        encoder.bounds, row_bounds, relative, firsts, readout.thresholds, readout.stretch, readout.shift,
        readout.k or len(encoder.w_enc) + 1, starts, ids, kernels.floats_of(near), kept, values,
    )  # fmt: skip
    return kept, ids[: kept[-1]], values[: kept[-1]]


def _kth(top: Chosen, k: int) -> Doubles:
    """Each row's k-th largest value; 0 where fewer are positive."""
    starts, _, bits = top
    full = np.diff(starts) == k
    kth = np.zeros(len(full))
    kth[full] = np.minimum.reduceat(kernels.floats_of(bits), starts[:-1][full]) if full.any() else 0
    return kth


def encode_by_screen(x: Tensor, encoder: Encoder, readout: Readout) -> SparseValues:
    """The same on an accelerator: a quick product of all features, then candidates alone in float64.

    `device_rows` rows at a time; what is sorted is sorted there.
    """
    parts = [_screened(x[start:stop], encoder, readout) for start, stop in ranges(len(x), encoder.device_rows)]
    return SparseValues(*joined(parts)) if parts else SparseValues(*nothing())


def _screened(x: Tensor, encoder: Encoder, readout: Readout) -> tuple[Offsets, Ids, Floats]:
    place = encoder.w_enc.device
    thresholds, stretch, shift = readout.on(place)
    low, row_bounds = encoder.bounded(x.float())
    pre = encoder.pre_activations(low).float()
    widest = torch.from_numpy(row_bounds @ encoder.bounds[:2].max(1) + encoder.bounds[2].max()).to(place)
    least = -widest
    if readout.k is not None:
        kth = pre.topk(min(readout.k, pre.shape[1]), dim=1).values[:, -1].double()
        least = (kth * (1 - encoder.relative_error) - widest).clamp(min=0) - widest
    cut = least - encoder.relative_error * least.abs() - 1e-30
    rows, ids = (pre.double() > cut[:, None]).nonzero(as_tuple=True)
    exact = _exact(x, encoder, rows, ids)
    keep = exact > thresholds[ids]
    if readout.k is not None:
        keep &= _places_in_rows(rows, torch.where(keep, exact, -torch.inf), len(x)) < readout.k
    values = rounded((stretch[ids] * exact + shift[ids]).clamp(min=0))
    keep &= values > 0
    starts = torch.bincount(rows[keep], minlength=len(x)).cumsum(0).cpu().numpy()
    return np.concatenate([[0], starts]), ids[keep].int().cpu().numpy(), values[keep].cpu().numpy()


def _exact(x: Tensor, encoder: Encoder, rows: Tensor, ids: Tensor) -> Tensor:
    """float64 pre-activations of these entries, so many at once that they take as much memory as the product."""
    centred, n = x.double() - encoder.b_in.double(), max(PRODUCT_ENTRIES // x.shape[1], 1)
    pieces = [(centred[r] * encoder.w_enc[f].double()).sum(1) for r, f in zip(rows.split(n), ids.split(n), strict=True)]
    dots = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.float64, device=rows.device)
    return dots + encoder.b_enc.double()[ids]


def _places_in_rows(rows: Tensor, values: Tensor, n_rows: int) -> Tensor:
    """Place of each entry in its row by value, the largest first; among equals in the order given. Rows are sorted."""
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    counts = torch.bincount(rows, minlength=n_rows)
    first = counts.cumsum(0) - counts
    places = torch.empty_like(rows)
    places[order] = torch.arange(len(rows), device=rows.device) - first[rows]
    return places


def encode_anywhere(x: Tensor, w_enc: Tensor, b_enc: Tensor, b_in: Tensor, readout: Readout) -> SparseValues:
    """The same on any device by a dense float64 product, for comparison."""
    thresholds, stretch, shift = readout.on(w_enc.device)
    parts = []
    for start, stop in ranges(len(x), 1024):
        pre = (x[start:stop].double() - b_in.double()) @ w_enc.double().t() + b_enc.double()
        keep = pre > thresholds
        if readout.k is not None:
            places = pre.sort(dim=1, descending=True, stable=True).indices[:, : readout.k]
            keep &= torch.zeros_like(keep).scatter_(1, places, True)
        values = rounded(torch.where(keep, (stretch * pre + shift).clamp(min=0), 0.0))
        rows, ids = values.nonzero(as_tuple=True)
        starts = torch.bincount(rows, minlength=stop - start).cumsum(0).cpu().numpy()
        parts.append((np.concatenate([[0], starts]), ids.int().cpu().numpy(), values[rows, ids].cpu().numpy()))
    return SparseValues(*joined(parts)) if parts else SparseValues(*nothing())


def rounded(values: Tensor) -> Tensor:
    """float64 to float32 numbers of 11 significand bits, halves to even; the exponent is kept."""
    bits = values.view(torch.int64)
    bits = bits + (1 << 41) - 1 + ((bits >> 42) & 1)
    return ((bits >> 42) << 42).view(torch.float64).float()


def feature_major(sparse: SparseValues, n_features: int) -> FeatureMajor:
    """Sort entries by feature, then row."""
    starts, rows, values = transpose(sparse.row_starts, sparse.feature_ids, sparse.values[None], n_features)
    return FeatureMajor(starts, rows, values[0])


def transpose(row_starts: Offsets, ids: Ids, values: Floats, n_features: int) -> tuple[Offsets, Ids, Floats]:
    """Feature starts (F + 1), rows (nnz) and values (n, nnz) in the order of features; a stable counting sort."""
    parts = ranges(len(row_starts) - 1, max(-(-len(row_starts) // torch.get_num_threads()), 1))
    counts = np.array(
        [np.bincount(ids[row_starts[a] : row_starts[b]], minlength=n_features) for a, b in parts]
        or [np.zeros(n_features, np.int64)]
    )
    feature_starts = np.concatenate([[0], counts.sum(0).cumsum()]).astype(np.int64)
    positions = feature_starts[:-1] + np.concatenate([np.zeros((1, n_features), np.int64), counts[:-1].cumsum(0)])
    rows, out = np.empty(len(ids), np.int32), np.empty_like(values)

    def work(part: int) -> None:
        kernels.transpose(*parts[part], row_starts, ids, values, positions[part], rows, out)

    in_parallel(work, range(len(parts)))
    return feature_starts, rows, out


def feature_statistics(sparse: SparseValues, n_features: int) -> FeatureStatistics:
    """Count, sum, sum of squares and maximum of each feature's values, added in the order of rows."""
    out = FeatureStatistics(
        np.zeros(n_features, np.int64), np.zeros(n_features), np.zeros(n_features), np.zeros(n_features, np.float32)
    )
    kernels.statistics(sparse.feature_ids, sparse.values, *out)
    return out
