-- Which features fire on a text, wherever the corpus has it.
--
-- Grain:   one row per feature that fires on a token of the text, at most n, the most telling first.
-- Reads:   tokens_of_text, is_encoded, stg_token_major, stg_feature_stats, stg_size, feature_names
-- Units:   the text's tokens are those that tokens_of_text finds, whatever the case, if they were encoded. n_tokens
--          counts those at which the feature fires; share is their share of the text's tokens. density is the feature's
--          share of all encoded tokens, and lift = share / density. Rows are ordered by share * log2(lift).
-- Parameters: text text, n bigint = 20
-- Ask it:  which features mean Jerusalem?  from features_on('Jerusalem')
create or replace macro features_on(text, n := 20) as table
with found as materialized (
    select distinct token_id from tokens_of_text(text) where is_encoded(token_id, vocab_id)
),
counts as materialized (
    select feature_id, count(*) as n_tokens from stg_token_major where token_id in (from found) group by feature_id
),
shares as (
    select
        feature_id,
        counts.n_tokens,
        counts.n_tokens / (select count(*) from found)                  as share,
        stats.n_tokens / n_encoded_tokens                               as density,
        counts.n_tokens * n_encoded_tokens::double / (stats.n_tokens * (select count(*) from found)::double) as lift
    from counts
    join stg_feature_stats as stats using (feature_id)
    cross join stg_size
)
select feature_id, feature_names.label, shares.n_tokens, share, density, lift
from shares
left join feature_names using (feature_id)
order by share * log2(lift) desc, feature_id
limit n;
