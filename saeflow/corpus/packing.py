"""Documents laid into sequences of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packed:
    """Sequences of one part: `vocab_ids` (S, T) and `documents` (S, T), -1 where padding."""

    vocab_ids: np.ndarray
    documents: np.ndarray


def pack(documents: Sequence[tuple[int, np.ndarray]], length: int, packing: str, pad: int) -> Packed:
    """Lay documents, as (document_id, vocab ids), into rows of `length`; nothing is cut, the end is padded."""
    if packing == "concatenated":
        runs = [list(documents)] if documents else []
    else:
        runs = [[document] for document in documents]
    rows = [_rows(run, length, pad) for run in runs if sum(len(ids) for _, ids in run)]
    if not rows:
        return Packed(np.empty((0, length), np.int32), np.empty((0, length), np.int64))
    return Packed(np.concatenate([ids for ids, _ in rows]), np.concatenate([owners for _, owners in rows]))


def _rows(run: Sequence[tuple[int, np.ndarray]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    n_tokens = sum(len(ids) for _, ids in run)
    shape = (-(-n_tokens // length), length)
    vocab_ids = np.full(shape, pad, np.int32)
    owners = np.full(shape, -1, np.int64)
    vocab_ids.reshape(-1)[:n_tokens] = np.concatenate([ids for _, ids in run])
    owners.reshape(-1)[:n_tokens] = np.repeat([owner for owner, _ in run], [len(ids) for _, ids in run])
    return vocab_ids, owners
