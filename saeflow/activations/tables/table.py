"""Activations that no model gives: the user's own tables, and made ones with known structure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from saeflow.activations.synthetic import superposition, toys
from saeflow.activations.tables.arrays import Reader, Rows, no_table, npy_rows, npz_rows, safetensors_rows, zarr_rows
from saeflow.activations.tables.columns import arrow_files, arrow_rows, csv_rows, parquet_rows
from saeflow.activations.tables.row_labels import name_of
from saeflow.recipe.synthetic import SyntheticConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.files import checksum

_ZARR = ("zarr.json", ".zarray", ".zgroup")


@dataclass(frozen=True)
class Table:
    """Rows of activations: `values` float32 (N, D), a label a row, and the known directions, if any, (n, D)."""

    labels: list[str]
    values: np.ndarray
    directions: np.ndarray | None = None


@dataclass(frozen=True)
class Seen:
    """What a first look at all rows gave: their distinct labels in text order, None where rows have none."""

    pieces: list[str] | None


def open_rows(source: str, array: str | None = None) -> Rows:
    """The user's table, by the ending of the file or by what lies in the folder; reads little more than its shape.

    Numeric columns are neurons and the first text column labels rows. Raises UserError for what is missing, cannot be
    read or is no table.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"activations.source: no file at {source}.")
    rows = _of_folder(path, array) if path.is_dir() else _of_file(path, array)
    if 0 in (rows.n_rows, rows.width):
        raise no_table(path.name, (rows.n_rows, rows.width))
    return rows


def _of_file(path: Path, array: str | None) -> Rows:
    match path.suffix.lower():
        case ".npy":
            return npy_rows(path)
        case ".npz":
            return npz_rows(path, array)
        case ".safetensors":
            return safetensors_rows(path, array)
        case ".csv" | ".tsv":
            return csv_rows(path)
        case ".parquet":
            return parquet_rows(path, array)
        case other:
            raise UserError(
                f"activations.source is {path.name}, but {other or 'no ending'} is none of "
                ".csv .tsv .parquet .npy .npz .safetensors; a folder may be Zarr, or what SAELens caches."
            )


def _of_folder(path: Path, array: str | None) -> Rows:
    if (path / "state.json").is_file():
        return arrow_rows(path, array)
    if any((path / name).is_file() for name in _ZARR):
        return zarr_rows(path, array)
    unfinished = (path / ".tmp_shards").is_dir()
    raise UserError(
        f"activations.source: the folder {path.name} "
        + (
            "is an activation cache that SAELens did not finish. Let it make the cache again."
            if unfinished
            else "is neither Zarr (zarr.json, .zarray or .zgroup) nor what SAELens or `datasets` saved (state.json)."
        )
    )


@lru_cache(maxsize=64)
def _content(path: Path, signature: tuple[tuple[str, int, int], ...]) -> str:
    """xxh3_128 of a file, or of the names and checksums of a folder's files."""
    if path.is_file():
        return checksum(path)
    each = [f"{name} {checksum(path / name)}\n" for name, _, _ in signature]
    return xxhash.xxh3_128_hexdigest("".join(each).encode())


def content(source: str) -> str | None:
    """Checksum of the source; None where nothing is there. Read once a process while size and time stay the same."""
    path = Path(source)
    if not path.exists():
        return None
    files = [path]
    if path.is_dir():
        listed = (path / "state.json").is_file()
        files = arrow_files(path) if listed else sorted(file for file in path.rglob("*") if file.is_file())
    about = [(file, file.stat()) for file in files]
    return _content(path, tuple((file.relative_to(path).as_posix(), s.st_size, s.st_mtime_ns) for file, s in about))


def look(rows: Rows, progress: Progress) -> Seen:
    """Read everything once and keep nothing but the distinct labels. Raises UserError at a number that is not finite.

    Rows that say their labels themselves are not read.
    """
    if rows.pieces is not None:
        return Seen(rows.pieces)
    pieces: set[str] = set()
    labelled, at = False, 0
    with progress.bar("check", rows.n_rows, "rows") as bar:
        for values, labels in Reader(rows).read(0, rows.n_rows):
            if not np.isfinite(values).all():
                row, column = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
                raise UserError(
                    f"activations.source: {rows.name} has {values[row, column]} in row {at + row}, neuron {column} "
                    "(counted from 0);\nnothing was stored. Mend the number, or leave out the row."
                )
            if labels is not None:
                labelled = True
                pieces.update(labels)
            at += len(values)
            bar.advance(len(values))
    return Seen(sorted(pieces) if labelled else None)


def read_table(path: str, array: str | None = None) -> Table:
    """The whole table in memory: for small ones."""
    rows = open_rows(path, array)
    found = list(Reader(rows).read(0, rows.n_rows))
    labels = [label for _, labels in found for label in labels or ()]
    return Table(labels or _names(rows.n_rows), np.concatenate([values for values, _ in found]))


def rows_of(table: Table) -> Rows:
    """A table in memory as one that is read."""
    n_rows, width = table.values.shape
    return Rows("the table", n_rows, width, lambda start: iter([(table.values[start:], table.labels[start:])]))


def _names(n: int) -> list[str]:
    return [name_of(i) for i in range(n)]


def make_table(config: SyntheticConfig) -> Table:
    """Made activations whose true directions are known, all in memory: for small ones."""
    if config.kind == "superposed":
        found = list(Reader(superposition.rows_of(config)).read(0, config.n_samples))
        labels = [label for _, each in found for label in each or ()]
        return Table(labels, np.concatenate([values for values, _ in found]), superposition.World.of(config).directions)
    values, directions = toys.table(config)
    return Table(_names(len(values)), values, directions)


def made_rows(config: SyntheticConfig) -> Rows:
    """The same rows, to be read."""
    return superposition.rows_of(config) if config.kind == "superposed" else rows_of(make_table(config))
