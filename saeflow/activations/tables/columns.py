"""Tables of activations in files of columns: Parquet and Arrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeflow.activations.tables.arrays import choose_array
from saeflow.activations.tables.csv_tables import INDEX_NAMES
from saeflow.activations.tables.stream import (
    BLOCK_BYTES,
    RowBlock,
    TableRows,
    rows_at_once,
    unreadable_table,
    without_first_rows,
)
from saeflow.runtime.errors import UserError
from saeflow.store.files import read_json

_SAELENS_TOKEN_IDS = "token_ids"
"""SAELens' column of the tokens that the model read."""


def parquet_rows(file: Path, wanted: str | None, block_bytes: int = BLOCK_BYTES) -> TableRows:
    """Read a Parquet file. Numeric columns are neurons; without any, one column must hold a list per row."""
    try:
        about = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise unreadable_table(file.name, error) from error
    schema, n_rows = about.schema_arrow, about.metadata.num_rows
    ends = np.cumsum([about.metadata.row_group(i).num_rows for i in range(about.num_row_groups)])
    vectors = _vector_columns(schema)
    index = _index_columns(schema)
    nested = vectors and (wanted is not None or not set(_numeric_columns(schema)) - set(index))
    if nested:
        numbers, label, index = [choose_array(vectors, wanted, file.name)], _label_columns(schema), ()
    else:
        numbers, label = _number_and_label_columns(file, schema, index)

    def blocks(start: int, n: int = 0) -> Iterator[RowBlock]:
        group = int(np.searchsorted(ends, start, side="right"))
        skip = start - (int(ends[group - 1]) if group else 0)
        with pq.ParquetFile(file) as opened:
            size, groups = n or rows_at_once(width, block_bytes), range(group, len(ends))
            batches = opened.iter_batches(size, row_groups=groups, columns=[*numbers, *label])
            if nested:
                found = (_list_block(batch, numbers[0], label) for batch in batches)
            else:
                found = (_column_block(batch, numbers, label) for batch in batches)
            yield from without_first_rows(found, skip)

    width = len(numbers)
    if nested and n_rows:
        width = next(blocks(0, 1))[0].shape[1]
    return TableRows(file.name, n_rows, width, blocks, index=index)


