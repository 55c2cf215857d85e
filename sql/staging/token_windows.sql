-- The vocabulary entries around some tokens as one text, to find copies, for a list of token ids.
--
-- Grain:   one row per token of the list that is real and in a visible document. No token may be listed twice.
-- Reads:   token_owners, vocab_id_of
-- Units:   before and after count tokens, inside the document. Two tokens have one text_key if and only if the entries
--          around them are the same in the same order, and the tokens have the same place among them.
-- Ask it:  from token_windows([0, 4711], 12, 12)
create or replace macro token_windows(ids, before, after) as table
with spans as (
    select
        token_id,
        greatest(first_token_id, token_id - least(greatest(before, 0), 1::bigint << 40))  as first_id,
        least(end_token_id - 1, token_id + least(greatest(after, 0), 1::bigint << 40))    as last_id
    from token_owners(ids)
),
walked as materialized (
    select token_id, first_id, unnest(generate_series(first_id, last_id)) as near_id from spans
),
spelt as (
    select token_id, first_id, near_id, vocab_id_of(near_id) as vocab_id from walked
)
select token_id, (token_id - first_id) || ':' || string_agg(vocab_id, ' ' order by near_id) as text_key
from spelt
group by token_id, first_id;
