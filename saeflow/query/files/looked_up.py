"""The SQL of connections that look tokens up without SQL, where `sql/` would read blocks and sort documents."""

from __future__ import annotations

import re
from functools import cache

_AS_OF = re.compile(r"\basof join stg_document_places( as (\w+))?\s+on ([\w.]+) >= ((?:\w+\.)?)first_token_id\b")

_MACRO = re.compile(r"\bcreate or replace macro (\w+)\(")

_TOKEN_TEXTS = """
create or replace macro token_texts(ids, before, after) as table
with around as materialized (
    select token_id, {text_around}(token_id, before::bigint, after::bigint) as found
    from (select unnest(ids)::bigint as token_id)
)
select
    token_id,
    found.piece,
    found.text_before,
    found.token_text,
    found.text_after,
    found.context,
    found.key,
    found.source,
    found.position
from around
where found is not null;
"""

_TOKEN_SURROUNDINGS = """
create or replace macro token_surroundings(ids, firing, before, after) as table
with fired as (
    select unnest(firing, recursive := true)
),
around as materialized (
    select token_id, {pieces_around}(token_id, before::bigint, after::bigint) as found
    from (select unnest(ids)::bigint as token_id)
),
walked as materialized (
    select
        token_id as centre,
        unnest(generate_series(found.first_near_id, found.first_near_id + len(found.pieces) - 1)) as token_id
    from around
    where found is not null
),
levels as (
    select centre, list(coalesce(fired.value, 0) order by token_id) as feature_values
    from walked
    left join fired using (token_id)
    group by centre
)
select
    centre                                  as token_id,
    centre - found.first_near_id + 1        as place,
    found.pieces,
    feature_values,
    found.key,
    found.source,
    found.position
from levels
join around on centre = around.token_id;
"""

_TOKEN_PLACES = """
create or replace macro token_places(ids) as table
with found as materialized (
    select token_id, {place}(token_id) as place from (select unnest(ids)::bigint as token_id)
)
select token_id, place.vocab_id, place.piece, place.document_id, place.key, place.source, place.position
from found
where place is not null;
"""

_TOKENS_WHERE = """
create or replace macro tokens_where(feature, threshold := 0) as table
with firing as materialized (
    select token_id, value
    from tokens_of_feature(feature)
    where is_beyond(value, threshold::double)
    order by token_id
),
found as materialized (
    select token_id, value, {place}(token_id) as place from firing
)
select token_id, value, place.piece, place.key, place.source, place.position
from found
where place is not null;
"""
"""Tokens are sorted first, and what follows keeps their order: so rows of many files come to `place` in few batches.
Each batch costs a third of a millisecond."""

_INSTEAD = {
    "tokens_where": _TOKENS_WHERE,
    "token_places": _TOKEN_PLACES,
    "token_texts": _TOKEN_TEXTS,
    "token_surroundings": _TOKEN_SURROUNDINGS,
}
"""Macros that answer as those of `sql/` do, with the functions of this connection."""


def vocab_id_function(number: int) -> str:
    """Return the function of a token that gives its vocabulary id, in the run of this number."""
    return f"vocab_id_{number}"


def document_start_function(number: int) -> str:
    """Return the function of a token that gives the first token of the last document begun at or before it."""
    return f"document_start_{number}"


def place_function(number: int) -> str:
    """Return the function of a token that gives its entry, document and position; null if it is in no document."""
    return f"place_of_token_{number}"


def text_around_function(number: int) -> str:
    """Return the function of a token, and of numbers of tokens before and after it, that gives the text there."""
    return f"text_around_{number}"


def pieces_around_function(number: int) -> str:
    """Return the function of the same that gives the text of each token there."""
    return f"pieces_around_{number}"


@cache
def looking_up(text: str, number: int) -> str:
    """Return a file of `sql/` for the run of this number, whose connection has these functions."""
    found = _MACRO.search(text)
    if found and found[1] in _INSTEAD:
        return _INSTEAD[found[1]].format(
            place=place_function(number),
            text_around=text_around_function(number),
            pieces_around=pieces_around_function(number),
        )
    return _AS_OF.sub(rf"join stg_document_places\1 on \4first_token_id = {document_start_function(number)}(\3)", text)
