"""Tables of activations in files of arrays (npy, npz, safetensors, Zarr), read a few megabytes at a time."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from safetensors import SafetensorError, safe_open

from saeflow.runtime.errors import UserError

Block = tuple[np.ndarray, list[str] | None]
"""Numbers (n, D) of any numeric type, and a label a row where there are labels."""

_BLOCK_BYTES = 16 << 20
"""Read at once, counted in float32."""
_TENSORS = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
"""Number types of safetensors that are read."""
_FAILURES = (OSError, ValueError, EOFError, KeyError, RuntimeError, NotImplementedError, zlib.error,
             zipfile.BadZipFile, SafetensorError)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """A table of N rows and D columns that is never held in memory as a whole."""

    name: str
    """Of the file, for messages."""
    n_rows: int
    width: int
    blocks: Callable[[int], Iterator[Block]]
    """From this row on, everything in order, in blocks of any size."""
    pieces: list[str] | None = None
    """Every label in text order, of rows that are known to be finite and labelled without a look at them."""


def block_rows(width: int) -> int:
    return max(1, _BLOCK_BYTES // (4 * width))


def unreadable(name: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"activations.source: {name} cannot be read: {reason}")


def no_table(name: str, shape: Iterable[int]) -> UserError:
    return UserError(
        f"activations.source: {name} has shape {tuple(shape)}; a table of rows × neurons is needed,\n"
        "or an array [sequence, position, neuron], which is read row by row."
    )


def no_numbers(name: str, format: str) -> UserError:
    return UserError(f"activations.source: {name} is no array of numbers in {format} format.")


def choose(names: list[str], wanted: str | None, file: str) -> str:
    """The array to read: the one named, or the only one. Raises UserError that lists them."""
    there = ", ".join(names) or "none"
    if wanted is not None and wanted not in names:
        raise UserError(f"activations.source_array is {wanted!r}, but {file} holds: {there}. Set it to one of them.")
    if wanted is None and len(names) != 1:
        raise UserError(
            f"activations.source: {file} holds {len(names)} arrays: {there}.\n"
            "Set activations.source_array to the one to read."
        )
    return wanted or names[0]


def npy_rows(file: Path) -> Rows:
    try:
        about = np.lib.format.open_memmap(file, mode="r")
    except (ValueError, EOFError) as error:
        raise no_numbers(file.name, "npy") from error
    shape, dtype, offset = about.shape, about.dtype, about.offset
    by_columns = about.flags.f_contiguous and not about.flags.c_contiguous
    _require_table(file.name, shape, dtype, "npy")
    item = math.prod(shape[1:])

    def read(start: int, stop: int) -> np.ndarray:
        if by_columns:  # mapped anew each time, so that what was read is let go
            return np.array(np.lib.format.open_memmap(file, mode="r")[start:stop])
        found = np.fromfile(file, dtype, (stop - start) * item, offset=offset + start * item * dtype.itemsize)
        return found.reshape(stop - start, *shape[1:])

    return _sliced(file.name, shape, read)


def npz_rows(file: Path, wanted: str | None) -> Rows:
    """Streamed, so that a packed archive needs no more memory; an array stored by columns is read as a whole."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            name = choose(names, wanted, file.name)
            with archive.open(f"{name}.npy") as member:
                shape, by_columns, dtype = _npy_header(member)
    except _FAILURES as error:
        raise no_numbers(file.name, "npz") from error
    _require_table(file.name, shape, dtype, "npz")
    width = shape[-1]

    def blocks(start: int) -> Iterator[Block]:
        with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as member:
            _npy_header(member)
            member.seek(start * width * dtype.itemsize, 1)
            while content := member.read(block_rows(width) * width * dtype.itemsize):
                yield np.frombuffer(content, dtype).reshape(-1, width), None

    def whole(start: int) -> Iterator[Block]:
        with np.load(file, allow_pickle=False) as archive:
            yield archive[name].reshape(-1, width)[start:], None

    return Rows(file.name, math.prod(shape[:-1]), width, whole if by_columns else blocks)


