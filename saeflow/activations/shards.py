"""Arrays [sequence, position, width] on disk: how they are cut into shards, and how they are read and checked."""

from __future__ import annotations

import math
import struct
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import zarr
from torch import Tensor

from saeflow.model.sites import Site
from saeflow.recipe.data_settings import ActivationsConfig
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.files import Bytes
from saeflow.store.records import Damaged, PartRecord, damaged, is_refusal
from saeflow.store.storage.folder import Storage

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Layout:
    """How an array of `shape` (S, T, D) is cut: the sequences in a chunk and in a shard."""

    shape: tuple[int, int, int]
    chunk: int
    shard: int


def plan_layout(n_sequences: int, length: int, width: int, config: ActivationsConfig) -> Layout:
    """Choose chunks and shards of about the configured sizes. A shard is a whole number of chunks."""
    row_bytes = length * width * ITEM_BYTES[config.dtype]
    chunk = max(1, min(n_sequences, config.chunk_bytes // row_bytes))
    shard = max(1, min(-(-n_sequences // chunk), config.shard_bytes // (chunk * row_bytes))) * chunk
    return Layout((n_sequences, length, width), chunk, shard)


def stored_sites(artefact: Artefact) -> list[Site]:
    """The sites whose activations an artefact holds."""
    return [Site(name, width) for name, width in artefact.fact("stored")]


def is_kept(artefact: Artefact) -> bool:
    """True if activations are stored; False if the model must run for them again."""
    return bool(artefact.record.facts.get("keep", True))


_MISREAD = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)
"""What zarr raises over an array whose description or bytes are not as they were written."""


class StoredArray:
    """A stored array (S, T, D), for reading. Every byte that is read is checked against its checksum.

    Uncompressed arrays are read straight into place. Others go through zarr's own codecs: zarrs 0.2.3 is faster, but
    skips checksums if a shard is read in part.
    """

    def __init__(self, path: Path, storage: Storage) -> None:
        self.path, self.storage = path, storage
        try:
            storage.fetch(path / "zarr.json")  # of an array in a bucket this is all that is kept here
            self.array = zarr.open_array(path, mode="r")
            self.dtype: torch.dtype = getattr(torch, str(self.array.attrs["dtype"]))
            self.shape: tuple[int, ...] = self.array.shape
            self.chunk, self.shard = self.array.chunks[0], (self.array.shards or self.array.chunks)[0]
            self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
            self._is_uncompressed = _is_uncompressed(self.array)
        except _MISREAD as error:
            raise _damaged_array(path, "it", error) from error
        self._index: dict[int, np.ndarray] = {}

    def read(self, rows: slice) -> Tensor:
        """Return sequences (s, T, D) in the stored precision. Raises Damaged if bytes are missing or changed."""
        start, stop, _ = rows.indices(self.shape[0])
        out = torch.empty(max(stop - start, 0), *self.shape[1:], dtype=self.dtype)
        self.read_into(slice(start, stop), out)
        return out

    def read_into(self, rows: slice, out: Tensor) -> None:
        """Read sequences into contiguous memory of exactly their size, in any shape. Raises Damaged like `read`."""
        raw = out.view(torch.uint8).numpy().reshape(-1)
        try:
            if self._is_uncompressed:
                self._read_uncompressed(rows.start, rows.stop, raw)
            else:
                values = self._read_by_zarr(rows)
                raw[:] = values.view(np.uint8).reshape(-1)
        except _MISREAD as error:
            raise _damaged_array(self.path, f"rows {rows.start} to {rows.stop}", error) from error

    def _read_by_zarr(self, rows: slice) -> np.ndarray:
        for shard in range(rows.start // self.shard, -(-rows.stop // self.shard)):
            with self._open_shard(shard):  # zarr would return zeros for a missing one
                pass
        return np.ascontiguousarray(self._stored[rows])

    @cached_property
    def _stored(self) -> Any:
        """The array, with its shards wherever they are stored."""
        return zarr.open_array(self.storage.zarr(self.path), mode="r")

    def _open_shard(self, shard: int) -> Bytes:
        """Raises FileNotFoundError."""
        return self.storage.open(self.path / shard_name(self.array, shard))

    def _read_uncompressed(self, start: int, stop: int, raw: np.ndarray) -> None:
        for shard in range(start // self.shard, -(-stop // self.shard)):
            first, last = max(start, shard * self.shard), min(stop, (shard + 1) * self.shard)
            with self._open_shard(shard) as opened:
                numbers = range(first // self.chunk, -(-last // self.chunk))
                file = opened.ahead(*self._span(opened, shard, numbers))
                for number in numbers:
                    a, b = max(first, number * self.chunk), min(last, (number + 1) * self.chunk)
                    piece = raw[(a - start) * self._row_bytes : (b - start) * self._row_bytes]
                    self._read_chunk(file, shard, number, a - number * self.chunk, piece)

    def _read_chunk(self, file: Bytes, shard: int, number: int, skip: int, out: np.ndarray) -> None:
        """Read rows of one chunk from `skip` on. The whole chunk is checked."""
        size = self.chunk * self._row_bytes
        offset, n_bytes = self._chunk_places(file, shard)[number % (self.shard // self.chunk)]
        if offset == n_bytes == EMPTY_CHUNK:
            out[:] = 0
            return
        if n_bytes != size + 4:
            raise ValueError(f"chunk {number} has {n_bytes} bytes instead of {size + 4}")
        before = skip * self._row_bytes
        pieces = [np.empty(before, np.uint8), out, np.empty(size - before - len(out), np.uint8)]
        found, at = 0, int(offset)
        for piece in (part for whole in pieces for part in _cut_for_checking(whole)):
            if file.read_into(piece, at) != len(piece):
                raise ValueError(f"chunk {number} ends too early")
            found, at = google_crc32c.extend(found, piece), at + len(piece)
        if file.read(at, 4) != struct.pack("<I", found):
            raise ValueError(f"the checksum of chunk {number} is wrong")

    def _span(self, file: Bytes, shard: int, numbers: range) -> tuple[int, int]:
        """Return the start and length of the bytes that these chunks of a shard take."""
        per_shard = self.shard // self.chunk
        places = self._chunk_places(file, shard)[[number % per_shard for number in numbers]]
        written = places[places[:, 0] != EMPTY_CHUNK]
        if not len(written):
            return 0, 0
        start = int(written[:, 0].min())
        return start, int(written.sum(1).max()) + 4 - start

    def _chunk_places(self, file: Bytes, shard: int) -> np.ndarray:
        """Return the offset and size of every chunk of a shard, from the index at its end."""
        if shard not in self._index:
            n_bytes = self.shard // self.chunk * 16
            content = file.read(file.n_bytes - n_bytes - 4, n_bytes + 4)
            if content[n_bytes:] != struct.pack("<I", google_crc32c.value(content[:n_bytes])):
                raise ValueError("the checksum of the shard's index is wrong")
            self._index[shard] = np.frombuffer(content[:n_bytes], "<u8").reshape(-1, 2)
        return self._index[shard]


EMPTY_CHUNK = 2**64 - 1
"""Marks a chunk in a shard's index that was not written: it is all zeros or beyond the end of the array
(zarr-specs, sharding-indexed)."""
_CHECKED_AT_ONCE = 512 << 10
"""Bytes to read and check at once, while they are in the processor's cache."""


def _cut_for_checking(memory: np.ndarray) -> list[np.ndarray]:
    return [memory[start : start + _CHECKED_AT_ONCE] for start in range(0, len(memory), _CHECKED_AT_ONCE)]


def shard_name(array: zarr.Array[Any], shard: int) -> str:
    """Return the name of a shard's file. Formats 1 and 2 put each shard into two folders of its own."""
    metadata: Any = array.metadata
    return str(metadata.encode_chunk_key((shard, *[0] * (array.ndim - 1))))


def _is_uncompressed(array: zarr.Array[Any]) -> bool:
    """True if the array has the layout that ArrayWriter writes."""
    codecs: Any = array.metadata.to_dict()["codecs"]
    if len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed" or sys.byteorder != "little":
        return False
    about = codecs[0]["configuration"]
    inner, index = ([codec["name"] for codec in about[name]] for name in ("codecs", "index_codecs"))
    return inner == index == ["bytes", "crc32c"] and about.get("index_location", "end") == "end"


def _damaged_array(path: Path, what: str, error: Exception) -> UserError:
    if is_refusal(error):
        return damaged(path, error)
    return Damaged(
        f"{path}: {what} cannot be read: {error}.\n"
        "Remove the damaged parts with `saeflow verify --full --repair`, then run the recipe again. The rest is kept."
    )


def open_site(target: Artefact, part: PartRecord, site: Site) -> StoredArray:
    """Open the array (S, T, D) of one site in one part."""
    return StoredArray(target.part_path(part) / site.file, target.storage)
