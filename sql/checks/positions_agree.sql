-- The counts by position equal a recount of the values. Finds nothing if an earlier saeflow stored none.
--
-- Grain:   one row per (feature, band) with a wrong count or sum.
-- Reads:   stg_feature_positions, stg_feature_major, stg_shape, position_band
-- Units:   n_… count tokens; sums must agree to 1e-12 of the sum of magnitudes.
-- Ask it:  which counts by position are stale?
with recount as (
    select
        feature_id,
        position_band(token_id % context_length) as band,
        count(*)                                 as n_tokens,
        fsum(value::double)                      as sum_value,
        fsum(abs(value::double))                 as sum_strength
    from stg_feature_major
    cross join stg_shape
    group by feature_id, band
)
select
    feature_id,
    band,
    coalesce(stg_feature_positions.n_tokens, 0) as n_tokens_stored,
    coalesce(recount.n_tokens, 0)               as n_tokens_counted,
    stg_feature_positions.sum_value             as sum_value_stored,
    recount.sum_value                           as sum_value_counted
from stg_feature_positions
full join recount using (feature_id, band)
where (
        stg_feature_positions.n_tokens is distinct from recount.n_tokens
        or abs(stg_feature_positions.sum_value - recount.sum_value) > 1e-12 * recount.sum_strength
    )
    and (select has_marginals from stg_shape)
order by feature_id, band;
