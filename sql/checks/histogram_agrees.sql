-- The histogram equals a recount of the values. Finds nothing if an earlier saeflow stored none.
--
-- Grain:   one row per (feature, bin) with a wrong count.
-- Reads:   stg_feature_histogram, stg_feature_major, value_bin, stg_shape, strength
-- Units:   n_… count tokens; a value that values_positive_finite finds has no bin.
-- Ask it:  which bins are stale?
with recount as (
    select feature_id, value_bin(value) as bin, count(*) as n_tokens
    from stg_feature_major
    where isfinite(value) and strength(value) > 0
    group by feature_id, bin
)
select
    feature_id,
    bin,
    coalesce(stg_feature_histogram.n_tokens, 0) as n_tokens_stored,
    coalesce(recount.n_tokens, 0)               as n_tokens_counted
from stg_feature_histogram
full join recount using (feature_id, bin)
where stg_feature_histogram.n_tokens is distinct from recount.n_tokens
    and (select has_marginals from stg_shape)
order by feature_id, bin;
