"""Files as SQL text: what `sql/sources.sql` reads in the place of each `$name`.

Nothing here is text of a user: names of files and columns, and numbers, each as a literal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import pyarrow as pa

from saeflow.features.schema import BLOCK_TOKENS, LABELS, ORDERS, PART_TABLES, RUN_TABLES, VALUES
from saeflow.runtime.text import HOSTILE

Files = Mapping[str, Sequence[str]]
Ranges = Sequence[tuple[int, int]]

_HIVE = "hive_partitioning = true, hive_types = {'low': bigint, 'high': bigint}"
_BY_NAME = r"regexp_extract(filename, '/low=(\d+)/high=(\d+)/[^/]*$', {})::bigint"
_TYPES = {
    pa.int16(): "smallint", pa.int32(): "integer", pa.int64(): "bigint", pa.float32(): "float",
    pa.float64(): "double", pa.string(): "varchar", pa.bool_(): "boolean",
}  # fmt: skip
_OPTIONAL = {**PART_TABLES, **RUN_TABLES, "labels": LABELS}


def relations(files: Files, left_out: Ranges = ()) -> dict[str, str]:
    """Each table of a run as something to select from; `left_out` are ranges of token_id, both ends included, whose
    values are not shown."""
    found = {
        "tokens": _read(files["tokens"]),
        "documents": _read(files["documents"], "union_by_name = true"),
        "vocab": _read(files["vocab"]),
        "vocab_blocks": _vocab_blocks(files.get("vocab_blocks", ()), files["tokens"]),
    }
    found |= {order: _values(order, files[order], left_out) for order in ORDERS}
    for table, schema in _OPTIONAL.items():
        options = "filename = true" if table == "feature_stats" else ""
        found[table] = _read(files[table], options) if files.get(table) else _empty(schema)
    return found


def _read(paths: Sequence[str], options: str = "") -> str:
    listed = literal([unglobbed(path) for path in paths])
    partitions = "" if "hive_partitioning" in options else ", hive_partitioning = false"
    return f"read_parquet({listed}{partitions}{', ' + options if options else ''})"


def _values(order: str, paths: Sequence[str], left_out: Ranges) -> str:
    """With the columns low, high and filename; files of an earlier saeflow do not say, and may hold anything.

    A folder `value=9` above the store would give its value to a column in the place of the file's own, so that there
    low and high are taken from the names: it opens as few files, but looks at each name a little longer.
    """
    said = [path for path in paths if _says_what_it_holds(path)]
    others = [path for path in paths if not _says_what_it_holds(path)]
    columns = ", ".join(VALUES[order].names)
    everywhere = "0::bigint as low, 9223372036854775807 as high"
    parts = [_values_of(columns, said)] if said else []
    parts += [f"select {columns}, {everywhere}, filename from {_read(others)}"] if others else []
    parts = parts or [f"select *, {everywhere}, null::varchar as filename from {_empty(VALUES[order])}"]
    rows = " union all ".join(parts)
    unseen = " and ".join(f"token_id not between {first} and {last}" for first, last in left_out)
    return f"(select * from ({rows}) where {unseen})" if unseen else f"({rows})"


def _values_of(columns: str, paths: Sequence[str]) -> str:
    if any("=" in path.rpartition("/low=")[0] for path in paths):
        low, high = map(_BY_NAME.format, (1, 2))
        return f"select {columns}, {low} as low, {high} as high, filename from {_read(paths)}"
    return f"select {columns}, low, high, filename from {_read(paths, _HIVE)}"


def _says_what_it_holds(path: str) -> bool:
    return re.search(r"/low=\d+/high=\d+/[^/]*$", path) is not None


def outline(files: Files) -> dict[str, Sequence[str]]:
    """A few files of each table that give the same columns and types as all of them, but for further ones of
    documents."""
    found: dict[str, Sequence[str]] = {table: _one_of_each(paths) for table, paths in files.items()}
    lacking = _without_blocks(files.get("vocab_blocks", ()), files["tokens"])
    return found | {"tokens": [*files["tokens"][:1], *(path for path in lacking[:1] if path != files["tokens"][0])]}


def _one_of_each(paths: Sequence[str]) -> list[str]:
    """Of the files that say what they hold, and of those that do not."""
    first = {_says_what_it_holds(path): path for path in reversed(paths)}
    return list(first.values())


def _without_blocks(paths: Sequence[str], tokens: Sequence[str]) -> list[str]:
    folders = {path.rpartition("/")[0] for path in paths}
    return [path for path in tokens if path.rpartition("/")[0] not in folders]


def _vocab_blocks(paths: Sequence[str], tokens: Sequence[str]) -> str:
    """Blocks as stored; of token parts that an earlier saeflow wrote without them, made from the tokens."""
    lacking = _without_blocks(paths, tokens)
    parts = [f"select * from {_read(paths)}"] if paths else []
    if lacking:
        parts.append(
            f"select token_id // {BLOCK_TOKENS} as block_id, min(token_id) as first_token_id, "
            "count(*)::integer as n_tokens, unhex(string_agg(printf('%08x', vocab_id), '' order by token_id)) "
            f"as vocab_ids from {_read(lacking)} group by block_id"
        )
    return f"({' union all '.join(parts)})"


def _empty(schema: pa.Schema) -> str:
    columns = ", ".join(f"null::{_TYPES[field.type]} as {field.name}" for field in schema)
    return f"(select {columns} where false)"


def unglobbed(path: str) -> str:
    """The path as a glob that matches only itself: read_parquet expands `*`, `?` and `[` even in a list."""
    return re.sub(r"[*?\[]", r"[\g<0>]", path)


def condition_of_encoded(
    ranges: Ranges | None, length: int, positions: Sequence[int] = (), entries: Sequence[int] = ()
) -> str:
    """Was a token encoded, as SQL on its number `token` and its vocabulary id `entry`? Without ranges all were, but for
    these positions and entries."""
    said = []
    if ranges is not None:
        inside = " or ".join(f"token between {first} and {last}" for first, last in ranges)
        said.append(f"({inside or 'false'})")
    if positions:
        said.append(f"token % {length} not in ({', '.join(map(str, positions))})")
    if entries:
        said.append(f"entry not in ({', '.join(map(str, entries))})")
    return " and ".join(said) or "true"


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def literal(value: object) -> str:
    """A value as SQL on one line, without anything that a terminal would obey."""
    match value:
        case None:
            return "null"
        case bool() | int():
            return str(value).lower()
        case float() if math.isfinite(value):
            return repr(value)
        case dict():
            return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(literal, value)) + "]"
    text = str(value).encode("utf-8", "replace").decode().replace("'", "''")
    return f"E'{_escaped(text)}'" if HOSTILE.search(text) else f"'{text}'"


def _escaped(text: str) -> str:
    doubled = text.replace("\\", "\\\\")
    return HOSTILE.sub(lambda found: "".join(f"\\x{byte:02x}" for byte in found[0].encode()), doubled)


def side_by_side(schemas: Sequence[str], view: str) -> str:
    """One view of every run end to end, with the schema's name in front."""
    each = (f"select {literal(schema)} as run, * from {identifier(schema)}.{view}" for schema in schemas)
    return " union all ".join(each)
