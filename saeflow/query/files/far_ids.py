"""Vocabulary ids of a part that lies in a bucket, read a block at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from saeflow.store.storage.objects import REQUESTS_AT_ONCE

BLOCK = 16_384
"""Ids of a block: 64 KiB."""

_MOST_HELD = 256
"""Blocks held in memory."""


class FarIds:
    """Vocabulary ids of consecutive tokens. Blocks that follow one another are read at one request."""

    def __init__(self, files: Any, path: str, n_tokens: int) -> None:
        """`files` is the fsspec filesystem that has the file. Raises ValueError if the file is too short."""
        self._files, self._path, self._n = files, path, n_tokens
        self._start = files.info(path)["size"] - 4 * n_tokens  # after the header
        if self._start <= 0:
            raise ValueError(f"{path} does not hold the vocabulary ids of {n_tokens} tokens")
        self._held: dict[int, np.ndarray] = {}

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Return the ids int32 (n,) at ascending places (n,)."""
        if not len(places):
            return np.zeros(0, np.int32)
        blocks = np.unique(places // BLOCK)
        held = self._read(blocks)
        ends = np.searchsorted(places, (blocks + 1) * BLOCK)
        pieces = np.split(places, ends[:-1])
        found = [held[block][piece - block * BLOCK] for block, piece in zip(blocks.tolist(), pieces, strict=True)]
        return np.concatenate(found)

    def _read(self, blocks: np.ndarray) -> dict[int, np.ndarray]:
        held = self._held
        missing = [block for block in blocks.tolist() if block not in held]
        runs = np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1) if missing else []
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            fresh = {block: ids for run in pool.map(self._read_run, runs) for block, ids in run.items()}
        found = {block: held[block] if block in held else fresh[block] for block in blocks.tolist()}
        self._held = held | fresh if len(held) + len(fresh) <= _MOST_HELD else fresh
        return found

    def _read_run(self, run: np.ndarray) -> dict[int, np.ndarray]:
        first, end = int(run[0]) * BLOCK, min((int(run[-1]) + 1) * BLOCK, self._n)
        content = self._files.cat_file(self._path, self._start + 4 * first, self._start + 4 * end)
        ids = np.frombuffer(content, "<i4")
        return {int(block): ids[i * BLOCK : (i + 1) * BLOCK] for i, block in enumerate(run)}
