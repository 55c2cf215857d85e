-- The tokens by which stored counts of sources differ from those under a filter, and by how much each changes them.
--
-- Grain:   one row per (token, reason), in no order; none if the stored counts serve as they are.
-- Reads:   under_filter_serves, under_filter_documents, stg_tokens, is_encoded, under_filter_ids, tokens_of_feature,
--          stg_document_places
-- Units:   weight is 1 for a token that the filter lets through and that no stored count has, -1 for one that a stored
--          count has although without_feature fires there. All are encoded. source is the document's; the other
--          arguments are those of under_filter_ids.
-- Ask it:  from under_filter_weights(null, null, null, null, 'assistant', null, null)
create or replace macro under_filter_weights(
    source, document_key, since, until, role, with_feature, without_feature
) as table
-- No document if stored counts serve: then no token is read.
with uncounted as (
    select places.document_id, places.source
    from under_filter_documents(source, document_key, since, until) as places
    where with_feature is null and not under_filter_serves(source, document_key, since, until, role)
),
-- A token at which a feature fires is encoded.
firing as (
    from under_filter_ids(
        (select list(token_id) from tokens_of_feature(coalesce(with_feature, without_feature))),
        source, document_key, since, until, role,
        null, case when with_feature is not null then without_feature end
    )
    where coalesce(with_feature, without_feature) is not null
)
select tokens.token_id, uncounted.source, 1 as weight
from stg_tokens as tokens
join uncounted on uncounted.document_id = tokens.document_id
where tokens.mask
    and is_encoded(tokens.token_id, tokens.vocab_id)
    and (role is null or tokens.role = role)
union all
select firing.token_id, places.source, case when with_feature is null then -1 else 1 end as weight
from firing
asof join stg_document_places as places on firing.token_id >= places.first_token_id;
