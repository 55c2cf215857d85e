-- How often and how strongly a feature fires in each source, under a filter.
--
-- Grain:   one row per source with encoded tokens under the filter, the largest rate first; ties by name.
-- Reads:   under_filter_of_feature, under_filter_sizes, stg_document_places, peak_value
-- Units:   n_tokens counts the source's tokens at which the feature fires under the filter, n_encoded all its encoded
--          tokens that the filter lets through, whatever the threshold; rate = n_tokens / n_encoded. Values are in the
--          units of the activations (null if there are none). n_documents counts the source's documents in which the
--          feature fires, largest_share is the share of n_tokens in the one of them that has most (null if there is
--          none): near 1, one document makes the difference. source is null for documents without one. The filter is
--          that of feature_numbers.
-- Parameters: feature bigint, source text = null, document_key text = null, since text = null, until text = null,
--          role text = null, threshold double = 0, with_feature bigint = null, without_feature bigint = null
-- Ask it:  in which source does feature 12 fire most?  from feature_sources(12)
create or replace macro feature_sources(
    feature,
    source := null,
    document_key := null,
    since := null,
    until := null,
    role := null,
    threshold := 0,
    with_feature := null,
    without_feature := null
) as table
with fired as materialized (
    from under_filter_of_feature(
        feature, source, document_key, since, until, role, threshold, with_feature, without_feature
    )
),
firing as (
    select token_id, value from fired where passes
),
placed as materialized (
    select places.source, places.document_id, value
    from firing
    asof join stg_document_places as places on firing.token_id >= places.first_token_id
),
counts as (
    select
        placed.source,
        count(*)                  as n_tokens,
        avg(value::double)        as mean_value,
        peak_value(value)::double as max_value
    from placed
    group by placed.source
),
spread as (
    select documents.source, count(*) as n_documents, max(n_tokens) as n_largest
    from (select placed.source, count(*) as n_tokens from placed group by placed.source, document_id) as documents
    group by documents.source
)
select
    sizes.source,
    coalesce(counts.n_tokens, 0)                   as n_tokens,
    sizes.n_encoded,
    coalesce(counts.n_tokens, 0) / sizes.n_encoded as rate,
    coalesce(n_documents, 0)                       as n_documents,
    n_largest / counts.n_tokens                    as largest_share,
    counts.mean_value,
    counts.max_value
from under_filter_sizes(source, document_key, since, until, role, with_feature, without_feature) as sizes
left join counts on counts.source is not distinct from sizes.source
left join spread on spread.source is not distinct from sizes.source
where sizes.n_encoded > 0
order by rate desc, sizes.source;
