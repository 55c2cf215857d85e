"""Lists of files as SQL text: what fills each `$name` of `sql/sources.sql`.

Names of files and columns, and numbers, become literals; no text of a user is used here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from saeflow.corpus.token_parts import BLOCK_TOKENS
from saeflow.corpus.tokenise.texts import MARK_TYPES
from saeflow.features.beside import ProbeFile
from saeflow.features.schema import (
    EFFECTS,
    ENDS_IN_NAME,
    LABELS,
    LEFT_OUT_TABLE,
    ORDERS,
    PART_TABLES,
    PROBE_TABLES,
    RULES,
    RUN_TABLES,
    SAMPLE_TABLES,
    SPANS,
    VALUES,
    ends_in_name,
)
from saeflow.query.files.chosen import FileLists
from saeflow.query.files.quoting import identifier, literal, unglobbed, whole
from saeflow.query.files.slices import slices, values_at, values_in

Files = Mapping[str, Sequence[str]]
Ranges = Sequence[tuple[int, int]]

_HIVE = "hive_partitioning = true, hive_types = {'low': bigint, 'high': bigint}"
_SQL_TYPES = {
    pa.int16(): "smallint", pa.int32(): "integer", pa.int64(): "bigint", pa.float32(): "float",
    pa.float64(): "double", pa.string(): "varchar", pa.bool_(): "boolean",
    pa.list_(pa.int32()): "integer[]", pa.list_(pa.float32()): "float[]",
}  # fmt: skip
_LOG = pa.schema(
    [
        *((name, pa.int64()) for name in ("step", "batch_rows", "dead")),
        *((name, pa.float64()) for name in ("lr", "loss", "variance_unexplained", "l0", "auxiliary_loss")),
        *((name, pa.float64()) for name in ("sparsity_loss", "k", "sparsity_factor", "grad_norm")),
    ]
)
"""What the log of a training may hold. Which columns it has depends on the settings."""

COUNTED_BY_PART = ("feature_stats", "feature_histogram", "feature_sources", "encoded_tokens")
"""Statistics of which a question may want those of some parts: their rows have the name of their file."""

_PARTS = (
    "(select split_part(line, ' ', 1)::bigint as part, split_part(line, ' ', 2) as folder, "
    "split_part(line, ' ', 3)::bigint as first_token_id, split_part(line, ' ', 4)::bigint as end_token_id "
    "from (select unnest(string_split({}, ';')) as line) where line <> '')"
)
"""One text is read a hundred times as fast as a list of so many literals."""
_RANGES = (
    "(select split_part(line, ' ', 1)::bigint as first_token_id, split_part(line, ' ', 2)::bigint as last_token_id "
    "from (select unnest(string_split({}, ';')) as line) where line <> '')"
)
_FILENAME = pa.field("filename", pa.string())
_OPTIONAL_TABLES = {
    **PART_TABLES, **LEFT_OUT_TABLE, **SAMPLE_TABLES, **RUN_TABLES, **EFFECTS, "labels": LABELS, "rules": RULES,
}  # fmt: skip

_OF_TOKENS = {"left_out": "token_id", "sample": "token_id", "sample_documents": "first_token_id"}
"""Tables without the rows of tokens whose values are hidden, by their column of tokens."""


def relations(
    files: Files, left_out: Ranges = (), hidden: Sequence[int] = (), lists: FileLists | None = None
) -> dict[str, str]:
    """Return SQL for each table of a run, without values in the ranges of token_id `left_out`, both ends included.

    Tokens of the `hidden` documents are padding, as compaction will write them, and their rows are left out. Statistics
    of the ranges still count them: entries and sources of these documents alone are left out. `lists` says how the
    files are listed; by default as SQL that any program runs.
    """
    lists = lists or FileLists()
    found = {
        "tokens": _tokens(files["tokens"], files.get("unmarked_tokens", ()), lists),
        "documents": _read_listed(lists.listed("documents", files["documents"]), "union_by_name = true"),
        "vocab": _read_files(files["vocab"]),
        "vocab_blocks": _vocab_blocks(files.get("vocab_blocks", ()), files["tokens"], lists),
    }
    found |= _as_compacted(found, hidden) if hidden else {}
    found |= {order: _select_values(order, files[order], left_out, lists) for order in ORDERS}
    found["values_at"] = _in_slices(files["token_major"], left_out, lists) or values_at(found["token_major"])
    for table, schema in _OPTIONAL_TABLES.items():
        named = table in COUNTED_BY_PART
        stored = files.get(table)
        rows = _read_listed(lists.listed(table, stored), "filename = true" if named else "") if stored else None
        found[table] = rows or no_rows(schema.append(_FILENAME) if named else schema)
    read_logs = [_read_files([path]) for path in files.get("training_log", ())]
    logs = [no_rows(_LOG), *(f"select * from {relation}" for relation in read_logs)]
    found["training_log"] = f"({' union all by name '.join(logs)})"
    for table, column in _OF_TOKENS.items() if left_out else ():
        unseen = _outside(left_out, column)
        found[table] = f"(select * from {found[table]} where {unseen})"
    return found | (_without_secrets(found, hidden) if left_out else {})


def _as_compacted(found: Mapping[str, str], hidden: Sequence[int]) -> dict[str, str]:
    """Return tokens, documents and blocks of vocabulary ids as they are after the hidden documents are removed."""
    gone = f"document_id in (select unnest({literal([*map(int, hidden)])}::bigint[]))"
    marked = f"(select *, coalesce({gone}, false) as is_gone from {found['tokens']})"
    emptied = ", ".join(f"if(is_gone, null, marked.{name}) as {name}" for name in ("document_id", *MARK_TYPES))
    masked = (
        "(select * exclude (is_gone) replace (if(is_gone, 0, vocab_id) as vocab_id, "
        f"{emptied}, mask and not is_gone as mask) from {marked} as marked)"
    )
    touched = f"(select distinct token_id // {BLOCK_TOKENS} from {found['tokens']} where {gone})"
    blocks = (
        f"(select * from {found['vocab_blocks']} where block_id not in {touched} union all "
        f"{_blocks_of(f'(select * from {masked} where token_id // {BLOCK_TOKENS} in {touched})')})"
    )
    documents = f"(select * from {found['documents']} where not {gone})"
    return {"tokens": masked, "documents": documents, "vocab_blocks": blocks}


def _without_secrets(found: Mapping[str, str], hidden: Sequence[int]) -> dict[str, str]:
    """Return the statistics that name entries and sources, without those that only hidden documents have."""
    shown = f"document_id not in (select unnest({literal([*map(int, hidden)])}::bigint[]))"
    entries = f"vocab_id in (select vocab_id from {found['tokens']} where mask and {shown})"
    sources = (
        "stored.source is null or stored.source in "
        f"(select known.source from {found['documents']} as known where {shown})"
    )
    kept = {"feature_vocab": entries, "feature_sources": sources, "encoded_tokens": sources}
    return {table: f"(select * from {found[table]} as stored where {condition})" for table, condition in kept.items()}


def _read_files(paths: Sequence[str], options: str = "") -> str:
    return _read_listed(literal([unglobbed(path) for path in paths]), options)


def _read_listed(listed: str, options: str = "") -> str:
    partitions = "" if "hive_partitioning" in options else ", hive_partitioning = false"
    return f"read_parquet({listed}{partitions}{', ' + options if options else ''})"


def _tokens(paths: Sequence[str], unmarked: Sequence[str], lists: FileLists) -> str:
    """Select the tokens. Files of an earlier saeflow, and those of tables, lack the columns of MARKS."""
    if not unmarked:
        return _read_listed(lists.listed("tokens", paths))
    lacking = {*unmarked}
    nothing = ", ".join(f"null::{_SQL_TYPES[kind]} as {name}" for name, kind in MARK_TYPES.items())
    marked = [each for each in paths if each not in lacking]
    parts = [f"select * from {_read_listed(lists.listed('tokens', marked))}"] if marked else []
    parts.append(f"select *, {nothing} from {_read_listed(lists.listed('tokens', unmarked))}")
    return f"({' union all '.join(parts)})"


def _select_values(order: str, paths: Sequence[str], left_out: Ranges, lists: FileLists) -> str:
    """Select the values of one order with the columns low, high and filename.

    Files of an earlier saeflow do not name their range, so they may hold anything. A folder `value=9` above the store
    would replace the file's own column of that name; there low and high are cut out of the file names instead.
    """
    ranged = [path for path in paths if ends_in_name(path)]
    others = [path for path in paths if not ends_in_name(path)]
    columns = ", ".join(VALUES[order].names)
    everywhere = "0::bigint as low, 9223372036854775807 as high"
    parts = [_select_ranged(columns, ranged, lists.listed(order, ranged, may_be_few=True))] if ranged else []
    if others:
        parts.append(f"select {columns}, {everywhere}, filename from {_read_listed(lists.listed(order, others))}")
    parts = parts or [f"select *, {everywhere}, null::varchar as filename from {no_rows(VALUES[order])}"]
    rows = " union all ".join(parts)
    unseen = _outside(left_out)
    return f"(select * from ({rows}) where {unseen})" if unseen else f"({rows})"


def _in_slices(paths: Sequence[str], left_out: Ranges, lists: FileLists) -> str | None:
    """Select the values at `tokens`, a list, of a run of several slices; None for a smaller one."""
    cut = slices(paths)
    if len(cut) < 2:
        return None
    columns, unseen = ", ".join(VALUES["token_major"].names), _outside(left_out)
    where = f" where {unseen}" if unseen else ""
    return " union all ".join(
        values_in(ends, f"({_select_ranged(columns, files, lists.listed('token_major', files))}{where})")
        for ends, files in cut
    )


def _outside(ranges: Ranges, column: str = "token_id") -> str:
    return " and ".join(f"{column} not between {whole(first)} and {whole(last)}" for first, last in ranges)


def _select_ranged(columns: str, paths: Sequence[str], listed: str) -> str:
    if any("=" in path.rpartition("/low=")[0] for path in paths):
        low, high = (f"regexp_extract(filename, {literal(ENDS_IN_NAME)}, {whole(end)})::bigint" for end in (1, 2))
        return f"select {columns}, {low} as low, {high} as high, filename from {_read_listed(listed)}"
    return f"select {columns}, low, high, filename from {_read_listed(listed, _HIVE)}"


def outline(files: Files) -> dict[str, Sequence[str]]:
    """Return a few files of each table. They have the columns and types of all files; only documents may have more."""
    found: dict[str, Sequence[str]] = {table: _one_of_each_sort(paths) for table, paths in files.items()}
    lacking = _without_blocks(files.get("vocab_blocks", ()), files["tokens"])
    tokens = [*files["tokens"][:1], *(path for path in lacking[:1] if path != files["tokens"][0])]
    unmarked = {*files.get("unmarked_tokens", ())}
    return found | {"tokens": tokens, "unmarked_tokens": [path for path in tokens if path in unmarked]}


def _one_of_each_sort(paths: Sequence[str]) -> list[str]:
    """Return the first file that names its range, and the first that does not."""
    first = {ends_in_name(path) is not None: path for path in reversed(paths)}
    return list(first.values())


def _without_blocks(paths: Sequence[str], tokens: Sequence[str]) -> list[str]:
    folders = {path.rpartition("/")[0] for path in paths}
    return [path for path in tokens if path.rpartition("/")[0] not in folders]


def _vocab_blocks(paths: Sequence[str], tokens: Sequence[str], lists: FileLists) -> str:
    """Select the stored blocks. Blocks that an earlier saeflow did not write are made from the tokens."""
    lacking = _without_blocks(paths, tokens)
    parts = [f"select * from {_read_listed(lists.listed('vocab_blocks', paths))}"] if paths else []
    if lacking:
        parts.append(_blocks_of(_read_listed(lists.listed("vocab_blocks", lacking))))
    return f"({' union all '.join(parts)})"


def _blocks_of(tokens: str) -> str:
    return (
        f"select token_id // {BLOCK_TOKENS} as block_id, min(token_id) as first_token_id, "
        "count(*)::integer as n_tokens, unhex(string_agg(printf('%08x', vocab_id), '' order by token_id)) "
        f"as vocab_ids from {tokens} group by block_id"
    )


def no_rows(schema: pa.Schema) -> str:
    """Return SQL for an empty table with these columns."""
    columns = ", ".join(f"null::{_SQL_TYPES[field.type]} as {field.name}" for field in schema)
    return f"(select {columns} where false)"


def spans_relation(annotations: Mapping[str, str]) -> str:
    """Select the spans of these files of annotations, by name, with the name as the first column.

    Only a forged span has no class. Columns are qualified: a question may have a parameter `annotation` or `class`.
    """
    columns = ", ".join(f"stored.{name}" for name in SPANS.names)
    parts = [
        f"select {literal(name)} as annotation, {columns} from {_read_files([path])} as stored "
        "where stored.class is not null"
        for name, path in annotations.items()
    ]
    nothing = f"(select null::varchar as annotation, {columns} from {no_rows(SPANS)} as stored)"
    return f"({' union all '.join(parts)})" if parts else nothing


def parts_relation(parts: Sequence[tuple[int, str, int, int]]) -> str:
    """Select the parts of the tokens: number, folder of the run's part, first token, and the one after the last."""
    return _PARTS.format(literal(";".join(" ".join(map(str, part)) for part in parts)))