def arrow_rows(folder: Path, wanted: str | None, block_bytes: int = BLOCK_BYTES) -> TableRows:
    """Read what `datasets` saves, such as SAELens' activation cache: a column of lists [context, D] or [D].

    Rows are the positions of the contexts in order, labelled by their token numbers if SAELens kept them. Files are
    mapped into memory, since SAELens' batches are as large as its buffer.
    """
    files = arrow_files(folder)
    try:
        schema = _record_batches(files[0]).schema if files else pa.schema([])
        name = choose_array(_vector_columns(schema), wanted, folder.name)
        label = [_SAELENS_TOKEN_IDS] if _SAELENS_TOKEN_IDS in schema.names else []
        first = next(batch.slice(0, 1) for file in files for batch in _record_batches(file) if batch.num_rows)
        per, width = _matrix(first.column(name)).shape
        n_rows = sum(batch.num_rows for file in files for batch in _record_batches(file)) * per
    except StopIteration:
        raise UserError(f"activations.source: {folder.name} holds no rows.") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable_table(folder.name, error) from error
    step = max(rows_at_once(width, block_bytes) // per, 1)

    def blocks(start: int) -> Iterator[RowBlock]:
        for batch in (batch for file in files for batch in _record_batches(file)):
            n_rows = batch.num_rows * per
            if start < n_rows:
                pieces = (batch.slice(n, step) for n in range(start // per, batch.num_rows, step))
                yield from without_first_rows((_list_block(piece, name, label) for piece in pieces), start % per)
            start = max(start - n_rows, 0)

    return TableRows(folder.name, n_rows, width, blocks)


def arrow_files(folder: Path) -> list[Path]:
    """Return the files that the folder's state.json lists. Others may be caches of shuffles."""
    try:
        listed = [folder / str(each["filename"]) for each in read_json(folder / "state.json")["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable_table(f"{folder.name}/state.json", error) from error
    for file in listed:
        if not file.is_file():
            raise UserError(f"activations.source: {folder.name} lacks {file.name}, which its state.json lists.")
    return listed


def _record_batches(file: Path) -> Any:
    """Map a file of record batches. `datasets` writes the stream format; others may write the file format."""
    mapped = pa.memory_map(str(file))
    try:
        return pa.ipc.open_stream(mapped)
    except pa.ArrowInvalid:
        mapped.seek(0)
        whole = pa.ipc.open_file(mapped)
        return pa.RecordBatchReader.from_batches(
            whole.schema, (whole.get_batch(i) for i in range(whole.num_record_batches))
        )


def _numeric_columns(schema: pa.Schema) -> list[str]:
    kinds = (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal)
    return [field.name for field in schema if any(is_kind(field.type) for is_kind in kinds)]


def _index_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Return the columns of numbers that are pandas' index, or in which polars stored the number of each row."""
    try:
        marked = {name for name in (schema.pandas_metadata or {}).get("index_columns", []) if isinstance(name, str)}
    except (ValueError, AttributeError, TypeError):
        marked = set()
    return tuple(
        field.name
        for field in schema
        if (field.name in marked and field.name in _numeric_columns(schema))
        or (pa.types.is_integer(field.type) and INDEX_NAMES.fullmatch(field.name))
    )


def _label_columns(schema: pa.Schema) -> list[str]:
    """Return the first column of texts, if there is one."""
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    plain = {f.name: f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in schema}
    return [name for name, kind in plain.items() if any(is_kind(kind) for is_kind in kinds)][:1]


def _number_and_label_columns(file: Path, schema: pa.Schema, index: tuple[str, ...]) -> tuple[list[str], list[str]]:
    numbers = [name for name in _numeric_columns(schema) if name not in index]
    if not numbers:
        raise UserError(f"activations.source: {file.name} has no numeric column; it has {', '.join(schema.names)}.")
    return numbers, _label_columns(schema)


def _vector_columns(schema: pa.Schema) -> list[str]:
    """Return the columns of (nested) lists of floats."""
    return [field.name for field in schema if _is_list(field.type) and pa.types.is_floating(_leaf(field.type))]


def _is_list(kind: pa.DataType) -> bool:
    plain = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return bool(pa.types.is_list(plain) or pa.types.is_large_list(plain) or pa.types.is_fixed_size_list(plain))


def _leaf(kind: pa.DataType) -> pa.DataType:
    plain = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return _leaf(plain.value_type) if _is_list(plain) else plain


def _matrix(column: Any) -> np.ndarray:
    """Return nested lists of any depth as rows (n, D). Raises ValueError if their lengths differ."""
    values, width = column.storage if isinstance(column, pa.ExtensionArray) else column, 0
    while _is_list(values.type):
        if values.null_count:
            raise ValueError("a list is missing (null)")
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) != 1:
            raise ValueError(f"lists have different lengths: {sorted(lengths)[0]} and {sorted(lengths)[-1]}")
        width, values = lengths[0], values.flatten()
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(-1, width)


def _column_block(batch: pa.RecordBatch, numbers: list[str], label: list[str]) -> RowBlock:
    columns = [batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False) for name in numbers]
    return np.column_stack(columns), _labels(batch, label, batch.num_rows)


def _list_block(batch: pa.RecordBatch, name: str, label: list[str]) -> RowBlock:
    if not batch.num_rows:
        return np.empty((0, 1)), [] if label else None
    values = _matrix(batch.column(name))
    return values, _labels(batch, label, len(values))


def _labels(batch: pa.RecordBatch, label: list[str], n_rows: int) -> list[str] | None:
    """Return the labels: texts, or `token <number>`."""
    if not label:
        return None
    column = batch.column(label[0])
    token_numbers = _is_list(column.type)
    found = column.flatten().to_pylist() if token_numbers else column.to_pylist()
    if len(found) != n_rows:
        raise ValueError(f"{label[0]} has {len(found)} entries for {n_rows} rows")
    return (
        [f"token {number}" for number in found]
        if token_numbers
        else ["" if text is None else str(text) for text in found]
    )
