-- The number of encoded tokens that a filter lets through, in each source: the denominator of rates.
--
-- Grain:   one row per source with documents that pass; source is null for documents without one.
-- Reads:   stg_encoded_tokens, under_filter_serves, under_filter_weights
-- Units:   n_encoded counts encoded tokens, exactly. null means no filter; the others are those of under_filter_ids.
-- Ask it:  from under_filter_sizes(null, null, null, null, 'assistant', null, null)
create or replace macro under_filter_sizes(
    source, document_key, since, until, role, with_feature, without_feature
) as table
select parts.source, sum(parts.n_encoded)::bigint as n_encoded
from (
    select encoded.source, encoded.n_tokens as n_encoded
    from stg_encoded_tokens as encoded
    where with_feature is null
        and (source is null or encoded.source = source)
        and under_filter_serves(source, document_key, since, until, role)
    union all
    select tokens.source, sum(tokens.weight) as n_encoded
    from under_filter_weights(source, document_key, since, until, role, with_feature, without_feature) as tokens
    group by tokens.source
) as parts
group by parts.source;
