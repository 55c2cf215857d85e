-- The statistics equal a recount of the values.
--
-- Grain:   one row per feature whose statistics are wrong.
-- Reads:   stg_feature_stats, stg_feature_major, peak_value
-- Units:   sums must agree to 1e-12 of the sum of magnitudes (or squares), counts and strongest values exactly.
-- Ask it:  which statistics are stale?
with recount as (
    select
        feature_id,
        count(*)                    as n_tokens,
        fsum(value::double)         as sum_value,
        fsum(abs(value::double))    as sum_strength,
        fsum(pow(value::double, 2)) as sum_squares,
        peak_value(value)::double    as max_value
    from stg_feature_major
    group by feature_id
)
select
    feature_id,
    stg_feature_stats.n_tokens    as n_tokens_stored,
    recount.n_tokens              as n_tokens_counted,
    stg_feature_stats.sum_value   as sum_value_stored,
    recount.sum_value             as sum_value_counted,
    stg_feature_stats.sum_squares as sum_squares_stored,
    recount.sum_squares           as sum_squares_counted,
    stg_feature_stats.max_value   as max_value_stored,
    recount.max_value             as max_value_counted
from stg_feature_stats
full join recount using (feature_id)
where coalesce(stg_feature_stats.n_tokens, 0) <> coalesce(recount.n_tokens, 0)
    or abs(coalesce(stg_feature_stats.sum_value, 0) - coalesce(recount.sum_value, 0))
        > 1e-12 * coalesce(recount.sum_strength, 0)
    or abs(coalesce(stg_feature_stats.sum_squares, 0) - coalesce(recount.sum_squares, 0))
        > 1e-12 * coalesce(recount.sum_squares, 0)
    or stg_feature_stats.max_value is distinct from recount.max_value
order by feature_id;
