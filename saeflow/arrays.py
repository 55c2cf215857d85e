"""Arrays [sequence, position, width] on disk: how they are cut, written a shard at a time, and read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec

from saeflow.config import ActivationsConfig, UserError
from saeflow.model import Site
from saeflow.store import Artefact, Damaged, PartRecord

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Layout:
    """How one array of `shape` (S, T, D) is cut: sequences in a chunk and in a shard."""

    shape: tuple[int, int, int]
    chunk: int
    shard: int


def plan_layout(n_sequences: int, length: int, width: int, config: ActivationsConfig) -> Layout:
    """Chunks and shards of about the asked size; a shard is a whole number of chunks and of forward batches."""
    row_bytes = length * width * ITEM_BYTES[config.dtype]
    chunk = max(1, min(n_sequences, config.chunk_bytes // row_bytes))
    shard = max(1, min(-(-n_sequences // chunk), config.shard_bytes // (chunk * row_bytes))) * chunk
    return Layout((n_sequences, length, width), chunk, shard)


class Writer:
    """Fills one array from its beginning, a whole shard at a time."""

    def __init__(self, path: Path, layout: Layout, dtype: str) -> None:
        self.layout, self.rows, self.at = layout, 0, 0
        stored = {"bfloat16": "uint16"}.get(dtype, dtype)
        self.array = zarr.create_array(
            path, shape=layout.shape, dtype=stored,
            chunks=(layout.chunk, *layout.shape[1:]), shards=(layout.shard, *layout.shape[1:]),
            compressors=[Crc32cCodec()], filters=None, fill_value=0,
            attributes={"dtype": dtype}, dimension_names=("sequence", "position", "width"),
        )  # fmt: skip
        self.buffer = np.empty((layout.shard, *layout.shape[1:]), stored)

    def append(self, block: np.ndarray) -> None:
        while len(block):
            taken = block[: self.layout.shard - self.rows]
            self.buffer[self.rows : self.rows + len(taken)] = taken
            self.rows += len(taken)
            block = block[len(taken) :]
            if self.rows == self.layout.shard:
                self._write()

    def _write(self) -> None:
        self.array[self.at : self.at + self.rows] = self.buffer[: self.rows]
        self.at += self.rows
        self.rows = 0

    def close(self) -> None:
        if self.rows:
            self._write()
        assert self.at == self.layout.shape[0]


def stored(values: Tensor, config: ActivationsConfig, part: PartRecord, first: int) -> np.ndarray:
    """Values (S, T, D) in the precision of the disk. Raises UserError for what it cannot hold."""
    dtype = getattr(torch, config.dtype)
    low, high = (extreme.to(dtype).item() for extreme in torch.aminmax(values))  # NaN goes through
    stored = values.to(dtype).cpu()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _not_finite(values.cpu(), stored, config, part, first)
    return (stored.view(torch.uint16) if config.dtype == "bfloat16" else stored).numpy()


def _not_finite(values: Tensor, stored: Tensor, config: ActivationsConfig, part: PartRecord, first: int) -> UserError:
    sequence, position, neuron = (int(i) for i in (~torch.isfinite(stored)).nonzero()[0])
    where = (
        f"part {part.index}, row {part.counts['first_sequence'] + first + sequence} "
        f"(position {position}, neuron {neuron})"
    )
    value = values[sequence, position, neuron].item()
    if math.isfinite(value):
        return UserError(
            f"An activation of {value:.6g} in {where} overflows {config.dtype}.\n"
            'Set activations.dtype to "bfloat16" or "float32".'
        )
    return UserError(
        f"An activation in {where} is {value}; nothing of this part was stored.\n"
        'Check the model or the table; for a model run in float16 set model.dtype = "float32".'
    )


def open_site(target: Artefact, part: PartRecord, site: Site) -> zarr.Array[Any]:
    """The stored array (S, T, D) of one part, for reading.

    By zarr's own codecs: zarrs 0.2.3 is quicker, but leaves checksums unread where a shard is read in part.
    """
    return zarr.open_array(target.part_path(part) / site.file, mode="r")


def read_rows(array: zarr.Array[Any], rows: slice) -> Tensor:
    """Sequences of an array as a tensor (s, T, D) in the stored precision. Raises Damaged where bytes have changed."""
    try:
        values = torch.from_numpy(np.asarray(array[rows]))
    except (RuntimeError, ValueError) as error:
        raise Damaged(
            f"Rows {rows.start} to {rows.stop} of {array.store_path} cannot be read: {error}.\n"
            "Remove what is damaged with `saeflow verify --full --repair`, then run the recipe again: the rest is kept."
        ) from error
    return values.view(torch.bfloat16) if array.attrs["dtype"] == "bfloat16" else values
