-- The tokens of a vocabulary entry that a filter lets through, or 5,000 of them.
--
-- Grain:   one row per token, in no order. If there are more than 5,000, 5,000 are drawn: see draw_order.
-- Reads:   stg_tokens, is_encoded, under_filter_ids, draw_order
-- Units:   only encoded tokens count. n_entry counts all that pass, n_counted the rows. The filter is that of
--          under_filter_ids.
-- Ask it:  from under_filter_of_entry(4711, 'novels', null, null, null, null, null, null)
create or replace macro under_filter_of_entry(
    vocab, source, document_key, since, until, role, with_feature, without_feature
) as table
with met as materialized (
    select tokens.token_id
    from stg_tokens as tokens
    where tokens.mask and tokens.vocab_id = vocab and is_encoded(tokens.token_id, tokens.vocab_id)
),
passing as materialized (
    from under_filter_ids(
        (select list(token_id) from met), source, document_key, since, until, role, with_feature, without_feature
    )
)
select token_id, count(*) over () as n_entry, least(count(*) over (), 5000) as n_counted
from passing
order by draw_order(token_id, 0), token_id
limit 5000;
