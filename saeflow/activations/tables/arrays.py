"""Tables of activations in files of arrays: npy, npz, safetensors and Zarr."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from safetensors import safe_open

from saeflow.activations.tables import stream
from saeflow.activations.tables.stream import BLOCK_BYTES, READ_FAILURES, RowBlock, TableRows, rows_at_once
from saeflow.runtime.errors import UserError

_TENSOR_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
"""Number types of safetensors that can be read."""


def _not_numeric(name: str, format: str) -> UserError:
    return UserError(f"activations.source: {name} is not an array of numbers in {format} format.")


def choose_array(names: list[str], wanted: str | None, file: str) -> str:
    """Return the array to read: the one named, or the only one. Raises UserError that lists them."""
    there = ", ".join(names) or "none"
    if wanted is not None and wanted not in names:
        raise UserError(f"activations.source_array is {wanted!r}, but {file} holds: {there}. Set it to one of them.")
    if wanted is None and len(names) != 1:
        raise UserError(
            f"activations.source: {file} holds {len(names)} arrays: {there}.\n"
            "Set activations.source_array to the one to read."
        )
    return wanted or names[0]


def npy_rows(file: Path, block_bytes: int = BLOCK_BYTES) -> TableRows:
    try:
        about = np.lib.format.open_memmap(file, mode="r")
    except (ValueError, EOFError) as error:
        raise _not_numeric(file.name, "npy") from error
    shape, dtype, offset = about.shape, about.dtype, about.offset
    by_columns = about.flags.f_contiguous and not about.flags.c_contiguous
    _require_table(file.name, shape, dtype, "npy")
    item = math.prod(shape[1:])

    def read(start: int, stop: int) -> np.ndarray:
        if by_columns:  # mapped anew each time, so that read pages are let go
            return np.array(np.lib.format.open_memmap(file, mode="r")[start:stop])
        found = np.fromfile(file, dtype, (stop - start) * item, offset=offset + start * item * dtype.itemsize)
        return found.reshape(stop - start, *shape[1:])

    return _sliced(file.name, shape, read, block_bytes)


def npz_rows(file: Path, wanted: str | None, block_bytes: int = BLOCK_BYTES) -> TableRows:
    """Stream an array of an archive, so that a compressed one needs no more memory.

    An array stored by columns is read as a whole.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            name = choose_array(names, wanted, file.name)
            with archive.open(f"{name}.npy") as member:
                shape, by_columns, dtype = _npy_header(member)
    except READ_FAILURES as error:
        raise _not_numeric(file.name, "npz") from error
    _require_table(file.name, shape, dtype, "npz")
    width = shape[-1]

    def blocks(start: int) -> Iterator[RowBlock]:
        with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as member:
            _npy_header(member)
            member.seek(start * width * dtype.itemsize, 1)
            while content := member.read(rows_at_once(width, block_bytes) * width * dtype.itemsize):
                yield np.frombuffer(content, dtype).reshape(-1, width), None

    def whole(start: int) -> Iterator[RowBlock]:
        with np.load(file, allow_pickle=False) as archive:
            yield archive[name].reshape(-1, width)[start:], None

    return TableRows(file.name, math.prod(shape[:-1]), width, whole if by_columns else blocks)


def _npy_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return the shape, True if the array is stored by columns, and the type."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(member)
    if version not in read:
        raise ValueError(f"npy version {version}")
    shape, by_columns, dtype = read[version](member)
    return shape, by_columns and len(shape) > 1, dtype


def safetensors_rows(file: Path, wanted: str | None, block_bytes: int = BLOCK_BYTES) -> TableRows:
    try:
        with safe_open(file, "pt") as opened:
            name = choose_array(sorted(opened.keys()), wanted, file.name)
            about = opened.get_slice(name)
            shape, dtype = tuple(about.get_shape()), about.get_dtype()
    except READ_FAILURES as error:
        raise _not_numeric(file.name, "safetensors") from error
    if dtype not in _TENSOR_TYPES:
        raise UserError(
            f"activations.source: {file.name} is of type {dtype}. Types that can be read: "
            f"{', '.join(sorted(_TENSOR_TYPES))}."
        )
    _require_table(file.name, shape, np.dtype(np.float32), "safetensors")

    def read(start: int, stop: int) -> np.ndarray:
        with safe_open(file, "pt") as opened:  # opened anew each time, so that read pages are let go
            found: torch.Tensor = opened.get_slice(name)[start:stop]
            return (found.float() if found.dtype == torch.bfloat16 else found.clone()).numpy()

    return _sliced(file.name, shape, read, block_bytes)


def zarr_rows(folder: Path, wanted: str | None, block_bytes: int = BLOCK_BYTES) -> TableRows:
    """Read an array of Zarr v2 or v3, alone or in a group. bfloat16 is stored as saeflow does: as bits."""
    try:
        found = zarr.open(folder, mode="r")
        if isinstance(found, zarr.Group):
            arrays = {name: each for name, each in found.members(max_depth=None) if isinstance(each, zarr.Array)}
            array: Any = arrays[choose_array(sorted(arrays), wanted, folder.name)]
        else:
            array = found
    except (*READ_FAILURES, TypeError) as error:
        raise stream.unreadable_table(folder.name, error) from error
    _require_table(folder.name, array.shape, array.dtype, "Zarr")
    as_bits = array.attrs.get("dtype") == "bfloat16" and array.dtype == np.uint16

    def read(start: int, stop: int) -> np.ndarray:
        values = np.asarray(array[start:stop])
        return (values.astype(np.uint32) << 16).view(np.float32) if as_bits else values

    return _sliced(folder.name, array.shape, read, block_bytes, array.chunks[0])


def _sliced(
    name: str, shape: tuple[int, ...], read: Callable[[int, int], np.ndarray], block_bytes: int, chunk: int = 1
) -> TableRows:
    """Read an array (N, D) or (S, T, D) in slices of its first dimension, whole chunks at a time."""
    n, per, width = shape[0], math.prod(shape[1:-1]), shape[-1]
    step = max(rows_at_once(width, block_bytes) // per // chunk, 1) * chunk

    def blocks(start: int) -> Iterator[RowBlock]:
        first = start // per // step * step
        skip = start - first * per
        for begin in range(first, n, step):
            yield read(begin, min(begin + step, n)).reshape(-1, width)[skip:], None
            skip = 0

    return TableRows(name, n * per, width, blocks)


def _require_table(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], format: str) -> None:
    if dtype.kind not in "fiub":
        raise _not_numeric(name, format)
    if len(shape) not in (2, 3) or 0 in shape:
        raise stream.not_a_table(name, shape)
