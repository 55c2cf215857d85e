-- At how many tokens a feature fires together with those that share most with it, summed over the run's parts.
--
-- Grain:   one row per (feature, other feature) that is among the first 50 by Jaccard of some part; the pair may be
--          there in one direction alone.
-- Reads:   src_coactivation
-- Units:   n_both counts tokens: a lower bound where a run has several parts, exact in a compacted one.
-- Ask it:  which features fire together most?
create or replace view stg_coactivation as
select feature_id, other_id, sum(n_both)::bigint as n_both
from src_coactivation
group by feature_id, other_id;
