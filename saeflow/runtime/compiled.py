"""Loops compiled by Numba, and kept compiled where the user may write a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def compiled(kernel: Kernel, reorder: bool = True) -> Kernel:
    """Compile a kernel. It may reassociate sums, to use vector registers; their order is the same in every run.

    Without `reorder` every operation is rounded as it is written, on any processor.

    A user who may write no folder of a cache compiles at every start. NUMBA_CACHE_DIR can name one.
    """
    relaxed = {"reassoc", "contract"} if reorder else set()
    made = numba.njit(nogil=True, error_model="numpy", fastmath=relaxed)(kernel)
    with contextlib.suppress(RuntimeError):
        made.enable_caching()
    return cast(Kernel, made)
