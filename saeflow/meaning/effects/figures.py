"""Compare predictions of a language model: loss, KL divergence, and the entries that moved most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_AT_ONCE_BYTES = 2 << 20
"""Rows of logits that are compared at once, in float64: they stay in a processor's cache."""
_LEAST_MOVE = 1e-6
"""Probabilities that change by less count as unmoved: float32 rounds logits by more."""


@dataclass(frozen=True)
class Moved:
    """The entries of the vocabulary that gained, or lost, most probability in each of n rows; the most first."""

    entries: np.ndarray
    """(n, k) int32."""
    before: np.ndarray
    after: np.ndarray
    """(n, k) float32: probabilities."""
    counts: np.ndarray
    """(n): how many of the k moved at all."""


@dataclass(frozen=True)
class Figures:
    """Figures of n predictions: each one's loss before a change, and how the change moved it."""

    loss: np.ndarray
    """(n) float64: nats, before; NaN where no token follows."""
    loss_change: np.ndarray
    kl: np.ndarray
    """KL(before ‖ after) in nats, never below 0."""
    up: Moved
    down: Moved


@torch.no_grad()
def compare(before: Tensor, after: Tensor, following: np.ndarray, top: int, n_vocab: int) -> Figures:
    """Compare logits (n, V). `following` (n) is the entry that follows, or -1. Only the first `n_vocab` entries move.

    KL is sum p (log p - log q), over all entries, in float64.
    """
    at_once = max(1, _AT_ONCE_BYTES // (8 * before.shape[1]))
    pieces = [
        _compare_rows(before[here], after[here], following[here], top, n_vocab)
        for here in (slice(start, start + at_once) for start in range(0, len(before), at_once))
    ]
    joined = [np.concatenate(each) for each in zip(*map(tuple, pieces), strict=True)] if pieces else _nothing(top)
    return Figures(joined[0], joined[1], joined[2], Moved(*joined[3:7]), Moved(*joined[7:]))


def _nothing(top: int) -> list[np.ndarray]:
    moved: list[np.ndarray] = [np.zeros((0, top), kind) for kind in (np.int32, np.float32, np.float32)]
    moved.append(np.zeros(0, np.int64))
    return [np.zeros(0), np.zeros(0), np.zeros(0), *moved, *moved]


def _compare_rows(before: Tensor, after: Tensor, following: np.ndarray, top: int, n_vocab: int) -> Iterator[np.ndarray]:
    old, new = (torch.log_softmax(each.double(), dim=1) for each in (before, after))
    p, q = old.exp(), new.exp()
    target = torch.from_numpy(following.astype(np.int64)).to(old.device)
    known = target >= 0
    at = target.clamp(min=0)[:, None]
    losses = -old.gather(1, at).flatten()
    changes = -new.gather(1, at).flatten() - losses
    missing = torch.tensor(torch.nan, dtype=torch.float64, device=old.device)
    yield torch.where(known, losses, missing).cpu().numpy()
    yield torch.where(known, changes, missing).cpu().numpy()
    yield torch.linalg.vecdot(p, torch.where(p > 0, old - new, 0)).clamp_(min=0).cpu().numpy()
    gained = (q - p)[:, :n_vocab]
    k = min(top, gained.shape[1])
    for sign in (1, -1):
        strength, entries = (gained if sign > 0 else -gained).topk(k, dim=1)
        yield entries.int().cpu().numpy()
        yield p.gather(1, entries).float().cpu().numpy()
        yield q.gather(1, entries).float().cpu().numpy()
        yield (strength > _LEAST_MOVE).sum(1).cpu().numpy()
