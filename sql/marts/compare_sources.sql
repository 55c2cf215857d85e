-- How often and how strongly each feature fires in one source of documents against another, counted from the values.
--
-- Grain:   one row per feature, dead ones too, the largest difference of rates first.
-- Reads:   stg_token_major, stg_tokens, stg_documents, stg_feature_stats, is_encoded, log2_rate_ratio
-- Units:   rate is a share of the source's own encoded tokens (null if it has none); mean_value is the mean over the
--          tokens at which the feature fires there; differences are a minus b. log2_ratio compares the rates with half
--          a token added to each count, so that it is always finite (null if the feature fires in neither source).
-- Parameters: a text, b text
-- Ask it:  which features tell novels from scripture?  from compare_sources('austen', 'bible')
create or replace macro compare_sources(a, b) as table
with members as (
    select stg_tokens.token_id, stg_documents.source = a as in_a, stg_documents.source = b as in_b
    from stg_tokens
    join stg_documents using (document_id)
    where stg_tokens.mask
        and stg_documents.source in (a, b)
        and is_encoded(stg_tokens.token_id, stg_tokens.vocab_id)
),
totals as (
    select count(*) filter (where in_a) as tokens_a, count(*) filter (where in_b) as tokens_b from members
),
firing as (
    select
        feature_id,
        count(*) filter (where in_a)   as n_a,
        count(*) filter (where in_b)   as n_b,
        avg(value) filter (where in_a) as mean_a,
        avg(value) filter (where in_b) as mean_b
    from stg_token_major
    join members using (token_id)
    group by feature_id
),
rates as (
    select
        feature_id,
        coalesce(n_a, 0)                          as n_tokens_a,
        coalesce(n_b, 0)                          as n_tokens_b,
        coalesce(n_a, 0) / nullif(tokens_a, 0)    as rate_a,
        coalesce(n_b, 0) / nullif(tokens_b, 0)    as rate_b,
        mean_a                                    as mean_value_a,
        mean_b                                    as mean_value_b,
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
    rate_a - rate_b             as rate_difference,
    log2_rate_ratio(n_tokens_a, tokens_a, n_tokens_b, tokens_b) as log2_ratio,
    mean_value_a,
    mean_value_b,
    mean_value_a - mean_value_b as mean_value_difference
from rates
order by abs(rate_a - rate_b) desc nulls last, feature_id;
