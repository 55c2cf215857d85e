-- The number of tokens at which two features fire together, summed over the run's parts.
--
-- Grain:   one row per (feature, other feature) that is among a feature's 50 largest Jaccard indexes in some part. A
--          pair may be stored in one direction alone.
-- Reads:   src_coactivation
-- Units:   n_both counts tokens. It is a lower bound if the run has several parts, and exact in a compacted run.
-- Ask it:  which features fire together most?
create or replace view stg_coactivation as
select feature_id, other_id, sum(n_both)::bigint as n_both
from src_coactivation
group by feature_id, other_id;
