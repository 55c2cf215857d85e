"""Read tensors, or their names and shapes alone, from files of other programs, and nothing but tensors.

Nothing in these files is run. Sizes that a file declares are compared with what it holds before memory is taken.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from saeflow.runtime.errors import UserError, first_line
from saeflow.sae.formats.description import AGAIN

Shapes = Mapping[str, tuple[int, ...]]

_TORCH = (".pt", ".pth", ".bin")
_MOST_INFLATED, _SMALL_ARCHIVE = 16, 64 << 20
"""How many times its size an archive may grow when it is read, once that is more than `_SMALL_ARCHIVE` bytes. Trained
weights hardly shrink."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises SafetensorError if it is damaged, OSError if it is refused."""
    path.open("rb").close()  # the library itself calls every refusal of the system a missing file
    return load_file(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of weights, by its ending. Raises UserError if it is damaged."""
    if path.suffix in _TORCH:
        return _torch_state(path, "cpu")
    if path.suffix == ".npz":
        return {name: torch.from_numpy(array) for name, array in _arrays(path)}
    try:
        return read_tensors(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path} is damaged ({error}). {AGAIN}") from None


def shapes_of(path: Path) -> Shapes:
    """Return names and shapes of the tensors in a file, without reading their values."""
    if path.suffix in _TORCH:
        return {name: tuple(tensor.shape) for name, tensor in _torch_state(path, "meta").items()}
    if path.suffix == ".npz":
        return _declared(path)
    try:
        path.open("rb").close()
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path} is damaged ({error}). {AGAIN}") from None


def shapes_in_words(shapes: Shapes) -> str:
    """Name tensors and shapes: `W_dec 64 × 16, b_dec 16`."""
    named = [f"{name} {sizes(shape)}" for name, shape in sorted(shapes.items())]
    return ", ".join(named[:12]) + (f" and {len(named) - 12} more" if len(named) > 12 else "")


def sizes(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "one number"


def _torch_state(path: Path, device: str) -> dict[str, Tensor]:
    """Read tensors from a file of torch, which is a pickle and may hold any code.

    With `weights_only`, torch (2.6 and later) reads it by its own unpickler, which makes tensors and plain containers
    and runs nothing.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _require_modest(path, sum(file.file_size for file in archive.infolist()))
        state: Any = torch.load(path, map_location=device, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # what torch raises for a damaged file, or for one with code, is not documented
        raise UserError(
            f"{path} cannot be read as tensors alone ({first_line(error)}); whatever else it holds is never run. "
            f"{AGAIN}"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("sae"), dict):
        state = state["sae"]  # OpenMOSS keeps a version beside it
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is no table of tensors (a state_dict). {AGAIN}")
    for name, value in state.items():
        if value.is_sparse or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} claims {sizes(tuple(value.shape))}, more than the file holds. {AGAIN}")
    return {str(name): value for name, value in state.items()}


def _declared(path: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the arrays of an .npz file. Raises UserError if they are not what the file holds."""
    found, n_bytes = {}, 0
    for name, shape, _, file in _headers(path):
        found[name] = shape
        n_bytes += file.file_size
    _require_modest(path, n_bytes)
    return found


def _require_modest(path: Path, n_bytes: int) -> None:
    if n_bytes > max(_SMALL_ARCHIVE, _MOST_INFLATED * path.stat().st_size):
        raise UserError(f"{path} would grow to {n_bytes:,} bytes when it is read: no weights are like that. {AGAIN}")


def _arrays(path: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    _declared(path)
    for name, shape, _, file in _headers(path):
        try:
            with zipfile.ZipFile(path) as archive, archive.open(file) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({first_line(error)}). {AGAIN}") from None
        assert array.shape == shape
        yield name, array.astype(np.float32, order="C", copy=False)  # torch takes no long nor swapped numbers


def _headers(path: Path) -> Iterator[tuple[str, tuple[int, ...], np.dtype[Any], zipfile.ZipInfo]]:
    """Yield name, shape and kind of each array, after comparing them with the bytes that the archive declares."""
    try:
        with zipfile.ZipFile(path) as archive:
            for file in archive.infolist():
                with archive.open(file) as stream:
                    shape, dtype = _array_header(stream)
                    n_bytes = math.prod(shape) * dtype.itemsize
                    if min(shape, default=0) < 0 or stream.tell() + n_bytes != file.file_size:
                        raise ValueError(f"{file.filename} claims {sizes(shape)}, which is not what it holds")
                yield file.filename.removesuffix(".npy"), shape, dtype, file
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is damaged, it is no .npz file of numbers ({first_line(error)}). {AGAIN}") from None


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except Exception as error:  # numpy parses a header as Python's literals, and lets errors of the parser through
        raise ValueError(first_line(error)) from error
    if dtype.kind != "f":
        raise ValueError(f"it holds {dtype}, not real numbers")
    return shape, dtype


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError if a weight is NaN or infinite: nothing could be encoded with it."""
    for name, tensor in tensors.items():
        n_bad = tensor.numel() - int(tensor.isfinite().sum())
        if n_bad:
            raise UserError(
                f"{what}: {n_bad:,} of {tensor.numel():,} values of {name} are NaN or infinite in float32: nothing "
                "is published.\nThe weights or the activations are too large: bring the activations to a smaller scale."
            )
