"""The values at tokens all over the corpus, without a look at all values.

DuckDB passes over groups of rows without a wanted token if all wanted tokens lie within 2²⁶: it then keeps a bit for
each (github.com/duckdb/duckdb/pull/23250). Beyond, it has a Bloom filter, which tells nothing of a group of rows, and
reads them all. So a large run is asked in slices. At 10¹⁰ values the values at 30,000 tokens took 60 seconds in one
piece, and take 9 in five.
"""

from __future__ import annotations

from collections.abc import Sequence

from saeflow.features.schema import ends_in_name
from saeflow.query.files.quoting import whole

SLICE_TOKENS = 1 << 26
"""Tokens of a slice."""


def slices(paths: Sequence[str]) -> list[tuple[tuple[int, int], list[str]]]:
    """Cut files into slices: the first and last token of each, and its files. One whose name does not say: no slices.

    A file may have more tokens than a slice should; it is a slice then.
    """
    found: list[tuple[tuple[int, int], list[str]]] = []
    ends = [ends_in_name(path) for path in paths]
    if None in ends:
        return []
    for (low, high), path in sorted(zip(ends, paths, strict=True)):  # type: ignore[misc]
        if found and high - found[-1][0][0] < SLICE_TOKENS:
            (first, last), files = found[-1]
            found[-1] = (first, max(last, high)), [*files, path]
        else:
            found.append(((low, high), [path]))
    return found


def values_in(ends: tuple[int, int], rows: str) -> str:
    """Select the values at `tokens`, a list, from rows that hold values of a slice."""
    inside = f"token between {whole(ends[0])} and {whole(ends[1])}"
    return values_at(rows, f"select token from (select unnest(tokens) as token) where {inside}")


def values_at(rows: str, wanted: str = "select unnest(tokens)") -> str:
    """Select the values at the wanted tokens, by default those of `tokens`, a list."""
    return f"select token_id, feature_id, value from {rows} where token_id in ({wanted})"
