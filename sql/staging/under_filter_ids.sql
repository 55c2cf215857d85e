-- The tokens that a filter lets through, for a list of token ids.
--
-- Grain:   one row per token of the list that passes, in no order. No token may be listed twice.
-- Reads:   under_filter_documents, stg_tokens, stg_feature_major
-- Units:   null means no filter. source, document_key, since and until are those of under_filter_documents, role is
--          that of a message. The feature with_feature fires at every token, without_feature at none.
-- Ask it:  from under_filter_ids([0, 4711], 'novels', null, null, null, null, 12, null)
--
-- The arguments are known before anything is read, so that only one side of each `union all` is planned and run.
create or replace macro under_filter_ids(
    ids, source, document_key, since, until, role, with_feature, without_feature
) as table
with listed as (
    select unnest(ids)::bigint as token_id
),
placed as (
    from listed where coalesce(source, document_key, since, until) is null
    union all
    select listed.token_id
    from listed
    asof join under_filter_documents(source, document_key, since, until) as places
        on listed.token_id >= places.first_token_id
    where coalesce(source, document_key, since, until) is not null and listed.token_id < places.end_token_id
),
spoken as (
    from placed where role is null
    union all
    from placed
    semi join (select tokens.token_id from stg_tokens as tokens where tokens.role = role) using (token_id)
    where role is not null
),
others as (
    select token_id, feature_id
    from stg_feature_major
    where feature_id in (with_feature, without_feature)
        and (with_feature between low and high or without_feature between low and high)
)
from spoken where coalesce(with_feature, without_feature) is null
union all
from spoken
where coalesce(with_feature, without_feature) is not null
    and (with_feature is null or token_id in (select token_id from others where feature_id = with_feature))
    and (
        without_feature is null or token_id not in (select token_id from others where feature_id = without_feature)
    );
