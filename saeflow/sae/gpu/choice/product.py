"""The encoder product of a batch in tiles: a tile's pre-activations are searched where they are made, never stored.

A number of size `bits` is a float32 of at least zero, read as int32: such integers have the order of the floats. A
search says from which bits on an entry matters (its `floor`), and among entries of exactly those bits, how far from
the last feature it must be (`tie_floor`): so entries are in one order without equals, lower features first.

Every kernel here sums a pre-activation in the same order, by the same kind of instruction, whichever rows share the
tile. So it has the same bits in every search, and what is chosen does not depend on guesses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as tf
import triton
import triton.language as tl
from torch import Tensor

from saeflow.sae.gpu.memory import WIDTH_MULTIPLE
from saeflow.sae.gpu.specimens import Specimen, typed


class Blocks(NamedTuple):
    """Rows and features of a tile, numbers of a row multiplied at a time, and how the machine shares the tiles."""

    rows: int
    features: int
    width: int
    warps: int
    stages: int
    programs: int
    """Programs on one multiprocessor; each takes every n-th tile."""


_LARGE = {80: Blocks(128, 128, 64, 8, 3, 1), 90: Blocks(256, 128, 64, 8, 3, 1), 100: Blocks(256, 128, 64, 8, 3, 1)}
"""Blocks of a search in bfloat16 by the GPU's capability; others take those of 80. A thread then holds 64 or 128 sums,
the most that leave it registers for the search; 128 rows of 256 features spill. Shared memory: 64 to 144 KiB."""
_SMALL = Blocks(128, 64, 64, 8, 3, 1)
"""Blocks in bfloat16 of kernels that need more registers for an entry: a thread holds 32 sums."""
_FLOAT32 = Blocks(64, 64, 32, 4, 3, 2)
"""Blocks in float32, which has no tensor cores: a thread holds 32 sums and what it multiplies."""

GROUP = 8
"""Blocks of rows that pass over the features together. A wave of 132 tiles is then about as many rows as features, and
reads the fewest weights: those of 65,536 features and 8,192 rows four times."""

DIGIT_BITS = 11
"""Bits of a digit of a histogram: eight of them are the exponent, so that the first digit parts floats by an eighth."""


@dataclass(frozen=True)
class Product:
    """The pre-activations of a batch less their cuts, low @ w_low.T + bias, and how they are computed."""

    low: Tensor
    """Centred batch (B, D), bfloat16 or float32; D is a multiple of 64."""
    w_low: Tensor
    """Encoder weights (F, D), of that type."""
    bias: Tensor
    """Encoder bias (F), less the cut if there is one, float32."""
    signed: bool = False
    """True if sizes are magnitudes, and not the numbers themselves."""
    large: Blocks | None = None
    small: Blocks | None = None
    """Blocks other than those of the GPU at hand, and how many programs run at a time."""
    n_programs: int = 0

    @classmethod
    def of(cls, low: Tensor, w_low: Tensor, bias: Tensor, signed: bool = False) -> Product:
        """Return the product of rows of any width, which are copied unless they are `filled_up`."""
        return cls(filled_up(low), filled_up(w_low), bias, signed)

    def less(self, cut: Tensor) -> Product:
        """Return the product less a cut (F)."""
        return replace(self, bias=self.bias - cut)

    @property
    def n_rows(self) -> int:
        return len(self.low)

    @property
    def n_features(self) -> int:
        return len(self.w_low)

    def launch(self, kernel: Any, is_small: bool, arguments: dict[str, Any]) -> None:
        """Run a kernel over tiles of the rows that `row_list` names."""
        blocks = self._small_blocks() if is_small else self._large_blocks()
        tiles = triton.cdiv(self.n_rows, blocks.rows) * triton.cdiv(self.n_features, blocks.features)
        n_programs = self.n_programs or blocks.programs * _multiprocessors(self.low.device)
        kernel[(min(tiles, n_programs),)](
            low=self.low, w_low=self.w_low, bias=self.bias, n_features=self.n_features,
            width=self.low.shape[1], SIGNED=self.signed, GROUP=GROUP,
            WIDEN=self.low.device.type == "cpu",  # Triton's interpreter multiplies bfloat16 as if it were int16
            ROWS=blocks.rows, FEATURES=blocks.features, WIDTH=blocks.width,
            num_warps=blocks.warps, num_stages=blocks.stages, **arguments,
        )  # fmt: skip

    def _large_blocks(self) -> Blocks:
        if self.large is not None or self.low.dtype == torch.float32:
            return self.large or _FLOAT32
        on_gpu = self.low.device.type == "cuda"
        capability = torch.cuda.get_device_capability(self.low.device)[0] * 10 if on_gpu else 90
        return _LARGE.get(capability, _LARGE[80])

    def _small_blocks(self) -> Blocks:
        return self.small or (_FLOAT32 if self.low.dtype == torch.float32 else _SMALL)


def filled_up(rows: Tensor) -> Tensor:
    """Return rows (n, D) with zeros up to the width that kernels multiply: the rows themselves if they have it."""
    missing = -rows.shape[1] % WIDTH_MULTIPLE
    return tf.pad(rows, (0, missing)) if missing else rows


def _multiprocessors(place: torch.device) -> int:
    """Return how many programs run at a time; few for the interpreter, which runs one after the other."""
    return torch.cuda.get_device_properties(place).multi_processor_count if place.type == "cuda" else 2


class RowList(NamedTuple):
    """Numbers of rows (B) int32, of which the first `n` (1) int32 count."""

    rows: Tensor
    n: Tensor


@dataclass(frozen=True)
class Floor:
    """From where on entries matter, of each row (B), or of the whole batch (1)."""

    bits: Tensor
    """int32: least size. 0 means 1: only sizes above zero matter."""
    tie: Tensor
    """int64: of entries of exactly that size, least distance from the last place (`last_place`)."""


@dataclass(frozen=True)
class Candidates:
    """Entries from the floor on, in any order: of each row (B, C), or of the whole batch (1, C)."""

    counts: Tensor
    """int32 (B) or (1): entries from the floor on. Those beyond C are counted, not kept."""
    ids: Tensor
    values: Tensor
    """Pre-activations, float32."""
    rows: Tensor | None
    """The row of each entry, if the whole batch shares the buffer."""

    @classmethod
    def room_for(cls, product: Product, by_row: bool, capacity: int) -> Candidates:
        shape, place = (product.n_rows if by_row else 1, capacity), product.low.device
        ids = torch.empty(shape, dtype=torch.int32, device=place)
        counts = torch.zeros(shape[0], dtype=torch.int32, device=place)
        values = torch.empty(shape, device=place)
        return cls(counts, ids, values, None if by_row else torch.empty_like(ids))

    @property
    def capacity(self) -> int:
        return self.ids.shape[1]


def last_place(product: Product, by_row: bool) -> int:
    """Return a number of the form 2^n - 1 that no place of an entry exceeds: its feature, or row * F + feature."""
    places = product.n_features if by_row else product.n_features * product.n_rows
    return (1 << (places - 1).bit_length()) - 1


def collect(product: Product, listed: RowList, floor: Floor, has_ties: bool, candidates: Candidates) -> None:
    """Append all entries of the listed rows from the floor on to `candidates`."""
    by_row = candidates.rows is None
    product.launch(candidates_kernel, has_ties, {
        "row_list": listed.rows, "n_listed": listed.n, "floor": floor.bits, "tie_floor": floor.tie,
        "counts": candidates.counts, "cand_rows": candidates.ids if candidates.rows is None else candidates.rows,
        "cand_ids": candidates.ids, "cand_values": candidates.values, "capacity": candidates.capacity,
        "last": last_place(product, by_row), "BY_ROW": by_row, "TIES": has_ties,
    })  # fmt: skip


def add_histograms(
    product: Product, listed: RowList, floor: Floor, digit: tuple[int, int], of_places: bool, histograms: Tensor,
    by_row: bool,
) -> None:  # fmt: skip
    """Count the listed rows' entries by a digit, if their higher digits are those of the floor.

    A digit is given by its lowest bit and the bit above its highest; the floor has zeros from there on. Digits are of
    sizes, or if `of_places`, of distances from the last place, among entries of exactly the floor's size.
    `histograms` (n, 2^11) int32 gets those of row r in its row r modulo n.
    """
    product.launch(histogram_kernel, True, {
        "row_list": listed.rows, "n_listed": listed.n, "floor": floor.bits, "tie_floor": floor.tie,
        "histograms": histograms, "n_histograms": len(histograms), "shift": digit[0], "high": digit[1],
        "last": last_place(product, by_row), "BY_ROW": by_row, "OF_PLACES": of_places, "BINS": 1 << DIGIT_BITS,
    })  # fmt: skip


@triton.jit
def _tile_at(number, n_rows, n_features, GROUP: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """Return block of rows and block of features of a tile: GROUP blocks of rows share a block of features."""
    in_group = GROUP * tl.cdiv(n_features, FEATURES)
    first = number // in_group * GROUP
    height = tl.minimum(tl.cdiv(n_rows, ROWS) - first, GROUP)
    return first + number % in_group % height, number % in_group // height


@triton.jit
def _pre_activations(
    low, w_low, bias, rows, features, width,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    inner = tl.arange(0, WIDTH)
    x_at = low + rows.to(tl.int64)[:, None] * width + inner[None, :]
    w_at = w_low + features.to(tl.int64)[None, :] * width + inner[:, None]
    pre = tl.zeros((ROWS, FEATURES), tl.float32) + tl.load(bias + features)[None, :]
    for _ in range(0, width, WIDTH):
        x, w = tl.load(x_at), tl.load(w_at)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        pre = tl.dot(x, w, pre, input_precision="ieee")
        x_at += WIDTH
        w_at += WIDTH
    return pre


@triton.jit
def _size_bits(pre, SIGNED: tl.constexpr):
    bits = pre.to(tl.int32, bitcast=True)
    if SIGNED:
        bits = bits & 0x7FFFFFFF
        bits = tl.where(bits == 0x7F800000, 0, bits)  # a bias of minus infinity leaves a feature out
    return bits


@triton.jit
def _from_last_place(rows, features, last, n_features, BY_ROW: tl.constexpr):
    """Return how far each entry is from the last place (int64)."""
    if BY_ROW:
        return last - features.to(tl.int64)[None, :] + (rows * 0).to(tl.int64)[:, None]
    return (last - rows.to(tl.int64) * n_features)[:, None] - features[None, :]


@triton.jit
def _inside(n, WORDS: tl.constexpr):
    """Return words (1, WORDS) of which the first n bits are set."""
    rest = n - tl.arange(0, WORDS)[None, :] * 32
    return tl.where(rest >= 32, -1, (1 << tl.minimum(tl.maximum(rest, 0), 31)) - 1)


@triton.jit
def _lowest_bits(words, WORDS: tl.constexpr):
    """Return the place of the lowest bit of each row of words (ROWS, WORDS), and the words without it."""
    number = tl.arange(0, WORDS)[None, :]
    lowest = words & -words
    exponent = lowest.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23
    place = tl.min(tl.where(words != 0, number * 32 + exponent - 127, WORDS * 32), 1)
    return place, tl.where(number == (place // 32)[:, None], words & (words - 1), words)


@triton.jit
def _n_bits(words):
    """Return how many bits each row of words has, counted in pairs, then in fours and so on."""
    bits = words.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return tl.sum((((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101 >> 24).to(tl.int32), 1)


@triton.jit(do_not_specialize_on_alignment=["n_listed"])
def candidates_kernel(
    low, w_low, bias, row_list, n_listed, floor, tie_floor, counts, cand_rows, cand_ids, cand_values,
    n_features, width, capacity, last,
    BY_ROW: tl.constexpr, SIGNED: tl.constexpr, TIES: tl.constexpr, WIDEN: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Append entries from the floor on: see `collect`.

    Few of a tile are. Each row's are marked in bits; then one entry of every row is taken at a time.
    """
    WORDS: tl.constexpr = FEATURES // 32
    n = tl.load(n_listed)
    for number in range(tl.program_id(0), tl.cdiv(n, ROWS) * tl.cdiv(n_features, FEATURES), tl.num_programs(0)):
        row_block, feature_block = _tile_at(number, n, n_features, GROUP, ROWS, FEATURES)
        listed = row_block * ROWS + tl.arange(0, ROWS)
        rows = tl.load(row_list + listed, mask=listed < n, other=0)
        column = tl.arange(0, FEATURES)
        first = feature_block * FEATURES
        features = tl.minimum(first + column, n_features - 1)
        pre = _pre_activations(low, w_low, bias, rows, features, width, WIDEN, ROWS, FEATURES, WIDTH)

        bits = _size_bits(pre, SIGNED)
        state = rows if BY_ROW else rows * 0
        least = tl.maximum(tl.load(floor + state), 1)[:, None]
        keep = bits >= least
        if TIES:
            distance = _from_last_place(rows, features, last, n_features, BY_ROW)
            keep = keep & ((bits > least) | (distance >= tl.load(tie_floor + state)[:, None]))
        words = tl.sum((keep.to(tl.int32) << (column % 32)[None, :]).reshape(ROWS, WORDS, 32), 2)
        words = tl.where((listed < n)[:, None], words & _inside(n_features - first, WORDS), 0)
        in_row = _n_bits(words)
        if BY_ROW:
            place = tl.atomic_add(counts + rows, in_row, mask=in_row > 0, sem="relaxed")
            place = tl.where(in_row > 0, place, 0)  # it is undefined where nothing was added
            begin = rows.to(tl.int64) * capacity
        else:
            place = tl.cumsum(in_row, 0) - in_row + tl.atomic_add(counts, tl.sum(in_row), sem="relaxed")
            begin = (rows * 0).to(tl.int64)
        stop = tl.minimum(place + in_row, capacity)
        for _ in range(tl.max(stop - place)):
            taken, words = _lowest_bits(words, WORDS)
            value = tl.sum(tl.where(column[None, :] == taken[:, None], pre.to(tl.int32, bitcast=True), 0), 1)
            tl.store(cand_ids + begin + place, first + taken, mask=place < stop)
            tl.store(cand_values + begin + place, value.to(tl.float32, bitcast=True), mask=place < stop)
            if not BY_ROW:
                tl.store(cand_rows + begin + place, rows, mask=place < stop)
            place += 1


