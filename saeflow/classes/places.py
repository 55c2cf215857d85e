"""Find the spans of tokens that rows of a table of annotations name, and count the rows that name none.

Everything is a join in DuckDB, which spills to disk. No step compares every row with every document or token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import duckdb

from saeflow.classes.tables import Columns


@dataclass
class Unmatched:
    """Counts of rows that gave no token, by the first reason that applies, and of what was cut or is not encoded."""

    n_rows: int = 0
    """Rows of the table, matched or not."""
    n_unknown_documents: int = 0
    """No visible document has the key."""
    n_unknown_tokens: int = 0
    """No token of a visible document has the number: it is too large, or padding."""
    n_unreadable: int = 0
    """A start, end or token_id is missing, or one of the numbers is no whole number."""
    n_empty: int = 0
    """The place ends before it begins, or the document has no tokens."""
    n_outside: int = 0
    """The characters lie behind the end of the text, or before its beginning."""
    n_between: int = 0
    """No token stands for any of the characters: the tokenizer drops them."""
    n_cut: int = 0
    """Matched rows that reach beyond the text or into padding; the rest of the place counts."""
    n_tokens_left_out: int = 0
    """Tokens with a class that the run does not encode: a setting leaves them out, or they are new."""

    @property
    def n_matched(self) -> int:
        lost = self.n_unknown_documents + self.n_unknown_tokens + self.n_unreadable + self.n_empty
        return self.n_rows - lost - self.n_outside - self.n_between

    def as_facts(self) -> dict[str, int]:
        """Return the counts that are not zero, and the number of rows."""
        return {name: n for name, n in asdict(self).items() if n or name == "n_rows"}


def find_places(connection: duckdb.DuckDBPyConnection, columns: Columns) -> Unmatched:
    """Fill the table `annotate_found` with spans of tokens: class_id, document_id, first_token_id, last_token_id.

    Spans by character are not found here but put into `annotate_characters`, by document: class_id, document_id,
    first_char and end_char. Spans may overlap still.
    """
    for statement in _CREATE_TABLES:
        connection.execute(statement)
    found = Unmatched(n_rows=_count(connection, "select count(*) from annotate_rows"))
    match columns.place:
        case "tokens":
            _find_tokens(connection, columns, found)
        case "documents":
            connection.execute("alter table annotate_rows add column start bigint")
            connection.execute('alter table annotate_rows add column "end" bigint')
            _find_documents(connection, found)
        case "characters":
            _find_documents(connection, found)
    return found


_CREATE_TABLES = (
    "create table annotate_found (class_id bigint, document_id bigint, first_token_id bigint, last_token_id bigint)",
    "create table annotate_characters (class_id bigint, document_id bigint, first_char bigint, end_char bigint)",
    """
    create table annotate_documents as
    select document_id, key, first_token_id, first_token_id + n_tokens as end_token_id,
        row_number() over (order by first_token_id nulls last, document_id) as place
    from stg_documents
    """,
)

_OWNED = "annotate_documents where first_token_id < end_token_id"
"""The documents that have tokens, in the order of their tokens."""


def _find_documents(connection: duckdb.DuckDBPyConnection, found: Unmatched) -> None:
    """Rows without a start and an end mean whole documents."""
    connection.execute(
        """
        create table annotate_located as
        select class_id, document_id, first_token_id, end_token_id, "start" as first_char, "end" as end_char,
            case
                when document_id is null then 'n_unknown_documents'
                when unreadable or ("start" is null) != ("end" is null) then 'n_unreadable'
                when "start" >= "end" or first_token_id is null or first_token_id >= end_token_id then 'n_empty'
                when "start" is null then 'document'
                else 'characters'
            end as fate
        from annotate_rows
        join annotate_classes using (class)
        left join annotate_documents on key = document
        """
    )
    _count_fates(connection, found)
    connection.execute(
        "insert into annotate_found select class_id, document_id, first_token_id, end_token_id - 1 "
        "from annotate_located where fate = 'document'"
    )
    connection.execute(
        "insert into annotate_characters select class_id, document_id, first_char, end_char "
        "from annotate_located where fate = 'characters' order by document_id"
    )
    connection.execute("drop table annotate_located")


def _find_tokens(connection: duckdb.DuckDBPyConnection, columns: Columns, found: Unmatched) -> None:
    """A range of tokens may hold several documents, and padding between them: it becomes a span in each."""
    last = "last_token_id" if "last_token_id" in columns.read else "null"
    last = "end_token_id - 1" if "end_token_id" in columns.read else last
    connection.execute(
        f"""
        create table annotate_located as
        with ranges as (
            select class_id, unreadable, token_id as first, coalesce({last}, token_id) as last
            from annotate_rows join annotate_classes using (class)
        ),
        begun as (
            select ranges.*, place as first_place, first_token_id as first_known
            from ranges asof left join (from {_OWNED}) as owned on first < end_token_id
        )
        select begun.*, place as last_place, end_token_id - 1 as last_known,
            case
                when unreadable or first is null then 'n_unreadable'
                when first > last then 'n_empty'
                when first_place is null or place is null or first_place > place then 'n_unknown_tokens'
                else 'tokens'
            end as fate
        from begun asof left join (from {_OWNED}) as owned on last >= first_token_id
        """
    )
    _count_fates(connection, found)
    found.n_cut += _count(
        connection,
        "select count(*) from annotate_located where fate = 'tokens' and (first < first_known or last > last_known)",
    )
    # Ranges over several documents are merged first, or many long ones would give a span for each document each.
    merged = islands("(from annotate_located where fate = 'tokens')", ["class_id"], ["first", "last"])
    connection.execute(
        f"""
        insert into annotate_found
        with merged as (
            {merged}
        ),
        begun as (
            select merged.*, place as first_place
            from merged asof join (from {_OWNED}) as owned on first < end_token_id
        ),
        placed as (
            select begun.*, place as last_place
            from begun asof join (from {_OWNED}) as owned on last >= first_token_id
        ),
        by_document as (
            select class_id, first, last, unnest(generate_series(first_place, last_place)) as place from placed
        )
        select class_id, document_id, greatest(first, first_token_id), least(last, end_token_id - 1)
        from by_document join (from {_OWNED}) as owned using (place)
        """
    )
    connection.execute("drop table annotate_located")


def islands(rows: str, keys: list[str], ends: list[str]) -> str:
    """Return SQL that merges ranges which overlap or touch, both ends included, where all keys are equal."""
    (first, last), same = ends, ", ".join(keys)
    order = f"partition by {same} order by {first}, {last} rows between unbounded preceding and"
    return f"""
        select {same}, min({first}) as {first}, max({last}) as {last}
        from (
            select *, sum((reached is null or {first} > reached + 1)::bigint) over ({order} current row) as island
            from (select *, max({last}) over ({order} 1 preceding) as reached from {rows})
        )
        group by {same}, island
    """


def _count_fates(connection: duckdb.DuckDBPyConnection, found: Unmatched) -> None:
    for fate, n in connection.execute("select fate, count(*) from annotate_located group by fate").fetchall():
        if fate.startswith("n_"):
            setattr(found, fate, getattr(found, fate) + n)


def _count(connection: duckdb.DuckDBPyConnection, sql: str) -> int:
    return int(connection.execute(sql).fetchall()[0][0])
