"""The entries of the encoder product that a training step works on, chosen from rounded pre-activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saeflow.activations.sparse_values import SparseRows, SparseValues, concatenated
from saeflow.runtime.threads import in_parallel, ranges
from saeflow.sae import kernels
from saeflow.sae.encoding.encoder import Encoder, thread_buffers
from saeflow.sae.kernels import Bits

_GUESS_ROWS = 64
"""Rows of a batch that stand for all of them where a guess will do."""


def chosen_entries(bits: Bits, kernel: Callable[..., None], argument: Any) -> SparseValues:
    """Return the entries, with their bits as values, that a choosing kernel takes from pre-activations (n, F)."""
    starts = np.empty(len(bits) + 1, np.int64)
    ids = thread_buffers.take("ids", bits.size, torch.int32).numpy()
    out = thread_buffers.take("bits", bits.size, torch.int16 if bits.itemsize == 2 else torch.int32).numpy()
    kernel(bits, argument, starts, ids, out)
    return SparseRows(starts, ids[: starts[-1]].copy(), out[: starts[-1]].copy())


def top_entries(rows: Tensor, encoder: Encoder, k: int) -> SparseValues:
    """Return each row's k largest positive pre-activations; among equals, those of the lower features."""
    return _with_floats(_chosen_by_workers(rows, encoder, kernels.select_top, lambda bits: k))


def positive_entries(rows: Tensor, encoder: Encoder) -> SparseValues:
    """Return all positive pre-activations, less the encoder's cut."""
    return _with_floats(_chosen_above(rows, encoder, _cut_above(0.0, encoder)))


def share_positive(rows: Tensor, encoder: Encoder) -> float:
    """Return the share of pre-activations, less the encoder's cut, that are positive, in a sample of the rows."""
    encoder.prepare()
    return float((encoder.pre_activations(_sample(rows)) > 0).float().mean())


def top_entries_of_batch(rows: Tensor, encoder: Encoder, n: int, guess: float) -> tuple[SparseValues, float]:
    """Return the n largest positive pre-activations of all rows together, and a guess for the next batch.

    Among equals the first ones are chosen. `guess` is a number that about n pre-activations, and rather more, are
    thought to exceed; 0 means none. A wrong guess costs time and never changes what is chosen.
    """
    encoder.prepare()
    guess = guess or _sampled_guess(rows, encoder, n)
    while True:
        cut = _cut_above(guess, encoder)
        starts, ids, bits = _chosen_above(rows, encoder, cut)
        if len(bits) >= n or cut[0] == 0:
            break
        guess = 0.6 * guess if guess > 1e-6 else 0.0
    if len(bits) <= n:
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
    rows: Tensor, encoder: Encoder, kernel: Callable[..., None], argument_for: Callable[[Bits], Any]
) -> SparseValues:
    """Run a choosing kernel, whose argument may depend on the chunk, on the pre-activations of all rows."""
    encoder.prepare()

    def choose_in_chunk(part: tuple[int, int]) -> SparseValues:
        bits = kernels.bits_of(encoder.pre_activations(rows[slice(*part)]))
        return chosen_entries(bits, kernel, argument_for(bits))

    return concatenated(in_parallel(choose_in_chunk, ranges(len(rows), encoder.chunk_rows), encoder.threads))


def _sampled_guess(rows: Tensor, encoder: Encoder, n: int) -> float:
    sample = _sample(rows)
    pre = encoder.pre_activations(sample).float().flatten()
    rank = min(2 * n * len(sample) // len(rows) + 1, pre.numel())
    return max(pre.topk(rank).values[-1].item(), 0.0)


def _sample(rows: Tensor) -> Tensor:
    return rows[:: max(len(rows) // _GUESS_ROWS, 1)]
