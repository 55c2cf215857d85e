-- How often and how strongly each feature fires, summed over the run's parts.
--
-- Grain:   one row per feature, dead ones too.
-- Reads:   src_feature_stats, peak_value
-- Units:   n_tokens counts tokens; the sums and max_value, the strongest value with its sign, are in the units of the
--          activations (squared).
-- Ask it:  how many features never fire?
create or replace view stg_feature_stats as
select
    feature_id,
    sum(n_tokens)::bigint                        as n_tokens,
    sum(sum_value)                               as sum_value,
    sum(sum_squares)                             as sum_squares,
    peak_value(if(n_tokens > 0, max_value, null)) as max_value
from src_feature_stats
group by feature_id;
