-- The tokens around some tokens, for a list of token ids.
--
-- Grain:   one row per (centre, token of its span). The centres are the real tokens of the list.
-- Reads:   token_owners, stg_vocab, vocab_id_of
-- Units:   before and after count tokens; a span never leaves its document. key, source and position are the centre's.
--          short_digits are those of stg_vocab.
-- Ask it:  from token_spans([4711], 2, 2)
create or replace macro token_spans(ids, before, after) as table
with owned as materialized (
    select
        token_id as centre,
        key,
        owners.source,
        position,
        unnest(generate_series(
            greatest(first_token_id, token_id - least(greatest(before, 0), 1::bigint << 40)),
            least(end_token_id - 1, token_id + least(greatest(after, 0), 1::bigint << 40))
        )) as token_id
    from token_owners(ids) as owners
),
spelt as materialized (
    select centre, token_id, key, owned.source, position, vocab_id_of(token_id) as vocab_id from owned
)
select centre, token_id, entries.piece, entries.short_digits, spelt.key, spelt.source, spelt.position
from spelt
join stg_vocab as entries using (vocab_id);
