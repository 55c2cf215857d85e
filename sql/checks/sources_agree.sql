-- The counts by source equal a recount of the values. Finds nothing if an earlier saeflow stored none.
--
-- Grain:   one row per (feature, source) with a wrong count or sum; is_all marks a feature whose sources together are
--          wrong.
-- Reads:   stg_feature_sources, stg_feature_major, stg_tokens, stg_documents, stg_shape
-- Units:   n_… count tokens; sums must agree to 1e-12 of the sum of magnitudes. If a part counts sources
--          together (is_rest), a single source may have less than the recount.
-- Ask it:  which counts by source are stale?
with owners as (
    select stg_tokens.token_id, stg_documents.source from stg_tokens join stg_documents using (document_id)
),
counted as materialized (
    select
        feature_id,
        source,
        count(*)                    as n_tokens,
        fsum(value::double)         as sum_value,
        fsum(abs(value::double))    as sum_strength,
        fsum(pow(value::double, 2)) as sum_squares
    from stg_feature_major
    join owners using (token_id)
    group by feature_id, source
),
recount as (
    select feature_id, source, false as is_all, n_tokens, sum_value, sum_strength, sum_squares from counted
    union all
    select feature_id, null, true, sum(n_tokens), fsum(sum_value), fsum(sum_strength), fsum(sum_squares)
    from counted
    group by feature_id
),
stored as (
    select feature_id, source, false as is_all, n_tokens, sum_value, sum_squares
    from stg_feature_sources
    where not is_rest
    union all
    select feature_id, null, true, sum(n_tokens), fsum(sum_value), fsum(sum_squares)
    from stg_feature_sources
    group by feature_id
)
select
    coalesce(stored.feature_id, recount.feature_id) as feature_id,
    coalesce(stored.source, recount.source)         as source,
    coalesce(stored.is_all, recount.is_all)         as is_all,
    coalesce(stored.n_tokens, 0)                    as n_tokens_stored,
    coalesce(recount.n_tokens, 0)                   as n_tokens_counted,
    stored.sum_value                                as sum_value_stored,
    recount.sum_value                               as sum_value_counted
from stored
full join recount
    on stored.feature_id = recount.feature_id
    and stored.source is not distinct from recount.source
    and stored.is_all = recount.is_all
where (select has_marginals from stg_shape)
    and case
        when coalesce(stored.is_all, recount.is_all) or not exists (from stg_feature_sources where is_rest)
            then stored.n_tokens is distinct from recount.n_tokens
                or abs(stored.sum_value - recount.sum_value) > 1e-12 * recount.sum_strength
                or abs(stored.sum_squares - recount.sum_squares) > 1e-12 * recount.sum_squares
        else coalesce(stored.n_tokens, 0) > coalesce(recount.n_tokens, 0)
    end
order by 1, 2, 3;
