-- Tokens of the vocabulary entry on which a feature fires most often, at which the feature is silent.
--
-- Grain:   one row per silent token: n of them, drawn at random, in corpus order.
-- Reads:   stg_feature_vocab, tokens_of_feature, stg_tokens, is_encoded, token_texts, draw_order
-- Units:   only encoded tokens count, because a token that a setting skips is no miss. n_silent counts all silent
--          tokens of the entry, n_fired those at which the feature fires; context shows 12 tokens on either side. The
--          seed chooses the draw.
-- Parameters: feature bigint, n bigint = 20, seed bigint = 0
-- Ask it:  what must be around the word for feature 12 to fire?  from near_misses(12)
create or replace macro near_misses(feature, n := 20, seed := 0) as table
with entry as materialized (
    select vocab_id from stg_feature_vocab where feature_id = feature order by n_tokens desc, vocab_id limit 1
),
firing as materialized (
    select token_id from tokens_of_feature(feature)
),
met as materialized (
    select token_id, token_id in (from firing) as has_fired
    from stg_tokens
    where mask and vocab_id = (from entry) and is_encoded(token_id, vocab_id)
),
chosen as materialized (
    select
        token_id,
        count(*) over ()                           as n_silent,
        (select count(*) from met where has_fired) as n_fired
    from met
    where not has_fired
    qualify row_number() over (order by draw_order(token_id, seed), token_id) <= n
)
select token_id, found.piece, found.context, found.key, found.source, found.position, chosen.n_silent, chosen.n_fired
from chosen
join token_texts((select list(token_id) from chosen), 12, 12) as found using (token_id)
order by token_id;
