-- Features that fire together with a feature, under a filter.
--
-- Grain:   one row per other feature that fires at one of its tokens, the largest Jaccard index first; at most n.
-- Reads:   under_filter_of_feature, under_filter_stored, under_filter_weights, under_filter_total, stg_coactivation,
--          stg_feature_stats, stg_parts, stg_hidden_values, stg_token_major, feature_names, jaccard_index,
--          mutual_information
-- Units:   n_both counts the tokens of the filter at which both fire, n_feature those of the feature (above the
--          threshold), n_other those of the other feature (at any value), N all encoded tokens that the filter lets
--          through. jaccard = n_both / (n_feature + n_other - n_both); pmi = log2(n_both * N / (n_feature * n_other)),
--          in bits. All are exact: stored counts serve if there is no filter, the run is compacted and n is at most
--          50. Otherwise the values of all tokens of the feature are read, and those of all tokens of a filter of
--          documents, dates or roles. The filter is that of feature_numbers.
-- Parameters: feature bigint, n bigint = 20, source text = null, document_key text = null, since text = null,
--          until text = null, role text = null, threshold double = 0, with_feature bigint = null,
--          without_feature bigint = null
-- Ask it:  what fires together with feature 12 in the novels?  from feature_companions(12, 20, 'novels')
create or replace macro feature_companions(
    feature,
    n := 20,
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
own as materialized (
    select count(*) as n_feature from firing
),
stored as materialized (
    select other_id as feature_id, n_both
    from stg_coactivation
    where feature_id = feature
        and n <= 50
        and coalesce(threshold, 0) = 0
        and coalesce(source, document_key, since, until, role) is null
        and coalesce(with_feature, without_feature) is null
        and (select n_parts from stg_parts) = 1
        and not exists (from stg_hidden_values)
),
-- Empty if the stored counts serve: then no value is read.
read as (
    select token_id, 1 as n_both, 0 as n_other from firing where not exists (from stored)
    union all
    select token_id, 0 as n_both, weight as n_other
    from under_filter_weights(source, document_key, since, until, role, with_feature, without_feature)
    -- Without a filter the stored counts of all tokens serve.
    where coalesce(source, document_key, since, until, role) is not null or with_feature is not null or weight < 0
),
weighed as materialized (
    select token_id, sum(n_both)::bigint as n_both, sum(n_other)::bigint as n_other from read group by token_id
),
counted as (
    select feature_id, sum(n_both)::bigint as n_both, sum(n_other)::bigint as n_other
    from stg_token_major
    join weighed using (token_id)
    where feature_id <> feature
    group by feature_id
),
found as materialized (
    select feature_id, counted.n_both, counted.n_other + coalesce(base.n_tokens, 0) as n_other
    from counted
    left join under_filter_stored(source, document_key, since, until, role, with_feature) as base using (feature_id)
    where counted.n_both > 0
    union all
    select feature_id, stored.n_both, stats.n_tokens from stored join stg_feature_stats as stats using (feature_id)
),
rated as (
    select
        feature_id,
        n_both,
        n_feature,
        n_other,
        jaccard_index(n_both, n_feature, n_other)                 as jaccard,
        mutual_information(n_both, n_feature, n_other, n_encoded) as pmi
    from found
    cross join own
    cross join under_filter_total(source, document_key, since, until, role, with_feature, without_feature)
    order by jaccard desc, n_both desc, feature_id
    limit n
)
select feature_id as other_id, feature_names.label, n_both, n_feature, n_other, jaccard, pmi
from rated
left join feature_names using (feature_id)
order by jaccard desc, n_both desc, other_id;
