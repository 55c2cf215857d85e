"""Writing activations: first into the precision on disk, then into the shards of a Zarr array as they come."""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import xxhash
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec, ZstdCodec

from saeflow.activations.shards import EMPTY_CHUNK, Layout, shard_name
from saeflow.recipe.data_settings import ActivationsConfig
from saeflow.runtime.devices import to_processor
from saeflow.runtime.errors import UserError
from saeflow.store.records import PartRecord

_ZSTD_LEVEL = 1
"""On real activations level 3 saved no more. Blosc's byte shuffle saved less: a factor of 3.8 after a ReLU, not 4.8."""


def open_writer(path: Path, layout: Layout, config: ActivationsConfig) -> ArrayWriter | CompressedArrayWriter:
    kind = ArrayWriter if config.compression == "none" else CompressedArrayWriter
    return kind(path, layout, config.dtype)


class ArrayWriter:
    """Write one array without compression, from its first row on. A full shard is flushed to the disk.

    The bytes are those that zarr would write (a test compares them), but here each byte is touched only once.
    """

    def __init__(self, path: Path, layout: Layout, dtype: str) -> None:
        self.array = _create_array(path, layout, dtype, [Crc32cCodec()])
        self.path, self.layout, self.n_rows = path, layout, 0
        self.checksums: dict[str, str] = {}
        """The xxh3_128 of each finished shard file, by its path below the array's folder."""
        self._row_bytes = math.prod(layout.shape[1:]) * self.array.dtype.itemsize
        self._shard: _ShardFile | None = None
        self._flushing: Future[None] | None = None
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)
        self._disk = ThreadPoolExecutor(1, "saeflow-flush")

    def append(self, block: np.ndarray) -> None:
        """Add rows (s, T, D) in the stored precision."""
        rows = np.ascontiguousarray(block).reshape(len(block), -1).view(np.uint8)
        while len(rows):
            taken = rows[: self.layout.chunk - self.n_rows % self.layout.chunk]
            if self._shard is None:
                self._shard = self._open_shard()
            self._shard.put(taken.reshape(-1))
            self.n_rows += len(taken)
            rows = rows[len(taken) :]
            if self.n_rows % self.layout.chunk == 0:
                self._shard.end_chunk()
            if self.n_rows % self.layout.shard == 0:
                self._end_shard()

    def close(self) -> None:
        """Finish the last shard. After this, everything is on the disk."""
        missing = -self.n_rows % self.layout.chunk
        if missing and self._shard is not None:
            self._shard.put(np.zeros(missing * self._row_bytes, np.uint8))
            self._shard.end_chunk()
        self._end_shard()
        self._wait()
        self._disk.shutdown()
        assert self.n_rows == self.layout.shape[0]

    def _open_shard(self) -> _ShardFile:
        number = self.n_rows // self.layout.shard
        path = self.path / shard_name(self.array, number)
        return _ShardFile(path, self.layout.shard // self.layout.chunk, self._buffer)

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._wait()  # only one shard waits for the disk while the next is filled
            self.checksums[self._shard.path.relative_to(self.path).as_posix()] = self._shard.end()
            self._flushing = self._disk.submit(self._shard.flush)
            self._shard = None

    def _wait(self) -> None:
        if self._flushing is not None:
            self._flushing.result()


class _ShardFile:
    """A file of chunks, each followed by its checksum, with their index at the end (zarr-specs, sharding-indexed)."""

    def __init__(self, path: Path, n_chunks: int, buffer: mmap.mmap) -> None:
        self.path, self.file, self.buffer, self.filled = path, _open_direct(path), buffer, 0
        self.index = np.full((n_chunks, 2), EMPTY_CHUNK, "<u8")
        self.sum, self.crc = xxhash.xxh3_128(), 0
        self.n_chunks, self.begun, self.at = 0, 0, 0

    def put(self, data: np.ndarray) -> None:
        """Add bytes to the chunk that is being written."""
        for start in range(0, len(data), _CHECKED_BYTES):
            piece = data[start : start + _CHECKED_BYTES]
            self.crc = google_crc32c.extend(self.crc, piece)
            self._keep(piece.data)

    def end_chunk(self) -> None:
        self._keep(memoryview(struct.pack("<I", self.crc)))
        self.index[self.n_chunks] = self.begun, self.at - self.begun
        self.n_chunks, self.begun, self.crc = self.n_chunks + 1, self.at, 0

    def end(self) -> str:
        """Write the index and the remaining bytes. Return the checksum of the whole file."""
        index = self.index.tobytes()
        self._keep(memoryview(index + struct.pack("<I", google_crc32c.value(index))))
        _through_cache(self.file)  # the end of a file need not fill a block of the disk
        self._write()
        return self.sum.hexdigest()

    def flush(self) -> None:
        os.fsync(self.file)
        os.close(self.file)

    def _keep(self, data: memoryview) -> None:
        """Collect bytes, and write them whenever the buffer is full."""
        self.sum.update(data)
        self.at += len(data)
        while data:
            taken = data[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(taken)] = taken
            self.filled += len(taken)
            data = data[len(taken) :]
            if self.filled == len(self.buffer):
                self._write()

    def _write(self) -> None:
        with memoryview(self.buffer) as whole, whole[: self.filled] as filled:
            written = 0
            while written < self.filled:
                written += os.write(self.file, filled[written:])
        self.filled = 0


_BUFFER_BYTES, _CHECKED_BYTES = 4 << 20, 256 << 10
"""Bytes to write at once, and bytes to check at once while they are in the processor's cache."""
_DIRECT = getattr(os, "O_DIRECT", 0)


def _open_direct(path: Path) -> int:
    """Create a file that bypasses the system's cache, if possible: a tenth of the processor time here."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _through_cache(file: int) -> None:
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~_DIRECT)


class CompressedArrayWriter:
    """Write one array compressed with zstd by zarr itself, a shard at a time. Holds one shard in memory.

    Shards of zeros are written too, so that a missing shard always means damage.
    """

    def __init__(self, path: Path, layout: Layout, dtype: str) -> None:
        codecs = [ZstdCodec(level=_ZSTD_LEVEL), Crc32cCodec()]
        self.array = _create_array(path, layout, dtype, codecs, write_zeros=True)
        self.path, self.layout, self.n_rows = path, layout, 0
        self.checksums: dict[str, str] = {}
        """Empty: the files must be read for their checksums."""
        self._shard = np.empty((min(layout.shard, layout.shape[0]), *layout.shape[1:]), self.array.dtype)

    def append(self, block: np.ndarray) -> None:
        """Add rows (s, T, D) in the stored precision."""
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


def _create_array(
    path: Path, layout: Layout, dtype: str, compressors: list[Any], write_zeros: bool = False
) -> zarr.Array[Any]:
    """Create the array on disk. bfloat16 is stored as bits in uint16, since Zarr has no such type.

    Shards lie in the array's folder (`c.0.0.0`): Zarr's own `c/0/0/0` makes two more folders for each.
    """
    return zarr.create_array(
        path, shape=layout.shape, dtype={"bfloat16": "uint16"}.get(dtype, dtype),
        chunks=(layout.chunk, *layout.shape[1:]), shards=(layout.shard, *layout.shape[1:]),
        compressors=compressors, filters=None, fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True} if write_zeros else None,
        attributes={"dtype": dtype}, dimension_names=("sequence", "position", "width"),
    )  # fmt: skip


def to_precision(
    values: Tensor, config: ActivationsConfig, part: PartRecord, first: int, longest: float = math.inf
) -> Tensor:
    """Return values (S, T, D) rounded as on disk, where they are. Raises UserError if a value does not fit.

    `longest` is the largest norm among the vectors, if it is known. No value exceeds it, so if it fits, no value is
    checked.
    """
    dtype = getattr(torch, config.dtype)
    rounded = values.to(dtype)
    if not longest <= torch.finfo(dtype).max:  # NaN, too
        low, high = (extreme.to(dtype).item() for extreme in torch.aminmax(values))  # NaN goes through
        if not (math.isfinite(low) and math.isfinite(high)):
            raise _not_finite(values.cpu(), rounded.cpu(), config, part, first)
    return rounded


def as_on_disk(rounded: Tensor) -> np.ndarray:
    """Return what `to_precision` returned as an array that can be written: bfloat16 as its bits."""
    rounded = to_processor(rounded)
    return (rounded.view(torch.uint16) if rounded.dtype == torch.bfloat16 else rounded).numpy()


def _not_finite(values: Tensor, rounded: Tensor, config: ActivationsConfig, part: PartRecord, first: int) -> UserError:
    sequence, position, neuron = (int(i) for i in (~torch.isfinite(rounded)).nonzero()[0])
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
        f"An activation in {where} is {value}. Nothing of this part was stored.\n"
        'Check the model or the table. For a model that runs in float16, set model.dtype = "float32".'
    )