def ranges_relation(ranges: Ranges) -> str:
    """Select ranges of token_id: the first token and the last."""
    return _RANGES.format(literal(";".join(f"{first} {last}" for first, last in ranges)))


def probe_relation(probes: Sequence[ProbeFile], table: str) -> str:
    """Select the rows of a table of probes, without classes that a newer probe of the same annotations has."""
    parts = [
        f"select * from {_read_files([each.location])} as stored"
        + (f" where stored.class not in ({', '.join(map(literal, each.without))})" if each.without else "")
        for each in probes
        if each.table == table
    ]
    return f"({' union all by name '.join(parts)})" if parts else no_rows(PROBE_TABLES[table])


def condition_of_encoded(
    ranges: Ranges | None, length: int, positions: Sequence[int] = (), entries: Sequence[int] = ()
) -> str:
    """Return SQL on a token's number `token` and its vocabulary id `entry`: true if the token was encoded.

    Tokens outside the ranges were not (None: all ranges were), nor were those at these positions and of these entries.
    """
    conditions = []
    if ranges is not None:
        inside = " or ".join(f"token between {whole(first)} and {whole(last)}" for first, last in ranges)
        conditions.append(f"({inside or 'false'})")
    if positions:
        conditions.append(f"token % {whole(length)} not in ({', '.join(map(whole, positions))})")
    if entries:
        conditions.append(f"entry not in ({', '.join(map(whole, entries))})")
    return " and ".join(conditions) or "true"


def reason_to_skip(length: int, positions: Sequence[int] = (), entries: Sequence[int] = ()) -> str:
    """Return SQL on `token` and `entry`: the setting that leaves the token out, null if none does."""
    cases = []
    if positions:
        cases.append(f"when token % {whole(length)} in ({', '.join(map(whole, positions))}) then 'position'")
    if entries:
        cases.append(f"when entry in ({', '.join(map(whole, entries))}) then 'special'")
    return f"case {' '.join(cases)} end" if cases else "null::varchar"


def side_by_side(schemas: Sequence[str], view: str) -> str:
    """Return SQL for one view of all runs, end to end, with the schema's name as the first column."""
    each = (f"select {literal(schema)} as run, * from {identifier(schema)}.{view}" for schema in schemas)
    return " union all ".join(each)
