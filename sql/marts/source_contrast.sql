-- How differently each feature fires in two sources of documents, from stored counts: quick.
--
-- Grain:   one row per feature, dead ones too, the largest effect first.
-- Reads:   stg_feature_sources, stg_encoded_tokens, stg_feature_stats, every_part_counts,
--          cohens_h, log2_rate_ratio
-- Units:   rate is a share of the source's encoded tokens (null if it has none). cohens_h = 2 asin(sqrt(rate_a)) - 2
--          asin(sqrt(rate_b)) (Cohen 1988: 0.2 is small, 0.5 medium, 0.8 large). log2_ratio compares the rates with
--          half a token added to each count (null if the feature fires in neither). mean_value is the mean over the
--          tokens at which it fires there. A part counts its 64 most frequent sources separately; a source that no part
--          counts is an error.
-- Parameters: a text, b text
-- Ask it:  what tells novels from scripture?  from source_contrast('austen', 'bible')
create or replace macro source_contrast(a, b) as table
with totals as (
    select
        sum(n_tokens) filter (where source = a and not is_rest)::bigint as tokens_a,
        sum(n_tokens) filter (where source = b and not is_rest)::bigint as tokens_b,
        bool_or(is_rest)                                                as has_rest
    from stg_encoded_tokens
),
counted as (
    select tokens_a, tokens_b
    from totals
    where every_part_counts()
        and case
            when has_rest and (tokens_a is null or tokens_b is null)
                then error('only the 64 most frequent sources of a part are counted apart: ask compare_sources')
            else true
        end
),
firing as (
    select
        feature_id,
        sum(n_tokens) filter (where source = a)::bigint as n_a,
        sum(n_tokens) filter (where source = b)::bigint as n_b,
        sum(sum_value) filter (where source = a)        as sum_a,
        sum(sum_value) filter (where source = b)        as sum_b
    from stg_feature_sources
    where not is_rest and source in (a, b)
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
    cross join counted
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
