-- The documents in which a feature fires most.
--
-- Grain:   one row per document in which it fires, the largest sum of values first; ties in corpus order.
-- Reads:   tokens_of_feature, stg_document_places, strength, peak_value
-- Units:   n_tokens counts the document's tokens at which the feature fires; rate is their share of its tokens. Values
--          are in the units of the activations; top_token_id is the first of the strongest tokens, max_value
--          its value. In a signed run documents are ordered by the sum of magnitudes.
-- Parameters: feature bigint, n bigint = 20
-- Ask it:  which documents is feature 12 about?  from top_documents(12)
create or replace macro top_documents(feature, n := 20) as table
with firing as materialized (
    select token_id, value::double as value
    from tokens_of_feature(feature)
)
select
    document_id,
    key,
    source,
    count(*)                                      as n_tokens,
    count(*) / any_value(end_token_id - first_token_id) as rate,
    sum(value)                                    as sum_value,
    peak_value(value)                              as max_value,
    min_by(token_id, (-strength(value), -value, token_id))         as top_token_id
from firing
asof join stg_document_places on firing.token_id >= stg_document_places.first_token_id
where token_id < end_token_id
group by document_id, key, source
order by sum(strength(value)) desc, min(first_token_id)
limit n;
