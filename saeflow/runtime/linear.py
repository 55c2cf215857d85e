"""The product rows @ weights.T in the precision and by the library that are quickest here."""

from __future__ import annotations

import time
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from saeflow.runtime.threads import in_parallel, one_torch_thread, ranges


def linear(rows: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows (n, D) @ weights (F, D).T + bias (F): (n, F).

    On the processor oneDNN multiplies float32, where torch has it: torch itself would ask MKL, which is 1.2 to 1.5
    times slower on AMD's processors.
    """
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        pair = rows.contiguous(), weights.contiguous()  # for other layouts oneDNN's kernels are a thousand times slower
        product: Tensor = torch.ops.mkldnn._linear_pointwise(*pair, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(rows, weights, bias)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return numbers of lower precision in float32, others as they are. Tests compute in float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def converted(tensor: Tensor, dtype: torch.dtype, threads: int) -> Tensor:
    """Return `tensor.to(dtype)`, for a tensor of at least one dimension.

    On the processor workers convert it: torch's own threads would spin beside them.
    """
    if tensor.dtype == dtype or tensor.device.type != "cpu":
        return tensor.to(dtype)
    out = torch.empty_like(tensor, dtype=dtype)
    in_parallel(lambda rows: out[slice(*rows)].copy_(tensor[slice(*rows)]), ranges(len(tensor), 512), threads)
    return out


def fast_dtype(place: torch.device | str = "cpu") -> torch.dtype:
    """Return bfloat16 where a product in bfloat16 is clearly quicker than in float32, else float32.

    The processor is measured, once a process.
    """
    if torch.device(place).type == "cpu":
        return _fast_dtype_of_processor()
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


@lru_cache(maxsize=1)
def _fast_dtype_of_processor() -> torch.dtype:
    """Compare processor time of one thread: a busy machine must not change the answer, and with it the weights."""
    with one_torch_thread():
        float32, bfloat16 = np.min([_product_seconds() for _ in range(2)], axis=0)
    return torch.bfloat16 if bfloat16 < 0.75 * float32 else torch.float32


def _product_seconds() -> list[float]:
    pairs = [(torch.ones(256, 512, dtype=d), torch.ones(512, 512, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    return [min(_thread_seconds(a, b) for _ in range(8)) for a, b in pairs]


def _thread_seconds(a: Tensor, b: Tensor) -> float:
    began = time.thread_time()
    linear(a, b)
    return time.thread_time() - began
