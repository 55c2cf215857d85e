"""Read labels of features from files of other tools: CSV, JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from saeflow.corpus.files import UNREADABLE, unpacked
from saeflow.query.labels import LABEL_COLUMNS, Label, Sheet, clean_label, column_names
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.text import brief, decoded_text, encoding_of

_PACKED = {".gz", ".bz2", ".xz", ".zst"}

Row = tuple[str, Mapping[str, Any]]
"""The row's place in the file, and its cells by column name."""


def read(path: Path, n_features: int | None) -> dict[int, Label | None]:
    """Return one label for each feature in a file; None if the label is empty.

    If a feature has several labels, the one with the best score counts; among equals, the first. Raises UserError,
    which names file and line, if anything in the file is wrong.
    """
    found: dict[int, Label | None] = {}
    for where, row in _label_rows(path):
        feature = _feature_number(row.get("feature_id"), where)
        require_feature(feature, n_features, f"{where}: ")
        label = clean_label(row.get("label"), row.get("score"), where)
        before = found.get(feature)
        if before is None or (label is not None and (label.score or 0) > (before.score or 0)):
            found[feature] = label
    if not found:
        raise UserError(f"{path} holds no labels.")
    return found


def require_feature(feature: int, n_features: int | None, where: str) -> None:
    if feature < 0 or (n_features is not None and feature >= n_features):
        last = f"features go from 0 to {n_features - 1}" if n_features else "features are numbered from 0"
        raise UserError(f"{where}There is no feature {feature}; {last}.")


def _unpacked(path: Path) -> bytes:
    """Return the bytes of a file, unpacked if they are packed, and a text in UTF-16 as UTF-8."""
    content = unpacked(path.read_bytes())
    return decoded_text(content).encode() if encoding_of(content) == "utf-16" else content


def _label_rows(path: Path) -> Iterator[Row]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = next((suffix for suffix in reversed(suffixes) if suffix not in _PACKED), "")
    try:
        if kind == ".parquet":
            yield from _parquet_rows(path)
        elif kind in (".jsonl", ".ndjson", ".json"):
            yield from _json_lines(path)
        else:
            yield from _csv_lines(path)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder. Name a file in it.") from None
    except (ValueError, OverflowError, RecursionError, *UNREADABLE) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} cannot be read: {brief(first_line(error), 200).rstrip('.')}.") from None


def _csv_lines(path: Path) -> Iterator[Row]:
    sheet = Sheet.of(_unpacked(path))
    for line, row in zip(sheet.lines, sheet.rows, strict=True):
        if any(map(str.strip, row)):
            yield f"{path.name}, line {line}", {name: sheet.cell(row, name) for name in LABEL_COLUMNS}


def _json_lines(path: Path) -> Iterator[Row]:
    """Yield objects that stand one on a line, or in one array."""
    text = _unpacked(path).decode("utf-8-sig")
    if text.lstrip().startswith("["):
        found = [(f"entry {number}", each) for number, each in enumerate(json.loads(text), 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        found = [(f"line {number}", _parse_object(line, number)) for number, line in lines if line.strip()]
    for place, each in found:
        if not isinstance(each, dict):
            raise ValueError(f"{place}: it is not an object with feature_id and label")
        yield f"{path.name}, {place}", _by_column(each)


def _parse_object(line: str, number: int) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        names = column_names(file.schema_arrow.names)
        wanted = [name for name, meant in zip(file.schema_arrow.names, names, strict=True) if meant in LABEL_COLUMNS]
        number = 0
        for batch in file.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}, row {number}", _by_column(row)


def _by_column(row: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(zip(column_names(list(row)), row.values(), strict=True))
    for name in LABEL_COLUMNS[:2]:
        if name not in found:
            raise ValueError(f"there is no column {name}; it has {brief(', '.join(row), 150)}")
    return found


def _feature_number(value: object, where: str) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        if isinstance(value, int | str) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise UserError(f"{where}: {brief(str(value))!r} is not the number of a feature.")