def _npy_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether stored by columns, and type."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(member)
    if version not in read:
        raise ValueError(f"npy version {version}")
    shape, by_columns, dtype = read[version](member)
    return shape, by_columns and len(shape) > 1, dtype


def safetensors_rows(file: Path, wanted: str | None) -> Rows:
    try:
        with safe_open(file, "pt") as opened:
            name = choose(sorted(opened.keys()), wanted, file.name)
            about = opened.get_slice(name)
            shape, dtype = tuple(about.get_shape()), about.get_dtype()
    except _FAILURES as error:
        raise no_numbers(file.name, "safetensors") from error
    if dtype not in _TENSORS:
        raise UserError(
            f"activations.source: {file.name} is of type {dtype}, but {', '.join(sorted(_TENSORS))} are read."
        )
    _require_table(file.name, shape, np.dtype(np.float32), "safetensors")

    def read(start: int, stop: int) -> np.ndarray:
        with safe_open(file, "pt") as opened:  # opened anew each time, so that what was read is let go
            found: torch.Tensor = opened.get_slice(name)[start:stop]
            return (found.float() if found.dtype == torch.bfloat16 else found.clone()).numpy()

    return _sliced(file.name, shape, read)


def zarr_rows(folder: Path, wanted: str | None) -> Rows:
    """An array of Zarr v2 or v3, or of a group; bfloat16 as saeflow keeps it, as bits."""
    try:
        found = zarr.open(folder, mode="r")
        if isinstance(found, zarr.Group):
            arrays = {name: each for name, each in found.members(max_depth=None) if isinstance(each, zarr.Array)}
            array: Any = arrays[choose(sorted(arrays), wanted, folder.name)]
        else:
            array = found
    except _FAILURES as error:
        raise unreadable(folder.name, error) from error
    _require_table(folder.name, array.shape, array.dtype, "Zarr")
    as_bits = array.attrs.get("dtype") == "bfloat16" and array.dtype == np.uint16

    def read(start: int, stop: int) -> np.ndarray:
        values = np.asarray(array[start:stop])
        return (values.astype(np.uint32) << 16).view(np.float32) if as_bits else values

    return _sliced(folder.name, array.shape, read, array.chunks[0])


def _sliced(name: str, shape: tuple[int, ...], read: Callable[[int, int], np.ndarray], chunk: int = 1) -> Rows:
    """An array (N, D) or (S, T, D) that is read in slices along its first dimension, whole chunks at a time."""
    n, per, width = shape[0], math.prod(shape[1:-1]), shape[-1]
    step = max(block_rows(width) // per // chunk, 1) * chunk

    def blocks(start: int) -> Iterator[Block]:
        first = start // per // step * step
        skip = start - first * per
        for begin in range(first, n, step):
            yield read(begin, min(begin + step, n)).reshape(-1, width)[skip:], None
            skip = 0

    return Rows(name, n * per, width, blocks)


def _require_table(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], format: str) -> None:
    if dtype.kind not in "fiub":
        raise no_numbers(name, format)
    if len(shape) not in (2, 3) or 0 in shape:
        raise no_table(name, shape)


class Reader:
    """Rows as float32, read range after range. Going on where the last range ended costs no search.

    Raises UserError, naming the file, where it cannot be read or ends too early.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows, self._at = rows, -1
        self._stream: Iterator[Block] = iter(())
        self._left: Block | None = None

    def read(self, start: int, stop: int) -> Iterator[Block]:
        if start != self._at:
            self._stream, self._left, self._at = self.rows.blocks(start), None, start
        while self._at < stop:
            values, labels = self._left or self._next()
            n = min(len(values), stop - self._at)
            self._left = (values[n:], labels[n:] if labels else None) if n < len(values) else None
            self._at += n
            with np.errstate(over="ignore"):  # what is too large for float32 is said to be so
                yield values[:n].astype(np.float32), labels[:n] if labels else None

    def _next(self) -> Block:
        try:
            block = next(self._stream, None)
        except _FAILURES as error:
            raise unreadable(self.rows.name, error) from error
        if block is None:
            raise UserError(
                f"activations.source: {self.rows.name} ends after {self._at:,} of {self.rows.n_rows:,} rows. "
                "Copy or make it again."
            )
        return block
