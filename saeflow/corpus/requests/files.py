"""One file of an inference engine: which requests it holds, and their token ids. Nothing in it can run code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from saeflow.corpus.files import is_lfs_pointer, shown
from saeflow.runtime.errors import UserError, first_line

IDS = ("token_ids", "tokens", "input_ids")
"""Names of the token ids: of vLLM, of TransformerLens, and of transformers and nnsight."""
MASK = "attention_mask"
PROMPT = "n_prompt_tokens"
"""Key of a file's metadata: how many of its tokens are the prompt. The others were generated."""
_PIECES, _PIECE_BYTES = 16, 4096
_INTEGERS = {"I64", "I32", "I16", "U16", "U32", "U64", "U8", "I8"}


class Request(NamedTuple):
    """Where the tokens of a request lie: its file, its row in a file of several, and the positions in it."""

    path: Path
    row: int | None
    start: int
    stop: int
    n_prompt: int | None = None


@contextlib.contextmanager
def open_safetensors(path: Path, framework: str = "np") -> Iterator[Any]:
    """Open a file as safetensors does. Raises UserError that names it, also while it is being read."""
    try:
        with safe_open(path, framework) as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"corpus.requests: {shown(str(path))} cannot be read: {_why(path, error)}") from error


def _why(path: Path, error: Exception) -> str:
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            return "it is empty.\nIs the engine still writing it? Wait for it, or run this request again."
        if is_lfs_pointer(path):
            return "it is a pointer of git-lfs, not the file itself. Fetch it with `git lfs pull`."
    return f"{first_line(error)}.\nIs it whole, and has the engine ended? Copy it again, or run this request again."


def ids_name(path: Path, file: Any) -> str:
    """Return the name of the token ids in an open file. Raises UserError if there are none, or several."""
    found = [name for name in IDS if name in file.keys()]  # noqa: SIM118 - it is no dict
    if len(found) != 1:
        raise UserError(
            f"corpus.requests: {shown(str(path))} holds {' and '.join(found) or 'no token ids'}.\n"
            f"Save the ids that the model read beside the activations, as one of: {', '.join(IDS)}."
        )
    return found[0]


def requests_in(path: Path, file_name: str) -> dict[str, Request]:
    """Return the requests of one file by id: the file's name, or for rows of a batch NAME-0, NAME-1, … ."""
    with open_safetensors(path) as file:
        name = ids_name(path, file)
        about = file.get_slice(name)
        shape, dtype = about.get_shape(), about.get_dtype()
        if (dtype not in _INTEGERS and 0 not in shape) or len(shape) not in (1, 2):  # torch.tensor([]) is float
            raise UserError(
                f"corpus.requests: {shown(str(path))}: {name} has type {dtype} and shape {tuple(shape)}, but it must "
                "be whole numbers: [tokens], or [batch, tokens]."
            )
        n_prompt = _n_prompt(path, (file.metadata() or {}).get(PROMPT))
        if len(shape) == 1:
            return {file_name: Request(path, None, 0, shape[0], n_prompt)}
        spans = _real_spans(path, file, (shape[0], shape[1]))
    if len(spans) == 1:
        return {file_name: Request(path, 0, *spans[0], n_prompt)}
    return {f"{file_name}-{row}": Request(path, row, *span) for row, span in enumerate(spans)}


def _n_prompt(path: Path, written: str | None) -> int | None:
    if written is None:
        return None
    if not (written.isascii() and written.isdigit() and len(written) < 19):
        raise UserError(f"corpus.requests: {shown(str(path))}: {PROMPT} is {written[:40]!r}, but it must be a number.")
    return int(written)


def _real_spans(path: Path, file: Any, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the first and last real position (excluded) of each row of a batch."""
    if MASK not in file.keys():  # noqa: SIM118
        if shape[0] > 1:
            raise UserError(
                f"corpus.requests: {shown(str(path))} holds a batch of {shape[0]} rows, but no {MASK}, so that nobody "
                f"knows which tokens are padding.\nSave it beside the ids; ones where nothing was padded: "
                f"torch.ones({shape[0]}, {shape[1]})."
            )
        return [(0, shape[1])]
    about = file.get_slice(MASK)
    if tuple(about.get_shape()) != shape or about.get_dtype() not in _INTEGERS | {"BOOL", "F32"}:
        raise UserError(
            f"corpus.requests: {shown(str(path))}: {MASK} has type {about.get_dtype()} and shape "
            f"{tuple(about.get_shape())}, but it must be true or 1 at real tokens, {shape}."
        )
    return [_real_span(path, row, real) for row, real in enumerate(file.get_tensor(MASK) != 0)]


def _real_span(path: Path, row: int, real: np.ndarray) -> tuple[int, int]:
    places = np.flatnonzero(real)
    if not len(places):
        return 0, 0
    start, stop = int(places[0]), int(places[-1]) + 1
    if stop - start != len(places):
        raise UserError(f"corpus.requests: {shown(str(path))}: in row {row}, padding lies between real tokens.")
    return start, stop


def digest_of(path: Path) -> str:
    """Return sixteen digits that other activations change: a hash of the file's size and of evenly spread pieces of it.

    The whole file is not read: a folder may hold terabytes.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        found = xxhash.xxh3_64(str(size).encode())
        for i in range(_PIECES):
            file.seek(i * max(size - _PIECE_BYTES, 0) // (_PIECES - 1))
            found.update(file.read(_PIECE_BYTES))
    return found.hexdigest()


def vocab_ids_of(request: Request) -> tuple[int, ...]:
    """Return the vocabulary ids of a request."""
    if request.start == request.stop:  # numpy slices nothing out of nothing
        return ()
    with open_safetensors(request.path) as file:
        ids = file.get_slice(ids_name(request.path, file))
        span = slice(request.start, request.stop)
        found = ids[span] if request.row is None else ids[request.row, span]
        return tuple(found.astype(np.int64).tolist())
