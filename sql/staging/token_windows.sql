-- The vocabulary entries around some tokens as one text, to find copies, for a list of token ids.
--
-- Grain:   one row per token of the list that is real and in a visible document. No token may be listed twice.
-- Reads:   token_owners, stg_vocab_blocks
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
cut as (
    select token_id, first_id, last_id, unnest(generate_series(first_id // 512, last_id // 512)) as block_id from spans
),
parts as (
    select
        token_id,
        first_id,
        first_token_id,
        vocab_ids[
            4 * (greatest(first_id, first_token_id) - first_token_id) + 1
            : 4 * (least(last_id + 1, first_token_id + n_tokens) - first_token_id)
        ] as entries
    from cut
    join stg_vocab_blocks using (block_id)
    -- Two parts may share a block. An end below zero would count from the block's own end.
    where first_token_id <= last_id and first_token_id + n_tokens > first_id
)
select token_id, (token_id - first_id) || ':' || string_agg(hex(entries), '' order by first_token_id) as text_key
from parts
group by token_id, first_id;
