-- The tokens at which a feature fires, with its values, and which of them a filter lets through.
--
-- Grain:   one row per token, in no order.
-- Reads:   tokens_of_feature, under_filter_ids, is_beyond
-- Units:   passes is true for the tokens that the filter lets through. null means no filter; the others are those of
--          under_filter_ids. The threshold is that of tokens_where, but 0 leaves out nothing: a signed run keeps its
--          values below zero. value is in the units of the activations.
-- Ask it:  from under_filter_of_feature(12, 'novels', null, null, null, null, 0.5, null, null)
create or replace macro under_filter_of_feature(
    feature, source, document_key, since, until, role, threshold, with_feature, without_feature
) as table
with firing as (
    select
        token_id,
        value,
        case when coalesce(threshold, 0) = 0 then true else is_beyond(value, threshold::double) end as is_strong
    from tokens_of_feature(feature)
)
select token_id, value, is_strong as passes
from firing
where coalesce(source, document_key, since, until, role) is null and coalesce(with_feature, without_feature) is null
union all
select
    token_id,
    value,
    is_strong and token_id in (
        from under_filter_ids(
            (select list(token_id) from firing where is_strong),
            source, document_key, since, until, role, with_feature, without_feature
        )
    ) as passes
from firing
where coalesce(source, document_key, since, until, role) is not null
    or coalesce(with_feature, without_feature) is not null;
