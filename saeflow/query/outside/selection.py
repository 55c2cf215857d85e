"""The tokens that a user's select chooses.

The select is judged and run by itself, as `saeflow sql` does. Only its rows go on to the question, never its text.
"""

from __future__ import annotations

from collections.abc import Mapping

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from saeflow.query.ask import query
from saeflow.query.questions import Value
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, sanitise

_TOKENS_OF_DOCUMENTS = {
    "document_id": """
        select token_id from stg_tokens
        where mask and document_id in (select unnest(?::bigint[]))
    """,
    "key": """
        select token_id from stg_tokens
        where mask and document_id in (
            select places.document_id from stg_document_places as places
            where places.key in (select unnest(?::varchar[]))
        )
    """,
}
"""Statements that give the tokens of documents."""

_EXAMPLE = "sql 'select token_id from tokens where piece = '' the'''"


def chosen_tokens(connection: duckdb.DuckDBPyConnection, question: str, values: Mapping[str, Value]) -> pa.Array | None:
    """Return the numbers of the tokens that the question's `sql` chooses, int64 (n,); None if `tokens` names them.

    The select gives a column `token_id`, `document_id` or `key`; with one column only, its type decides. Nulls are left
    out. Raises UserError if it does anything but read, gives no such column, or if neither or both ways are used.
    """
    sql, tokens = str(values["sql"] or ""), values["tokens"]
    if bool(sql.strip()) == bool(tokens):
        raise UserError(
            f"{question} needs sql or tokens, {'not both' if tokens else 'one of the two'}. "
            f"Ask it as: {question} --{_EXAMPLE}, or {question} --tokens 3,7,12"
        )
    return None if tokens else tokens_selected_by(connection, sql)


def tokens_selected_by(connection: duckdb.DuckDBPyConnection, sql: str) -> pa.Array:
    """Return the tokens that a select chooses, int64 (n,); see `chosen_tokens`."""
    found = query(connection, sql)
    name, rows = _column_that_chooses(found)
    if name == "token_id":
        return rows
    of_documents = query(connection, _TOKENS_OF_DOCUMENTS[name], [rows.to_pylist()])
    return of_documents.column(0).combine_chunks()


def _column_that_chooses(found: pa.Table) -> tuple[str, pa.Array]:
    """Return which kind of thing the rows name, and their names, without nulls."""
    names = [name.lower() for name in found.column_names]
    alone = len(names) == 1
    for name, is_kind, kind in (
        ("token_id", _holds_whole_numbers, pa.int64()),
        ("document_id", _holds_whole_numbers, pa.int64()),
        ("key", pa.types.is_string, pa.string()),
    ):
        for place, each in enumerate(found.schema.types):
            if is_kind(each) and (names[place] == name or (alone and "document" not in names[place])):
                return name, _as(found.column(place), kind)
    shown = ", ".join(f"{each.name} ({each.type})" for each in found.schema)
    raise UserError(
        f"The select gives {sanitise(brief(shown, 300))}, but it must give token_id or document_id (whole numbers), "
        f"or key (texts). Name the column: {_EXAMPLE}"
    )


def _as(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    try:
        return pc.drop_null(column.cast(kind)).combine_chunks()
    except pa.ArrowInvalid:
        raise UserError("The select gives whole numbers that are beyond any token's or document's.") from None


def _holds_whole_numbers(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind)) or (pa.types.is_decimal(kind) and kind.scale == 0)
