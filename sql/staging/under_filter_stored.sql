-- The stored number of tokens at which each feature fires under a filter of a source, or under none.
--
-- Grain:   one row per feature that fires; none if the stored counts do not serve. under_filter_weights has the rest.
-- Reads:   stg_feature_stats, stg_feature_sources, under_filter_serves
-- Units:   n_tokens counts tokens, whatever without_feature is. The arguments are those of under_filter_ids.
-- Ask it:  from under_filter_stored('novels', null, null, null, null, null)
create or replace macro under_filter_stored(source, document_key, since, until, role, with_feature) as table
select feature_id, n_tokens
from stg_feature_stats
where coalesce(source, document_key, since, until, role) is null and with_feature is null
union all
select feature_id, sources.n_tokens
from stg_feature_sources as sources
where source is not null
    and with_feature is null
    and sources.source = source
    and not sources.is_rest
    and under_filter_serves(source, document_key, since, until, role);
