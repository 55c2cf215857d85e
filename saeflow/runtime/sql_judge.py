"""Judge a statement by what DuckDB's parser and planner make of it: only reading is let through.

First the parsed tree, before anything is bound: query nodes, functions that give tables, functions that act. Then the
plan: its operators. Both are lists of what may be, because a later DuckDB may know more ways to write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import duckdb


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}

_TABLE_FUNCTIONS = _words(
    """
    range generate_series repeat repeat_row unnest json_each json_tree query_table glob sniff_csv
    read_parquet parquet_scan read_csv read_csv_auto read_json read_json_auto read_json_objects
    read_json_objects_auto read_ndjson read_ndjson_auto read_ndjson_objects read_text read_blob read_duckdb
    parquet_metadata parquet_file_metadata parquet_full_metadata parquet_kv_metadata parquet_schema
    parquet_bloom_probe duckdb_columns duckdb_databases duckdb_functions duckdb_keywords duckdb_memory
    duckdb_schemas duckdb_settings duckdb_tables duckdb_types duckdb_views pragma_collations pragma_database_size
    pragma_platform pragma_show pragma_storage_info pragma_table_info pragma_version pg_timezone_names
    icu_calendar_names test_all_types summary delta_scan iceberg_scan read_avro read_xlsx sqlite_scan
    postgres_scan st_read
    """
)
"""Functions that give tables and only read. The connection decides which files they may open."""

_ACTING = {"setseed", "setval", "nextval", "write_log", "sleep_ms", "pg_sleep"}
"""Functions that give a value and leave something changed, or only make others wait."""

_MAKING_TABLES = {"store_rejects", "rejects_table", "rejects_scan"}
"""Options of a reader that put what it could not read into tables of the connection, under any name."""

_OPERATORS = _words(
    """
    asof_join blocking_sample blockwise_nl_join chunk_scan column_data_scan cross_product cte cte_scan delim_scan
    delim_join dummy_scan empty_result expression_scan filter hash_group_by hash_join ie_join inout_function
    left_delim_join limit limit_percent nested_loop_join order_by partitioned_aggregate perfect_hash_group_by
    piecewise_merge_join pivot positional_join positional_scan projection query_table rec_cte rec_cte_scan
    rec_key_cte rec_rec_cte_scan recursive_cte recursive_cte_scan recursive_key_cte recursive_key_join
    recursive_partial_key_join recursive_recurring_cte_scan reservoir_sample result_collector right_delim_join
    seq_scan index_scan show_ref streaming_limit streaming_sample streaming_window table_scan top_n
    ungrouped_aggregate union unnest verify_vector window window_self_join
    """
)

_EXPLAIN = re.compile(r"\s*explain\s+(?:analyze\s+)?", re.IGNORECASE)


def only_reads(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: Sequence[object] = (), macros: Collection[str] = ()
) -> bool:
    """True if the text is one statement that only reads. It is planned, not run. `macros`: names of our own tables.

    Raises duckdb.Error if DuckDB cannot parse or plan it.
    """
    try:
        kinds = [statement.type for statement in duckdb.extract_statements(sql)]
    except ValueError:  # a kind of statement that DuckDB's own list lacks, such as UPDATE EXTENSIONS
        return False
    if kinds == [duckdb.StatementType.EXPLAIN] and (explain := _EXPLAIN.match(sql)):
        return only_reads(connection, sql[explain.end() :], parameters, macros)
    if kinds != [duckdb.StatementType.SELECT] or not _is_reading_tree(connection, sql, macros):
        return False
    plan = connection.execute(f"explain (format json) {sql}", parameters or None).fetchall()
    return {name for row in plan for name in _operators(row[-1])} <= _OPERATORS | _TABLE_FUNCTIONS


def _is_reading_tree(connection: duckdb.DuckDBPyConnection, sql: str, macros: Collection[str]) -> bool:
    """Look at every node of the parsed statement."""
    ((text,),) = connection.execute("select json_serialize_sql(?::varchar)", [sql]).fetchall()
    tree = json.loads(text)
    waiting: list[Any] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            kind, function = str(node.get("type")), str(node.get("function_name")).lower()
            gives_table = str(node.get("function", {}).get("function_name")).lower() if kind == "TABLE_FUNCTION" else ""
            named = {str(name).lower() for name in (node.get("name"), *(node.get("column_names") or ()))}
            if (kind.endswith("_NODE") and kind not in _NODES) or function in _ACTING or named & _MAKING_TABLES:
                return False
            if gives_table and gives_table not in _TABLE_FUNCTIONS and gives_table not in macros:
                return False
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return not tree["error"]


def _operators(plan: object) -> Iterator[str]:
    for node in json.loads(plan) if isinstance(plan, str) else plan if isinstance(plan, list) else ():
        yield str(node.get("name", "")).strip().lower()
        yield from _operators(node.get("children", []))
