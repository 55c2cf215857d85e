-- The number of encoded tokens that a filter lets through, over all sources.
--
-- Grain:   one row.
-- Reads:   stg_size, under_filter_sizes
-- Units:   n_encoded counts encoded tokens, exactly; without a filter it is n_encoded_tokens of stg_size.
-- Ask it:  from under_filter_total('novels', null, null, null, null, null, null)
create or replace macro under_filter_total(
    source, document_key, since, until, role, with_feature, without_feature
) as table
select n_encoded_tokens as n_encoded
from stg_size
where coalesce(source, document_key, since, until, role) is null and coalesce(with_feature, without_feature) is null
union all
select coalesce(sum(n_encoded), 0)::bigint
from under_filter_sizes(source, document_key, since, until, role, with_feature, without_feature)
having coalesce(source, document_key, since, until, role) is not null
    or coalesce(with_feature, without_feature) is not null;
