"""Types of the columns of Parquet files that are read together: values are joined exactly, or the files are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from saeflow.corpus.files import shown
from saeflow.corpus.metadata import LARGEST_EXACT
from saeflow.runtime.errors import UserError

_KINDS = {
    "nothing": pa.types.is_null,
    "text": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind),
    "whole": pa.types.is_integer,
    "fraction": pa.types.is_floating,
    "time": lambda kind: pa.types.is_date(kind) or pa.types.is_timestamp(kind),
    "nested": pa.types.is_nested,
    "bytes": lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind),
}
"""Types within which Parquet files may differ."""
_IN_LIST = re.compile(r"\.list\.(element|item)(?=\.|$)")
"""How Parquet names the values of lists."""


def require_like_columns(schemas: dict[str, pa.Schema], as_text: set[str | None]) -> None:
    """Raises UserError if files have a column in types that only fit together once values are changed, e.g. rounded.

    Whole numbers beside fractions fit if a float64 holds each of them, and if the column is not read as text.
    """
    met: dict[str, dict[str, pa.DataType]] = {}
    for path, schema in schemas.items():
        for name, kind in (leaf for field in schema for leaf in _leaf_columns(field.name, field.type)):
            met.setdefault(name, {})[path] = kind
    for name, types in met.items():
        paths = {_kind_of(types[path], name in as_text): path for path in reversed(types)}
        unlike = paths.keys() - {"nothing"}
        if len(unlike) < 2 or "text" in unlike:
            continue
        if unlike == {"whole", "fraction"} and name not in as_text and all(_is_exact(path, name) for path in types):
            continue
        one, other = sorted(paths[kind] for kind in sorted(unlike)[:2])
        raise UserError(
            f"corpus.files: column {name!r} is {types[one]} in {shown(one)}, and {types[other]} in {shown(other)}; "
            "joined, its values would change.\nWrite it with one type, or cast it with corpus.sql."
        )


def _leaf_columns(name: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
    """Yield the types of single values, also within lists and structs."""
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _leaf_columns(name, kind.value_type)
    elif pa.types.is_struct(kind):
        yield from (leaf for field in kind for leaf in _leaf_columns(f"{name}.{field.name}", field.type))
    else:
        yield name, kind


def _kind_of(kind: pa.DataType, as_text: bool) -> str:
    """Return a name for types that fit together; read as text, types of fractions and times write them unlike."""
    found = next((name for name, fits in _KINDS.items() if fits(kind)), str(kind))
    if as_text and found == "time":
        return "date" if pa.types.is_date(kind) else f"time {kind.tz}"
    return str(kind) if as_text and found == "fraction" else found


def _is_exact(path: str, column: str) -> bool:
    """True if the statistics of a Parquet file say that a float64 holds every whole number of a column."""
    about = pq.read_metadata(path)
    groups = [about.row_group(group) for group in range(about.num_row_groups)]
    chunks = [group.column(place) for group in groups for place in range(group.num_columns)]
    found = [each.statistics for each in chunks if _IN_LIST.sub("", each.path_in_schema) == column]
    exact = (
        each is not None and (not each.has_min_max or max(abs(each.min), abs(each.max)) <= LARGEST_EXACT)
        for each in found
    )
    return len(found) == len(groups) and all(exact)
