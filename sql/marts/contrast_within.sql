-- How differently each feature fires in two sources, counted within a range of dates or of parts.
--
-- Grain:   one row per feature, or listed feature, dead ones too, the largest effect first.
-- Reads:   within_stats, stg_feature_stats, cohens_h, log2_rate_ratio
-- Units:   the columns are those of source_contrast, the range is that of summary_within. All are exact. Stored counts
--          answer for every part whose documents of both sources are all in the range. Values are read of other parts,
--          of parts with more than 64 sources, and of those of an earlier saeflow, which did not count sources.
-- Parameters: a text, b text, since text = null, until text = null, from_part bigint = null, to_part bigint = null,
--          features bigint[] = null
-- Ask it:  what tells novels from scripture since 1813?  from contrast_within('austen', 'bible', '1813')
create or replace macro contrast_within(
    a, b, since := null, until := null, from_part := null, to_part := null, features := null
) as table
with found as materialized (
    from within_stats([a, b], since, until, from_part, to_part, features)
),
totals as (
    select
        sum(found.n_tokens) filter (where feature_id is null and found.source = a)::bigint as tokens_a,
        sum(found.n_tokens) filter (where feature_id is null and found.source = b)::bigint as tokens_b
    from found
),
firing as (
    select
        feature_id,
        sum(found.n_tokens) filter (where found.source = a)::bigint as n_a,
        sum(found.n_tokens) filter (where found.source = b)::bigint as n_b,
        sum(found.sum_value) filter (where found.source = a)        as sum_a,
        sum(found.sum_value) filter (where found.source = b)        as sum_b
    from found
    group by feature_id
),
rates as (
    select
        feature_id,
        coalesce(n_a, 0)            as n_tokens_a,
        coalesce(n_b, 0)            as n_tokens_b,
        coalesce(n_a, 0) / tokens_a as rate_a,
        coalesce(n_b, 0) / tokens_b as rate_b,
        sum_a / n_a                 as mean_value_a,
        sum_b / n_b                 as mean_value_b,
        tokens_a,
        tokens_b
    from stg_feature_stats
    left join firing using (feature_id)
    cross join totals
    where features is null or list_contains(features, feature_id)
)
select
    feature_id,
    n_tokens_a,
    n_tokens_b,
    rate_a,
    rate_b,
    cohens_h(rate_a, rate_b) as cohens_h,
    log2_rate_ratio(n_tokens_a, tokens_a, n_tokens_b, tokens_b) as log2_ratio,
    mean_value_a,
    mean_value_b
from rates
order by abs(cohens_h) desc nulls last, feature_id;
