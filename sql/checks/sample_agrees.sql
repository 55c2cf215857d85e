-- The stored sample holds the values of the sampled documents, and no others. Finds nothing if an earlier saeflow
-- stored none.
--
-- Grain:   one row per document whose sample is wrong.
-- Reads:   stg_sample, stg_sample_documents, stg_document_places, stg_tokens, stg_feature_major, stg_shape, is_sampled
-- Units:   n_… count values; the sums of hashes do not depend on the order of rows. n_tokens of the sample lies between
--          the document's tokens at which a feature fires and all its real tokens.
-- Ask it:  would an estimate be one of the same values?
with wanted as materialized (
    select document_id, first_token_id
    from stg_document_places as places
    where is_sampled(places.key) and (select has_sample from stg_shape)
),
owners as materialized (
    select token_id, tokens.document_id from stg_tokens as tokens semi join wanted using (document_id) where mask
),
sizes as (
    select document_id, count(*) as n_real from owners group by document_id
),
recount as (
    select
        document_id,
        count(*)                                            as n_values,
        sum(hash(feature_id, token_id, value)::hugeint)     as hash_sum,
        count(distinct token_id)                            as n_fired
    from stg_feature_major
    join owners using (token_id)
    group by document_id
),
stored as (
    select document_id, count(*) as n_values, sum(hash(feature_id, token_id, value)::hugeint) as hash_sum
    from stg_sample
    left join owners using (token_id)
    where (select has_sample from stg_shape)
    group by document_id
),
documents as (
    select document_id, min(first_token_id) as first_token_id, sum(n_tokens) as n_tokens
    from stg_sample_documents
    where (select has_sample from stg_shape)
    group by document_id
)
select
    document_id,
    coalesce(stored.n_values, 0)  as n_values_stored,
    coalesce(recount.n_values, 0) as n_values_counted,
    documents.n_tokens            as n_tokens_stored,
    sizes.n_real,
    n_fired
from documents
full join sizes using (document_id)
full join recount using (document_id)
full join stored using (document_id)
left join wanted using (document_id)
where (stored.n_values, stored.hash_sum) is distinct from (recount.n_values, recount.hash_sum)
    or (documents.n_tokens is null and n_fired > 0)
    or documents.n_tokens not between coalesce(n_fired, 0) and coalesce(sizes.n_real, 0)
    or documents.first_token_id <> wanted.first_token_id
order by document_id;
