"""Activations to disk compressed: the same arrays as the Writer's, their chunks packed with zstd by zarr itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from saeflow.activations.shards import Layout
from saeflow.activations.writer import Writer
from saeflow.recipe.settings import ActivationsConfig

_LEVEL = 1
"""Of zstd, alone. On real activations level 3 saved nothing more, and Blosc's byte shuffle less: behind a ReLU 3.8
times instead of 4.8."""


def open_writer(path: Path, layout: Layout, config: ActivationsConfig) -> Writer | PackedWriter:
    if config.compression == "none":
        return Writer(path, layout, config.dtype)
    return PackedWriter(path, layout, config.dtype)


class PackedWriter:
    """Fills one array from its beginning, a shard at a time; holds one shard.

    Shards of nothing but zeros are written, too: a shard that is not there is damage, never zeros.
    """

    def __init__(self, path: Path, layout: Layout, dtype: str) -> None:
        stored = {"bfloat16": "uint16"}.get(dtype, dtype)
        self.array = zarr.create_array(
            path, shape=layout.shape, dtype=stored,
            chunks=(layout.chunk, *layout.shape[1:]), shards=(layout.shard, *layout.shape[1:]),
            compressors=[ZstdCodec(level=_LEVEL), Crc32cCodec()], filters=None, fill_value=0,
            config={"write_empty_chunks": True},
            attributes={"dtype": dtype}, dimension_names=("sequence", "position", "width"),
        )  # fmt: skip
        self.path, self.layout, self.n_rows = path, layout, 0
        self.checksums: dict[str, str] = {}
        """None are known: the files are read for them."""
        self._shard = np.empty((min(layout.shard, layout.shape[0]), *layout.shape[1:]), stored)

    def append(self, block: np.ndarray) -> None:
        """Rows (s, T, D) in the stored precision."""
        while len(block):
            at = self.n_rows % self.layout.shard
            taken = block[: self.layout.shard - at]
            self._shard[at : at + len(taken)] = taken
            self.n_rows += len(taken)
            block = block[len(taken) :]
            if self.n_rows % self.layout.shard == 0:
                self._write(self.layout.shard)

    def close(self) -> None:
        self._write(self.n_rows % self.layout.shard)
        assert self.n_rows == self.layout.shape[0]

    def _write(self, n_rows: int) -> None:
        if n_rows:
            self.array[self.n_rows - n_rows : self.n_rows] = self._shard[:n_rows]
