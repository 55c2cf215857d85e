-- The number of encoded tokens that a filter lets through, in each source: the denominator of rates.
--
-- Grain:   one row per source with such tokens; source is null for documents without one.
-- Reads:   stg_encoded_tokens, stg_shape, stg_document_places, under_filter_documents, stg_tokens, is_encoded,
--          under_filter_ids, tokens_of_feature
-- Units:   n_encoded counts encoded tokens, exactly. null means no filter; the others are those of under_filter_ids.
--          Stored counts serve if the filter is a source or none, every source is counted apart, and no document is
--          hidden.
-- Ask it:  from under_filter_sizes(null, null, null, null, 'assistant', null, null)
create or replace macro under_filter_sizes(
    source, document_key, since, until, role, with_feature, without_feature
) as table
with stored as materialized (
    select encoded.source, sum(encoded.n_tokens)::bigint as n_encoded
    from stg_encoded_tokens as encoded
    cross join stg_shape
    where coalesce(document_key, since, until, role) is null and with_feature is null and has_marginals
    group by encoded.source
    having not (select bool_or(is_rest) from stg_encoded_tokens)
        and not exists (from stg_document_places where is_hidden)
),
-- Empty if the stored counts serve: then no token is read.
uncounted as (
    select places.document_id, places.source
    from under_filter_documents(source, document_key, since, until) as places
    where with_feature is null and not exists (from stored)
),
counted as (
    select uncounted.source, count(*) as n_encoded
    from stg_tokens as tokens
    join uncounted using (document_id)
    where tokens.mask
        and is_encoded(tokens.token_id, tokens.vocab_id)
        and (role is null or tokens.role = role)
    group by uncounted.source
),
-- A token at which a feature fires is encoded: the tokens of with_feature are all, those of without_feature too many.
firing as (
    select token_id
    from under_filter_ids(
        (select list(token_id) from tokens_of_feature(coalesce(with_feature, without_feature))),
        source, document_key, since, until, role,
        null, case when with_feature is not null then without_feature end
    )
),
weighed as (
    select places.source, case when with_feature is null then -1 else 1 end * count(*) as n_encoded
    from firing
    asof join stg_document_places as places on firing.token_id >= places.first_token_id
    where coalesce(with_feature, without_feature) is not null
    group by places.source
)
select parts.source, sum(parts.n_encoded)::bigint as n_encoded
from (
    from stored where source is null or stored.source = source
    union all from counted
    union all from weighed
) as parts
group by parts.source;
