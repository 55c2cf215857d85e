"""The encoder product, in the precision that is quickest, with a bound on its error."""

from __future__ import annotations

import copy
import threading
from functools import cached_property

import torch
from torch import Tensor

from saeflow.runtime.linear import converted, linear
from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae.encoding import sparse_inputs
from saeflow.sae.kernels import Doubles, Floats, Ids

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
        if len(self.w_enc) % sparse_inputs.GROUP_COLUMNS or not sparse_inputs.mostly_zero(x):
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

    @cached_property
    def bounds(self) -> Doubles:
        """(3, F): what bounds the error of a feature: factors of a row's two numbers, and a constant.

        x.w + b - (x~.w~ + b~) = (x - x~).w + x~.(w - w~) + b - b~. Each product is at most the product of the lengths
        (Cauchy-Schwarz). A sum of D + 2 terms in float32 adds D + 2 roundings, doubled here.
        """
        return self._bounds_for(self.low_w.double(), self.bias.double(), self.low_b.double())

    def _bounds_for(self, low_w: Tensor, b: Tensor, low_b: Tensor) -> Doubles:
        rounding = (self.w_enc.shape[1] + 2) * 2.0**-23
        w = self.w_enc.double()
        of_low = (w - low_w).norm(dim=1) + rounding * low_w.norm(dim=1)
        fixed = (b - low_b).abs() + (rounding + self.relative_error) * low_b.abs() + 1e-30
        return torch.stack([w.norm(dim=1), of_low, fixed]).mul(1 + 1e-6).cpu().numpy()


class SparseInputEncoder(Encoder):
    """An encoder for rows that are mostly zero: x.w + (b_enc - b_in.w), with w in bfloat16 and x as it is."""

    @cached_property
    def words(self) -> Ids:
        return sparse_inputs.packed(self.w_enc, self.threads)

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
        sparse_inputs.product(rows.numpy(), self.words, self.base, out.numpy())
        return out.view(shape)

    @cached_property
    def bounds(self) -> Doubles:
        exact = self.bias.double() - self.w_enc.double() @ self.b_in.double()
        return self._bounds_for(self.w_enc.bfloat16().double(), exact, torch.from_numpy(self.base).double())
