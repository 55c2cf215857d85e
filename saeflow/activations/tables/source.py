"""A user's table of activations: opened by the kind of its file, checked, and told apart by a checksum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from saeflow.activations.tables.arrays import npy_rows, npz_rows, safetensors_rows, zarr_rows
from saeflow.activations.tables.columns import arrow_files, arrow_rows, parquet_rows
from saeflow.activations.tables.csv_tables import csv_rows
from saeflow.activations.tables.stream import BLOCK_BYTES, InMemoryTable, TableReader, TableRows, not_a_table
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.files import checksum_once

_ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")


def open_table(source: str, array: str | None = None, block_bytes: int = BLOCK_BYTES) -> TableRows:
    """Open a table by the ending of its file, or by the files in its folder. Reads little more than its shape.

    Numeric columns are neurons, and the first text column labels the rows. Raises UserError if the table is missing,
    unreadable or not a table.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"activations.source: no file at {source}. Check the path.")
    rows = (_open_folder if path.is_dir() else _open_file)(path, array, block_bytes)
    if 0 in (rows.n_rows, rows.width):
        raise not_a_table(path.name, (rows.n_rows, rows.width))
    return rows


def _open_file(path: Path, array: str | None, block_bytes: int) -> TableRows:
    match path.suffix.lower():
        case ".npy":
            return npy_rows(path, block_bytes)
        case ".npz":
            return npz_rows(path, array, block_bytes)
        case ".safetensors":
            return safetensors_rows(path, array, block_bytes)
        case ".csv" | ".tsv":
            return csv_rows(path)
        case ".parquet":
            return parquet_rows(path, array, block_bytes)
        case other:
            raise UserError(
                f"activations.source is {path.name}, but {other or 'no ending'} is none of "
                ".csv .tsv .parquet .npy .npz .safetensors. A folder may be Zarr or SAELens' cache."
            )


def _open_folder(path: Path, array: str | None, block_bytes: int) -> TableRows:
    if (path / "state.json").is_file():
        return arrow_rows(path, array, block_bytes)
    if any((path / name).is_file() for name in _ZARR_FILES):
        return zarr_rows(path, array, block_bytes)
    what = "is neither Zarr (zarr.json, .zarray or .zgroup) nor what SAELens or `datasets` saved (state.json)."
    if (path / ".tmp_shards").is_dir():
        what = "is an activation cache that SAELens did not finish. Make the cache again with SAELens."
    raise UserError(f"activations.source: the folder {path.name} {what}")


def source_checksum(source: str) -> str | None:
    """Return the xxh3_128 of the source, of a folder that of its files' names and checksums; None if it is missing."""
    path = Path(source)
    if not path.exists():
        return None
    if path.is_file():
        return checksum_once(path)
    has_state = (path / "state.json").is_file()
    files = arrow_files(path) if has_state else sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {checksum_once(file)}\n" for file in files]
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())


def check_rows(rows: TableRows, progress: Progress) -> list[str] | None:
    """Read all rows once and return their distinct labels in text order; None if they have none.

    Raises UserError at a number that is not finite. Rows that state their labels are not read.
    """
    if rows.pieces is not None:
        return rows.pieces
    pieces: set[str] = set()
    labelled, at = False, 0
    with progress.bar("check", rows.n_rows, "rows") as bar:
        for values, labels in TableReader(rows).read(0, rows.n_rows):
            if not np.isfinite(values).all():
                row, column = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
                raise UserError(
                    f"activations.source: {rows.name} has {values[row, column]} in row {at + row}, neuron {column} "
                    "(counted from 0).\nNothing was stored. Correct the number, or leave out the row."
                )
            if labels is not None:
                labelled = True
                pieces.update(labels)
            at += len(values)
            bar.advance(len(values))
    return sorted(pieces) if labelled else None


def load_table(path: str, array: str | None = None) -> InMemoryTable:
    """Read a whole small table into memory."""
    return InMemoryTable.of(open_table(path, array))