@triton.jit(do_not_specialize=["shift", "high"], do_not_specialize_on_alignment=["n_listed"])
def histogram_kernel(
    low, w_low, bias, row_list, n_listed, floor, tie_floor, histograms,
    n_features, width, n_histograms, shift, high, last,
    BY_ROW: tl.constexpr, SIGNED: tl.constexpr, OF_PLACES: tl.constexpr, WIDEN: tl.constexpr,
    BINS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Count entries by a digit: see `add_histograms`. The floor's lower digits are zero."""
    n = tl.load(n_listed)
    for number in range(tl.program_id(0), tl.cdiv(n, ROWS) * tl.cdiv(n_features, FEATURES), tl.num_programs(0)):
        row_block, feature_block = _tile_at(number, n, n_features, GROUP, ROWS, FEATURES)
        listed = row_block * ROWS + tl.arange(0, ROWS)
        rows = tl.load(row_list + listed, mask=listed < n, other=0)
        unclipped = feature_block * FEATURES + tl.arange(0, FEATURES)
        features = tl.minimum(unclipped, n_features - 1)
        pre = _pre_activations(low, w_low, bias, rows, features, width, WIDEN, ROWS, FEATURES, WIDTH)

        bits = _size_bits(pre, SIGNED)
        state = rows if BY_ROW else rows * 0
        least = tl.load(floor + state)[:, None]
        keep = (bits > 0) & (listed < n)[:, None] & (unclipped < n_features)[None, :]
        if OF_PLACES:
            distance = _from_last_place(rows, features, last, n_features, BY_ROW)
            least_distance = tl.load(tie_floor + state)[:, None]
            keep = keep & (bits == least) & ((distance >> high) == (least_distance >> high))
            digit = ((distance - least_distance) >> shift).to(tl.int32)
        else:
            keep = keep & ((bits >> high) == (least >> high))
            digit = (bits - least) >> shift
        at = histograms + (rows % n_histograms).to(tl.int64)[:, None] * BINS + digit
        tl.atomic_add(at, 1, mask=keep, sem="relaxed")


_TYPES = typed({
    "*i32": "row_list n_listed floor counts cand_rows cand_ids histograms", "*i64": "tie_floor",
    "*fp32": "bias cand_values", "i32": "n_features width capacity n_histograms shift high last",
})  # fmt: skip
_COLLECTED = {
    "rows": {"BY_ROW": True}, "batch": {"BY_ROW": False}, "magnitudes": {"BY_ROW": True, "SIGNED": True},
    "rows_ties": {"BY_ROW": True, "TIES": True}, "batch_ties": {"BY_ROW": False, "TIES": True},
}  # fmt: skip
_COUNTED = {
    "rows_sizes": {"BY_ROW": True, "OF_PLACES": False}, "rows_places": {"BY_ROW": True, "OF_PLACES": True},
    "batch_sizes": {"BY_ROW": False, "OF_PLACES": False}, "batch_places": {"BY_ROW": False, "OF_PLACES": True},
}  # fmt: skip


def _specimen(kernel: Any, name: str, flags: dict[str, bool], short: str, blocks: Blocks, *only: int) -> Specimen:
    types = _TYPES | {"low": f"*{short}", "w_low": f"*{short}"}
    signature = {key: types[key] for key in kernel.arg_names if key in types}
    sizes = {"ROWS": blocks.rows, "FEATURES": blocks.features, "WIDTH": blocks.width, "GROUP": GROUP}
    plain = {"SIGNED": False, "WIDEN": False, "TIES": False, "BINS": 1 << DIGIT_BITS}
    constants = {key: value for key, value in (plain | sizes | flags).items() if key in kernel.arg_names}
    label, odd = f"{kernel.__name__} {name} {short}", ("n_features", "last", "shift", "high", "n_listed")
    return Specimen(kernel, signature, constants, blocks.warps, blocks.stages, label, only or (80, 90, 100), odd)


SPECIMENS = [
    *(
        _specimen(candidates_kernel, name, flags, "bf16", blocks, capability)
        for name, flags in _COLLECTED.items()
        for capability, blocks in _LARGE.items()
        if "TIES" not in flags
    ),
    *(_specimen(candidates_kernel, name, _COLLECTED[name], "bf16", _SMALL) for name in ("rows_ties", "batch_ties")),
    *(_specimen(candidates_kernel, name, flags, "fp32", _FLOAT32) for name, flags in _COLLECTED.items()),
    *(_specimen(histogram_kernel, name, flags, "bf16", _SMALL) for name, flags in _COUNTED.items()),
    *(_specimen(histogram_kernel, name, flags, "fp32", _FLOAT32) for name, flags in _COUNTED.items()),
]
