-- How differently each feature fires in what two roles wrote, e.g. the assistant and the user.
--
-- Grain:   one row per feature, dead ones too, the largest effect first.
-- Reads:   stg_token_major, stg_tokens, stg_tokens_encoded, stg_feature_stats, cohens_h,
--          log2_rate_ratio
-- Units:   rate is a share of the role's encoded tokens (null if it has none). cohens_h = 2 asin(sqrt(rate_a)) - 2
--          asin(sqrt(rate_b)) (Cohen 1988: 0.2 is small, 0.5 medium, 0.8 large). log2_ratio compares the rates with
--          half a token added to each count (null if the feature fires in neither). mean_value is the mean over the
--          tokens at which it fires there. Reads every value of the run.
-- Parameters: a text, b text
-- Ask it:  what does the assistant's voice have that the user's has not?  from features_by_role('assistant', 'user')
create or replace macro features_by_role(a, b) as table
with spoken as materialized (
    select token_id, role = a as is_a, role = b as is_b
    from stg_tokens
    semi join stg_tokens_encoded using (token_id)
    where role in (a, b)
),
totals as (
    select count(*) filter (where is_a) as tokens_a, count(*) filter (where is_b) as tokens_b from spoken
),
firing as (
    select
        feature_id,
        count(*) filter (where is_a)        as n_a,
        count(*) filter (where is_b)        as n_b,
        avg(value) filter (where is_a)      as mean_a,
        avg(value) filter (where is_b)      as mean_b
    from stg_token_major
    join spoken using (token_id)
    group by feature_id
),
rates as (
    select
        feature_id,
        coalesce(n_a, 0)                        as n_tokens_a,
        coalesce(n_b, 0)                        as n_tokens_b,
        coalesce(n_a, 0) / nullif(tokens_a, 0)  as rate_a,
        coalesce(n_b, 0) / nullif(tokens_b, 0)  as rate_b,
        mean_a                                  as mean_value_a,
        mean_b                                  as mean_value_b,
        tokens_a,
        tokens_b
    from stg_feature_stats
    left join firing using (feature_id)
    cross join totals
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
