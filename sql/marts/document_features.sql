-- The features that fire in a document, those that tell it from the others first.
--
-- Grain:   one row per feature that fires in the document, the largest score first; ties by feature; at most n.
-- Reads:   stg_document_places, stg_tokens, is_encoded, stg_token_major, stg_feature_stats, stg_size, feature_names,
--          strength, peak_value, telling_score
-- Units:   n_tokens counts the document's tokens at which the feature fires; share is their share of its encoded
--          tokens, density the feature's share of all encoded tokens, and lift = share / density. score = log2(1 +
--          n_tokens) * log2(lift) * -log2(density): see telling_score. A feature that fires as often everywhere scores
--          0. max_value is in the units of the activations; top_token_id is the first of the strongest tokens.
-- Parameters: document_key text, n bigint = 50
-- Ask it:  what is this chapter about?  from document_features('austen/emma/chapter-26')
create or replace macro document_features(
    document_key,
    n := 50
) as table
with document as materialized (
    select places.first_token_id, places.end_token_id
    from stg_document_places as places
    where places.key = document_key
),
mine as materialized (
    select tokens.token_id
    from stg_tokens as tokens
    join document on tokens.token_id >= document.first_token_id and tokens.token_id < document.end_token_id
    where tokens.mask and is_encoded(tokens.token_id, tokens.vocab_id)
),
counts as (
    select
        feature_id,
        count(*)                                               as n_tokens,
        peak_value(value)::double                              as max_value,
        min_by(token_id, (-strength(value), -value, token_id)) as top_token_id
    from stg_token_major
    where token_id in (select token_id from mine)
    group by feature_id
),
shares as (
    select
        feature_id,
        counts.n_tokens,
        counts.n_tokens / (select count(*) from mine) as share,
        stats.n_tokens / n_encoded_tokens             as density,
        counts.max_value,
        counts.top_token_id
    from counts
    join stg_feature_stats as stats using (feature_id)
    cross join stg_size
)
select
    feature_id,
    feature_names.label,
    n_tokens,
    share,
    density,
    share / density as lift,
    max_value,
    top_token_id,
    telling_score(log2(1 + n_tokens) * log2(share / density), density) as score
from shares
left join feature_names using (feature_id)
order by score desc, feature_id
limit n;
